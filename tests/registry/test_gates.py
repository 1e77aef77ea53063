"""Gates on rows made so that the right verdict is known."""

import json
import math
import random
import statistics
from typing import Any

import pytest
from pydantic import ValidationError

from registry.bootstrap import paired_bootstrap
from registry.errors import RegistryError
from registry.gates import Evidence, Gate, GateDecision, GateOutcome, decide, judge, terms_of
from tests.registry.workshop import Workshop

SCORE = Gate(metric="quality.answer_score", against="champion", no_worse_by=0.01)


def rows(
    candidate: str, count: int = 400, shift: float = 0.0, noise: float = 0.0, seed: int = 1, **more: Any
) -> Evidence:
    """A report of one candidate: scores that differ from sample to sample, moved by `shift`, with noise of its own."""
    base, own = random.Random(7), random.Random(seed)
    made = [
        {
            "sample": f"s{index}",
            "candidate": candidate,
            "score": base.random() + shift + own.gauss(0, noise),
            "nll": 2 + base.random() - shift,
            "tokens": base.randint(5, 50),
            **more,
        }
        for index in range(count)
    ]
    return Evidence(metrics={f"{candidate}/kl": 0.03, f"{candidate}/answer_score": 0.5}, rows={candidate: tuple(made)})


def verdict(gate: Gate, ours: Evidence, theirs: Evidence | None) -> GateOutcome:
    return judge(gate, "merged", ours, theirs)


def test_an_equal_candidate_passes() -> None:
    outcome = verdict(SCORE, rows("merged"), rows("merged"))
    assert (outcome.passed, outcome.difference, outcome.interval, outcome.samples) == (True, 0, (0, 0), 400)
    assert verdict(SCORE, rows("merged", noise=0.05, seed=2), rows("merged", noise=0.05, seed=3)).passed


def test_a_worse_candidate_is_refused() -> None:
    outcome = verdict(SCORE, rows("merged", shift=-0.05, noise=0.05), rows("merged"))
    assert not outcome.passed
    assert outcome.difference == pytest.approx(-0.05, abs=0.01)
    assert "perhaps worse by more than 0.01" in outcome.sentence


def test_a_loss_within_the_margin_passes_only_if_it_is_certain() -> None:
    gate = Gate(metric="quality.answer_score", against="champion", no_worse_by=0.03)
    assert verdict(gate, rows("merged", shift=-0.01, noise=0.05), rows("merged")).passed
    assert not verdict(gate, rows("merged", count=20, shift=-0.01, noise=0.3), rows("merged", count=20)).passed


def test_perplexity_is_weighted_by_tokens_and_lower_is_better() -> None:
    gate = Gate(metric="quality.perplexity", against="champion", no_worse_by=0.1)
    ours, theirs = rows("merged", shift=-0.2), rows("merged")
    outcome = verdict(gate, ours, theirs)
    tokens = [row["tokens"] for row in ours.rows["merged"]]
    mean = statistics.fmean([row["nll"] for row in ours.rows["merged"]], tokens)
    assert outcome.value == pytest.approx(math.exp(mean))
    assert outcome.champion == pytest.approx(math.exp(mean - 0.2))
    assert not outcome.passed
    assert verdict(gate, theirs, ours).passed, "a lower perplexity is an improvement"


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Each one-sided 95 % bound misses the true difference in about 5 % of repeated experiments."""
    import numpy as np

    source, missed, repeats = np.random.default_rng(3), 0, 120
    for _ in range(repeats):
        champion = source.random(60)
        candidate = champion + 0.1 + source.normal(0, 0.2, 60)
        _, _, low, _ = paired_bootstrap(np.stack([candidate, champion], 1), np.ones((60, 2)), 0.95)
        missed += low > 0.1
    assert 0 < missed / repeats < 0.13


def test_the_bootstrap_is_the_same_every_time_and_agrees_with_theory() -> None:
    import numpy as np

    source = np.random.default_rng(5)
    values = np.stack([source.normal(1, 1, 1000), source.normal(0, 1, 1000)], 1)
    first = paired_bootstrap(values, np.ones_like(values), 0.95)
    assert first == paired_bootstrap(values, np.ones_like(values), 0.95)
    difference = values[:, 0] - values[:, 1]
    error = 1.645 * difference.std(ddof=1) / math.sqrt(1000)
    assert first[2] == pytest.approx(difference.mean() - error, abs=0.005)
    assert first[3] == pytest.approx(difference.mean() + error, abs=0.005)


def test_only_common_samples_count_and_too_few_fail() -> None:
    outcome = verdict(SCORE, rows("merged", count=400), rows("merged", count=100))
    assert (outcome.samples, outcome.passed) == (100, True)
    few = verdict(SCORE, rows("merged", count=5), rows("merged"))
    assert not few.passed
    assert "5 samples in common" in few.sentence


def test_a_candidate_without_values_fails() -> None:
    outcome = verdict(SCORE, rows("merged", score=math.nan), rows("merged"))
    assert not outcome.passed
    assert "no value on 400 of 400 samples" in outcome.sentence


def test_the_first_candidate_passes_and_says_so() -> None:
    decision = decide([SCORE], ["merged"], {"quality": rows("merged")}, champion=None)
    assert decision.promote
    assert "it is the first" in decision.sentence


def test_a_bound_is_judged_for_each_member_that_a_gate_names() -> None:
    report = Evidence(metrics={"gguf[Q4_K_M]/kl": 0.04, "gguf[Q8_0]/kl": 0.001, "merged/answer_score": 0.4})
    gates = [
        Gate(metric="quality.kl_to_reference", member="gguf[Q4_K_M]", at_most=0.02),
        Gate(metric="quality.kl_to_reference", member="gguf[Q8_0]", at_most=0.02),
        Gate(metric="quality.answer_score", at_least=0.3),
    ]
    decision = decide(gates, ["merged", "gguf[Q4_K_M]", "gguf[Q8_0]"], {"quality": report})
    assert [(outcome.member, outcome.passed) for outcome in decision.outcomes] == [
        ("gguf[Q4_K_M]", False),
        ("gguf[Q8_0]", True),
        ("merged", True),
    ]
    assert not decision.promote
    assert decision.sentence == (
        "Not promoted: quality.kl_to_reference of `gguf[Q4_K_M]` is 0.04, it must be at most 0.02."
    )
    broken = Evidence(metrics={"merged/answer_score": math.nan})
    assert not decide(gates[2:], ["merged"], {"quality": broken}).promote


def test_no_gates_promote() -> None:
    assert decide([], ["merged"], {}).promote


def test_the_champion_may_have_another_name_in_its_report() -> None:
    decision = decide(
        [SCORE],
        ["merged"],
        {"quality": rows("merged", shift=-0.2)},
        {"quality": rows("champion")},
        {"merged": "champion"},
    )
    assert not decision.promote


def test_wrong_names_are_one_sentence_with_the_nearest() -> None:
    evidence = {"quality": rows("merged")}
    with pytest.raises(RegistryError, match="no report step `qualty`; did you mean `quality`"):
        decide([Gate(metric="qualty.kl", at_most=1)], ["merged"], evidence)
    with pytest.raises(RegistryError, match="no member `guf`; did you mean `gguf`"):
        decide([Gate(metric="quality.kl", member="guf", at_most=1)], ["gguf"], evidence)
    with pytest.raises(RegistryError, match="no `merged/kll`; did you mean `merged/kl`"):
        decide([Gate(metric="quality.kll", at_most=1)], ["merged"], evidence)
    with pytest.raises(RegistryError, match="no sample-by-sample test of `answer_scor`; did you mean `answer_score`"):
        decide(
            [Gate(metric="quality.answer_scor", against="champion")], ["merged"], evidence, evidence, {"merged": "old"}
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"metric": "quality.kl"},
        {"metric": "quality", "at_most": 1},
        {"metric": "quality.kl", "at_most": 1, "no_worse_by": 0.1},
        {"metric": "quality.kl", "at_mots": 1},
        {"metric": "quality.kl", "against": "previous"},
    ],
)
def test_gates_that_say_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gate.model_validate(fields)


def test_evidence_is_read_from_a_report(workshop: Workshop) -> None:
    lines = [{**row, "prompt": ["long"]} for row in rows("merged", count=2).rows["merged"]]
    report = workshop.report({"merged/kl": 0.5}, "".join(json.dumps(line) + "\n" for line in lines))
    evidence = Evidence.of(report)
    assert (evidence.metrics, evidence.digest) == ({"merged/kl": 0.5}, report.digest)
    assert [row["sample"] for row in evidence.rows["merged"]] == ["s0", "s1"]
    assert "prompt" not in evidence.rows["merged"][0]


@pytest.mark.parametrize(("ours", "theirs", "passed"), [(800.0, 2.0, False), (2.0, 800.0, True), (800.0, 800.0, False)])
def test_what_no_number_can_hold_is_decided_and_can_be_read_again(ours: float, theirs: float, passed: bool) -> None:
    """The exponential of a mean above 709 is no number."""
    gate = Gate(metric="quality.perplexity", against="champion", no_worse_by=0.1)
    found = verdict(gate, rows("merged", nll=ours), rows("merged", nll=theirs))
    assert found.passed is passed
    assert found.interval is None
    assert GateOutcome.model_validate_json(found.model_dump_json()) == found


def test_numbers_that_json_has_no_word_for_are_kept() -> None:
    outcome = GateOutcome(
        gate=SCORE, member="merged", passed=False, value=math.inf, interval=(-math.inf, math.inf), sentence="No."
    )
    assert GateOutcome.model_validate_json(outcome.model_dump_json()) == outcome
    decision = GateDecision(promote=False, outcomes=(outcome,), sentence="No.")
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision


def test_a_member_that_the_champion_has_too_is_equal_and_only_a_bound_can_fail() -> None:
    evidence = {"quality": Evidence(metrics={"merged/answer_score": 0.4})}
    decision = decide([SCORE], ["merged"], evidence, evidence, {}, {"merged"})
    assert decision.promote
    assert (decision.outcomes[0].value, decision.outcomes[0].champion) == (0.4, 0.4)
    bounded = SCORE.model_copy(update={"at_least": 0.5})
    assert "it must be at least 0.5" in decide([bounded], ["merged"], evidence, evidence, {}, {"merged"}).sentence


def test_a_decision_remembers_by_which_gates_members_and_reports_it_was_made() -> None:
    evidence = {"quality": rows("merged").model_copy(update={"digest": "ab12"})}
    made = decide([SCORE], ["merged", "gguf"], evidence)
    reports = {"quality": "ab12"}
    assert made.terms == terms_of([SCORE], ["merged", "gguf"], reports)
    assert made.terms != terms_of([SCORE.model_copy(update={"no_worse_by": 0.02})], ["merged", "gguf"], reports)
    assert made.terms != terms_of([SCORE], ["gguf", "merged"], reports)
    assert made.terms != terms_of([SCORE], ["merged", "gguf"], {"quality": "cd34"})


@pytest.mark.parametrize("metric", ["kl", "top1_agreement"])
def test_a_distance_to_the_reference_is_no_quality_that_two_models_can_be_compared_by(metric: str) -> None:
    gate = Gate(metric=f"quality.{metric}", against="champion")
    with pytest.raises(RegistryError, match=f"no sample-by-sample test of `{metric}`"):
        verdict(gate, rows("merged", kl=0.9), rows("merged", kl=0.1))
