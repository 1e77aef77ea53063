"""What a recipe publishes and by which gates: whatever can be seen before anything runs is refused before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.graph import Graph
from registry.champions import SUFFIX
from registry.errors import RegistryError
from registry.family import find
from registry.home import Home
from steps.frame import UserError
from tests.flows.conftest import SMALL, builder

QUALITY = "  quality: {uses: evaluate.compare, reference: merged, candidates: [gguf], data: data.eval}\n"
SCORES = "  scores: {uses: evaluate.tasks, candidates: [merged, base], data: data.eval}\n"
MORE = """
  other: {uses: quantize.gguf, model: base, scheme: Q8_0}
  coarse: {uses: quantize.gptq, model: merged, calibration: data.train, group_size: -1}
  fine: {uses: quantize.gptq, model: merged, calibration: data.train, group_size: 32}
  rl: {uses: train.grpo, model: base, data: data.train, adapter: {kind: full}, rewards: [{kind: exact}], group_size: 4}
  best: {uses: evaluate.best, candidates: [base, merged], report: scores}
"""
Publish = Callable[..., Graph]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Build a graph that publishes members of a family by one gate."""

    def build(
        gate: str = "",
        members: str = "merged, gguf",
        family: str = "small",
        quality: str = QUALITY,
        scores: str = SCORES,
    ) -> Graph:
        gates = f", gates: [{{{gate}}}]" if gate else ""
        whole = f"publish: {{family: {family}, members: [{members}]{gates}}}"
        return builder(SMALL, tmp_path / "small.yaml")(
            ("publish: {family: small, members: [merged, gguf]}", f"{quality}{scores}{whole}")
        )

    return build


def refusal(publish: Publish, gate: str = "", **more: str) -> str:
    with pytest.raises(UserError) as caught:
        publish(gate, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("metric", ["quality.kl", "quality.kl_to_reference", "quality.top1_agreement"])
def test_a_distance_to_tonights_reference_takes_a_bound_and_is_not_held_against_the_champions(
    publish: Publish, metric: str
) -> None:
    message = refusal(publish, f"metric: {metric}, member: gguf, against: champion")
    assert f"publish.gates.0.against: {metric} is the distance to tonight's reference" in message
    assert "write `at_most:` or `at_least:` with a bound instead" in message
    assert publish(f"metric: {metric}, member: gguf, at_most: 0.1")
    assert publish("metric: quality.perplexity, against: champion")


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (
            "metric: quality.perplexity_typo, at_most: 5",
            "metric: `quality` (evaluate.compare) has no metric `",
        ),
        ("metric: quality.perplexity_typo, at_most: 5", "; did you mean `perplexity`?"),
        ("metric: quality.accuracy, at_least: 0.5", "metric: `quality` (evaluate.compare) has no metric `accuracy`"),
        (
            "metric: scores.perplexity, against: champion",
            "`scores` (evaluate.tasks) has no metric `perplexity`",
        ),
        ("metric: scores.majority, at_least: 0.5", "metric: `scores` (evaluate.tasks) has no metric `majority`"),
        (
            "metric: quality.kl, at_most: 1",
            "metric: `merged` is the reference of `quality`, so it has no kl; name",
        ),
        ("metric: quality.kl, member: merged, at_most: 1", "gates.0.member: `merged` is the reference of `quality`"),
        (
            "metric: scores.p_value, at_least: 0.05",
            "`merged` is the reference of `scores`, so it has no p_value",
        ),
        (
            "metric: scores.accuracy, member: gguf, at_least: 0.5",
            "`scores` does not measure `gguf[Q8_0]`, but `merged`",
        ),
        ("metric: quality.size_bytes, against: champion", "against: quality.size_bytes has no value sample by sample"),
        ("metric: quality.size_bytes, against: champion", "or name one of perplexity, nll, answer_score"),
        ("metric: quality.nll, at_most: 2", "metric: the report has quality.nll by rows only"),
        ("metric: quality.nll, at_most: 0, against: champion", "metric: the report has quality.nll by rows only"),
        ("metric: quality.perplexity, at_most: .nan", "gates.0.at_most: nan is no bound; give a finite number"),
        ("metric: quality.perplexity, against: champion, no_worse_by: .inf", "no_worse_by: inf is no bound"),
    ],
)
def test_a_gate_that_its_report_cannot_answer_is_refused(publish: Publish, gate: str, said: str) -> None:
    assert said in refusal(publish, gate)


@pytest.mark.parametrize(
    "gate",
    [
        "metric: quality.nll, member: gguf, against: champion, at_most: null",
        "metric: quality.size_bytes, member: gguf, at_most: 1.0e9",
        "metric: quality.score, against: champion, at_least: 0.1",
        "metric: scores.accuracy, against: champion",
    ],
)
def test_a_gate_that_its_report_can_answer_is_taken(publish: Publish, gate: str) -> None:
    assert publish(gate)


def test_a_report_that_calls_a_member_otherwise_is_refused(publish: Publish) -> None:
    renamed = QUALITY.replace("[gguf]", "[gguf], names: [a, b]")
    with pytest.raises(UserError, match=r"gates\.0\.member: `quality` calls `gguf\[Q8_0\]` `a`, and gates know it by"):
        publish("metric: quality.kl, member: gguf, at_most: 1", quality=renamed)
    swapped = QUALITY.replace("[gguf]", "[base], names: ['gguf[Q8_0]']")
    with pytest.raises(UserError, match=r"`quality` does not measure `gguf\[Q8_0\]`"):
        publish("metric: quality.kl, member: 'gguf[Q8_0]', at_most: 1", quality=swapped)


def test_an_adapter_is_not_held_against_a_champion_that_the_next_night_could_not_measure(publish: Publish) -> None:
    scores = SCORES.replace("[merged, base]", "[sft, base]")
    message = "gates.0.against: `sft` is an Adapter, which cannot be measured once it is the champion"
    assert message in refusal(publish, "metric: scores.accuracy, against: champion", members="sft", scores=scores)
    assert publish("metric: scores.accuracy, at_least: 0.5", members="sft", scores=scores)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ("merged, merged", "publish.members: `merged` is named twice; name it once"),
        ("merged, gguf, 'gguf[F16]'", "publish.members: `gguf[F16]` is named twice"),
        (
            "merged, gguf, other",
            "`gguf[Q8_0]` and `other` are each a Quantized of the same scheme, and a",
        ),
        ("merged, best", "`merged` and `best` are each a Model, and a family has one; name one"),
        ("rl, merged", "`rl` and `merged` are each a Model, and a family has one; name one"),
    ],
)
def test_members_that_a_release_cannot_hold_are_refused(publish: Publish, members: str, said: str) -> None:
    assert said in refusal(publish, members=members, quality=QUALITY + MORE)


def test_quantized_members_are_told_apart_by_what_their_step_says_that_it_makes(publish: Publish) -> None:
    assert publish(members="merged, gguf, coarse, fine", quality=QUALITY + MORE)
    assert publish(members="rl, coarse", quality=QUALITY + MORE), "a group of answers is no group of weights"


@pytest.mark.parametrize("family", ["g.champions", "g" * 129, "-g", "g/h"])
def test_a_family_that_the_registry_would_refuse_is_refused(publish: Publish, home: Home, family: str) -> None:
    assert "publish.family: " in refusal(publish, family=family)
    assert family.endswith(SUFFIX) or not is_a_name(home, family), "the registry and the recipe agree"


def test_a_family_that_the_registry_takes_is_taken(publish: Publish, home: Home) -> None:
    assert publish(family="g" * 128) and is_a_name(home, "g" * 128)


def is_a_name(home: Home, family: str) -> bool:
    try:
        find(home, family)
    except RegistryError:
        return False
    return True
