"""data.judge: preferences out of sampled answers, ranked by a verifier, a reward model or a judging model."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from steps.artifacts import Dataset, DatasetFacts, Samples, SamplesFacts
from steps.data._judging import comparison
from steps.frame.kinds import load_kind
from steps.lm.rows import read_jsonl
from steps.lm.tasks import Rollout, Task
from tests.steps.comparisons import comparison_rows, facts, wrong
from tests.steps.conftest import publish

GOOD, BAD = ("sunny", "bright", "clear", "warm"), ("rainy", "dark", "foggy", "cold")
CRITERION = "Which is better weather?"


def sampled(texts: Sequence[str], scores: Sequence[float | None], name: str = "t") -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": "x"}]
    samples = [
        {"text": text, "tokens": 1, "truncated": False, "score": score}
        for text, score in zip(texts, scores, strict=True)
    ]
    return {"id": name, "messages": messages, "source": "test", "samples": samples}


def samples_of(bench: Any, name: str, rows: Sequence[dict[str, Any]]) -> Samples:
    count = sum(len(row["samples"]) for row in rows)
    return publish(bench, Samples, name, rows, SamplesFacts(rows=len(rows), samples=count))


@pytest.fixture(scope="session")
def scored(bench: Any) -> Samples:
    rows = [
        sampled(["a", "b", "c", "a"], [0.0, 1.0, 0.5, 0.0], "mixed"),
        sampled(["d", "e"], [1.0, 1.0], "all-right"),
        sampled(["f", "f "], [0.0, 0.0], "one-text"),
        sampled(["g", "h"], [0.2, 0.1], "near"),
    ]
    return samples_of(bench, "scored", rows)


def preferred(bench: Any, data: Samples, **config: Any) -> set[tuple[str, str, str]]:
    """Prompt, chosen and rejected of every row."""
    inputs = {"data": data, **{name: config.pop(name) for name in ("judge", "reward_model") if name in config}}
    made = bench.run("data.judge", inputs, **config)[""]
    assert made.facts.paired
    return {(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in read_jsonl(made.rows_file)}


def test_verified_scores_make_best_against_worst(bench: Any, scored: Samples) -> None:
    assert preferred(bench, scored, verified=True) == {("mixed?", "b", "a"), ("near?", "g", "h")}
    assert bench.last.metrics["tasks_dropped"] == 2
    assert bench.last.metrics["agrees_with_verifier"] == 1


def test_all_pairs_and_the_margin(bench: Any, scored: Samples) -> None:
    every = {("mixed?", "b", "a"), ("mixed?", "b", "c"), ("mixed?", "c", "a")}
    assert preferred(bench, scored, verified=True, pairs="all_pairs", min_margin=0.2) == every
    assert preferred(bench, scored, verified=True, pairs="all_pairs", min_margin=0.5) == {("mixed?", "b", "a")}


def test_nothing_to_rank_is_refused(bench: Any, scored: Samples) -> None:
    result = bench.attempt("data.judge", {"data": scored}, verified=True, min_margin=1.0)
    assert result.status == "refused"
    assert "none of the 4 tasks has two answers that ended and differ by more than min_margin: 1" in result.message
    blank = samples_of(bench, "blank", [sampled(["a", "b"], [None, 1.0])])
    result = bench.attempt("data.judge", {"data": blank}, verified=True)
    assert result.status == "refused"
    assert "task t has answers without a score" in result.message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "nothing given to rank by"),
        ({"judge": "base", "verified": True}, "judge and verified given to rank by; give exactly one"),
        ({"judge": "base", "reward_model": "reward"}, "judge and reward_model given"),
    ],
)
def test_exactly_one_thing_ranks(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        load_kind("data.judge").config.model_validate({"data": "samples", **given})


def lessons() -> Iterator[dict[str, Any]]:
    """What teaches a judge: comparisons in both orders, each with its answer."""
    for number, (good, bad) in enumerate((good, bad) for good in GOOD for bad in BAD):
        task = Task(str(number), ({"role": "user", "content": "Weather?"},), "", "test")
        for letter, texts in (("A", (good, bad)), ("B", (bad, good))):
            first, second = (Rollout(task, text, 1) for text in texts)
            answer = {"role": "assistant", "content": letter}
            messages = [*comparison(CRITERION, first, second), answer]
            yield {"id": f"{number}{letter}", "messages": messages, "source": "test"}


@pytest.fixture(scope="session")
def judge(bench: Any, pico: Any) -> Any:
    """A pico model that was taught what good weather is."""
    rows = list(lessons())
    data = publish(bench, Dataset, "lessons", rows, DatasetFacts(rows=len(rows)))
    settings = {"batch_size": 32, "max_steps": 100, "learning_rate": 1e-3, "schedule": "constant_with_warmup"}
    adapter = {"kind": "full"}
    return bench.run("train.sft", {"model": pico, "data": data}, dtype="float32", adapter=adapter, **settings)[""]


def test_a_judge_ranks_by_what_it_was_taught(bench: Any, judge: Any) -> None:
    pairs = [(good, bad) for good in GOOD for bad in BAD]
    weather = [sampled([bad, good], [None] * 2, f"{good} or {bad}") for good, bad in pairs]
    found = preferred(bench, samples_of(bench, "weather", weather), judge=judge, criterion=CRITERION, dtype="float32")
    assert len(found) == len(pairs)
    right = sum(chosen in GOOD for _, chosen, _ in found)
    assert binomtest(right, len(pairs), alternative="greater").pvalue < 0.01
    assert 0 <= bench.last.metrics["order_agreement"] <= 1
    assert 0 < bench.last.metrics["first_preferred"] < 1


def test_a_reward_model_ranks_as_it_scores(bench: Any, sorting: Any, sorting_model: Any) -> None:
    from steps.artifacts import Preferences
    from steps.lm.reward_model import RewardScorer

    rows = list(comparison_rows(sorting["train"]))
    data = publish(bench, Preferences, "ranked", rows, facts(rows))
    settings = {"batch_size": 64, "max_steps": 20, "learning_rate": 5e-3, "dtype": "float32"}
    model = bench.run("train.reward", {"model": sorting_model, "data": data}, **settings)[""]
    answered = []
    for row in read_jsonl(sorting["eval"].rows_file):
        right = row["messages"][-1]["content"]
        texts = [right, wrong(right), f"{right} 0"]
        samples = [{"text": text, "tokens": 1, "truncated": False, "score": float(text == texts[0])} for text in texts]
        answered.append({**row, "samples": samples})
    found = preferred(bench, samples_of(bench, "answered", answered), reward_model=model)
    scorer = RewardScorer(model.path)
    for prompt, chosen, rejected in list(found)[:10]:
        task = Task("", ({"role": "user", "content": prompt},), "", "test")
        better, worse = scorer.score([Rollout(task, chosen, 1), Rollout(task, rejected, 1)])
        assert better > worse
    assert bench.last.metrics["agrees_with_verifier"] > 0.5
