"""Reward models: of whole answers and of steps, trained, merged, saved, and asked again from disk."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from steps.artifacts import Dataset, Preferences, Samples, SamplesFacts
from steps.frame.errors import UserError
from steps.lm.checkpoint import load_tokenizer
from steps.lm.reward_model import RewardScorer, step_ends
from steps.lm.rows import read_jsonl
from steps.lm.tasks import Rollout, Task
from tests.steps.comparisons import comparison_rows, facts, wrong
from tests.steps.conftest import better, curve, publish, run_and_kill

LEARNING: dict[str, Any] = {
    "adapter": {"kind": "lora", "rank": 32},
    "batch_size": 64,
    "max_steps": 30,
    "learning_rate": 5e-3,
    "dtype": "float32",
    "seed": 3,
}


@pytest.fixture(scope="session")
def rated(bench: Any, sorting: Any) -> dict[str, Preferences]:
    """Tasks whose right answer is preferred to a wrong one."""
    parts = {name: list(comparison_rows(sorting[name])) for name in ("train", "eval")}
    return {name: publish(bench, Preferences, f"rated-{name}", rows, facts(rows)) for name, rows in parts.items()}


def step_rows(tasks: Dataset) -> Iterator[dict[str, Any]]:
    """Each task answered in two lines, either of which may be wrong."""
    for number, row in enumerate(read_jsonl(tasks.rows_file)):
        answer = row["messages"][-1]["content"]
        labels = [number % 2 == 0, number % 3 != 0]
        lines = [answer if right else wrong(answer) for right in labels]
        steps = [{"text": line, "label": int(right)} for line, right in zip(lines, labels, strict=True)]
        sample = {"text": "\n".join(lines), "tokens": 20, "truncated": False, "score": None, "steps": steps}
        yield {**row, "samples": [sample]}


@pytest.fixture(scope="session")
def stepped(bench: Any, sorting: Any) -> dict[str, Samples]:
    parts = {name: list(step_rows(sorting[name])) for name in ("train", "eval")}
    return {
        name: publish(bench, Samples, f"stepped-{name}", rows, SamplesFacts(rows=len(rows), samples=len(rows)))
        for name, rows in parts.items()
    }


@pytest.fixture(scope="session")
def outcome(bench: Any, sorting_model: Any, rated: dict[str, Preferences]) -> Any:
    return bench.run(
        "train.reward", {"model": sorting_model, "data": rated["train"], "eval": rated["eval"]}, **LEARNING
    )[""]


@pytest.fixture(scope="session")
def process(bench: Any, sorting_model: Any, stepped: dict[str, Samples]) -> Any:
    inputs = {"model": sorting_model, "data": stepped["train"], "eval": stepped["eval"]}
    settings = LEARNING | {"adapter": {"kind": "full"}, "learning_rate": 1e-3, "max_steps": 40, "process": True}
    return bench.run("train.reward", inputs, **settings)[""]


def rollouts(data: Preferences, side: str) -> list[Rollout]:
    return [
        Rollout(Task(row["id"], tuple(row["prompt"]), "", row["source"]), row[side], 1)
        for row in read_jsonl(data.rows_file)
    ]


def reward_margins(model: Any, data: Preferences) -> list[float]:
    scorer = RewardScorer(model.path, batch_size=64)
    chosen, rejected = (scorer.score(rollouts(data, side)) for side in ("chosen", "rejected"))
    return [good - bad for good, bad in zip(chosen, rejected, strict=True)]


def test_the_right_answer_gets_the_higher_reward(
    bench: Any, sorting_model: Any, rated: dict[str, Preferences], outcome: Any
) -> None:
    inputs = {"model": sorting_model, "data": rated["train"]}
    untrained = bench.run("train.reward", inputs, **{**LEARNING, "max_steps": 1, "learning_rate": 1e-12})[""]
    before, after = ([margin > 0 for margin in reward_margins(model, rated["eval"])] for model in (untrained, outcome))
    assert better(before, after) < 0.01


def test_the_saved_model_scores_as_the_trained_one_did(bench: Any, rated: dict[str, Preferences], outcome: Any) -> None:
    margins = reward_margins(outcome, rated["eval"])
    accuracy = curve(bench, outcome, "eval_accuracy")
    assert set(accuracy) == {0, LEARNING["max_steps"]}, "measured before the first step and after the last"
    # TRL averages over batches, of which the last is small.
    batches = [margins[start : start + 64] for start in range(0, len(margins), 64)]
    merged = np.mean([np.mean(np.array(batch) > 0) for batch in batches])
    assert accuracy[LEARNING["max_steps"]] == pytest.approx(merged, abs=0.01)
    expected = np.mean([np.mean(batch) for batch in batches])
    assert curve(bench, outcome, "eval_margin")[LEARNING["max_steps"]] == pytest.approx(expected, rel=1e-3)


def test_it_is_a_whole_checkpoint_without_an_adapter(sorting_model: Any, outcome: Any) -> None:
    assert outcome.kind == "RewardModel"
    assert outcome.facts.architecture == "LlamaForSequenceClassification"
    assert outcome.facts.stop_token_ids == sorting_model.facts.stop_token_ids
    assert outcome.facts.template_sha256 == sorting_model.facts.template_sha256
    assert not list(outcome.path.glob("adapter*"))
    assert list(outcome.path.glob("*.safetensors"))


def test_a_reward_does_not_depend_on_its_batch(rated: dict[str, Preferences], outcome: Any) -> None:
    mixed = [each for side in ("chosen", "rejected") for each in rollouts(rated["eval"], side)[:20]]
    alone = [
        RewardScorer(outcome.path, batch_size=1).score(mixed),
        RewardScorer(outcome.path, batch_size=40).score(mixed),
    ]
    assert alone[0] == pytest.approx(alone[1], abs=1e-4)


def test_first_loss_is_minus_log_sigmoid_of_the_margin(
    sorting_model: Any, rated: dict[str, Preferences], fresh: Callable[[], Any]
) -> None:
    inputs = {"model": sorting_model, "data": rated["train"]}
    settings = LEARNING | {"max_steps": 1, "batch_size": 1}
    bench = fresh()
    first = bench.run("train.reward", inputs, **settings)[""]
    loss, margin = curve(bench, first, "loss")[1], curve(bench, first, "margin")[1]
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-6)
    assert loss != pytest.approx(math.log(2), rel=1e-9), "a fresh head tells answers apart, at random"
    assert fresh().run("train.reward", inputs, **settings)[""].digest == first.digest


def labelled_scores(model: Any, data: Samples) -> tuple[list[float], list[bool]]:
    rows = list(read_jsonl(data.rows_file))
    asked = [Rollout(Task.of(row), row["samples"][0]["text"], 1) for row in rows]
    scores = RewardScorer(model.path, batch_size=64).step_scores(asked)
    labels = [[bool(step["label"]) for step in row["samples"][0]["steps"]] for row in rows]
    assert [len(each) for each in scores] == [len(each) for each in labels]
    return [score for each in scores for score in each], [label for each in labels for label in each]


def test_a_process_model_tells_good_steps_from_bad(bench: Any, stepped: dict[str, Samples], process: Any) -> None:
    scores, labels = labelled_scores(process, stepped["eval"])
    good = [score for score, label in zip(scores, labels, strict=True) if label]
    bad = [score for score, label in zip(scores, labels, strict=True) if not label]
    test = mannwhitneyu(good, bad, alternative="greater")
    assert test.pvalue < 0.01
    assert test.statistic / (len(good) * len(bad)) > 0.75, "area under the ROC curve"
    accuracy = curve(bench, process, "eval_step_accuracy")
    found = np.mean([(score > 0.5) == label for score, label in zip(scores, labels, strict=True)])
    assert accuracy[max(accuracy)] == pytest.approx(found, abs=0.005)


def test_first_loss_of_a_process_model_is_the_cross_entropy_of_its_steps(
    bench: Any, sorting_model: Any, stepped: dict[str, Samples]
) -> None:
    rows = list(read_jsonl(stepped["eval"].rows_file))[:8]
    inputs = {"model": sorting_model, "data": samples_of(bench, "stepped-few", rows)}
    settings = LEARNING | {"adapter": {"kind": "full"}, "process": True, "batch_size": 8, "max_steps": 1}
    untrained = bench.run("train.reward", inputs, **settings | {"learning_rate": 1e-12})[""]
    scores, labels = labelled_scores(untrained, inputs["data"])
    expected = -np.mean([math.log(p if right else 1 - p) for p, right in zip(scores, labels, strict=True)])
    assert curve(bench, untrained, "loss")[1] == pytest.approx(expected, rel=1e-4)


def test_a_killed_process_model_ends_in_the_same_bytes(
    sorting_model: Any, stepped: dict[str, Samples], fresh: Callable[[], Any]
) -> None:
    inputs = {"model": sorting_model, "data": stepped["train"]}
    settings = LEARNING | {"process": True, "batch_size": 16, "max_steps": 24, "checkpoint_steps": 4}
    undisturbed = fresh().run("train.reward", inputs, **settings)[""]
    bench = fresh()
    assert "SIGKILL" in run_and_kill(bench, "train.reward", inputs, settings).message
    assert bench.run("train.reward", inputs, **settings)[""].digest == undisturbed.digest


def test_a_process_reward_is_the_product_of_its_steps(stepped: dict[str, Samples], process: Any) -> None:
    rows = list(read_jsonl(stepped["eval"].rows_file))[:8]
    asked = [Rollout(Task.of(row), row["samples"][0]["text"], 1) for row in rows]
    scorer = RewardScorer(process.path)
    assert scorer.score(asked) == [math.prod(each) for each in scorer.step_scores(asked)]
    assert scorer.score([Rollout(asked[0].task, "", 1)]) == [0.0]


def test_an_outcome_model_scores_no_steps(outcome: Any, rated: dict[str, Preferences]) -> None:
    with pytest.raises(UserError, match="scores whole answers, not steps"):
        RewardScorer(outcome.path).step_scores(rollouts(rated["eval"], "chosen")[:1])


def test_steps_end_at_their_own_last_token(sorting_model: Any) -> None:
    tokenizer = load_tokenizer(sorting_model.path)
    steps = ["1+1=2", "  2+1=3", "so 3"]
    ids, ends = step_ends(tokenizer, [{"role": "user", "content": "1+1+1"}], "\n".join(steps), steps)
    heard = [str(tokenizer.decode(ids[: end + 1])) for end in ends]
    assert [text.rpartition("\n")[2].strip() for text in heard] == [step.strip() for step in steps]
    with pytest.raises(UserError, match=r"step 2 .* is no part of its answer"):
        step_ends(tokenizer, [{"role": "user", "content": "1+1"}], "1+1=2", ["1+1", "2+2"])


def samples_of(bench: Any, name: str, rows: Sequence[dict[str, Any]]) -> Samples:
    return publish(bench, Samples, name, rows, SamplesFacts(rows=len(rows), samples=len(rows)))


def test_bad_steps_are_refused(bench: Any, sorting_model: Any, rated: Any, stepped: dict[str, Samples]) -> None:
    row = next(read_jsonl(stepped["eval"].rows_file))
    sample = row["samples"][0]
    graded = samples_of(bench, "graded", [{**row, "samples": [{**sample, "steps": [{"text": "1", "label": 7}]}]}])
    bare = samples_of(bench, "bare", [{**row, "samples": [{**sample, "steps": None}]}])
    for data, settings, says in (
        (graded, {"process": True}, "a step has the label 7; it must be 1 (right), 0 (wrong) or null"),
        (bare, {"process": True}, "no answer in `data` has labelled steps"),
        (rated["eval"], {"process": True}, "`data` is a Preferences; with process: true"),
        (stepped["eval"], {}, "`data` is a Samples; with process: false"),
    ):
        result = bench.attempt("train.reward", {"model": sorting_model, "data": data}, max_steps=1, **settings)
        assert result.status == "refused", result
        assert says in result.message
