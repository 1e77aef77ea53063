"""What the evaluation of tasks reports is what a direct count of right answers gives."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from scipy.stats import binomtest

from steps.artifacts import Report
from steps.evaluate._task_scores import Solved, corrected, holm, judge, metrics_of, sign_test
from steps.lm.rows import read_jsonl
from steps.lm.scoring import bootstrap_interval, share_interval, wilson_interval
from steps.lm.tasks import Rollout, Task
from steps.train.rewards import REWARDS, Scorer
from steps.train.rewards._answers import number_in, stated_answer
from tests.conftest import Bench
from tests.steps.conftest import solved

SETTINGS = {"max_new_tokens": 8, "dtype": "float32"}


@pytest.fixture(scope="session")
def better_model(bench: Bench, sorting: Any, sorting_model: Any) -> Any:
    return bench.run(
        "train.sft",
        {"model": sorting_model, "data": sorting["train"]},
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=60,
        learning_rate=1e-3,
        dtype="float32",
    )[""]


@pytest.fixture(scope="session")
def report(bench: Bench, sorting: Any, sorting_model: Any, better_model: Any) -> Report:
    inputs = {"candidates": [sorting_model, better_model], "data": sorting["eval"]}
    return bench.run("evaluate.tasks", inputs, names=["sft", "more"], **SETTINGS)[""]


def rows_of(report: Report, name: str, file: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [row for row in read_jsonl(report.path / file) if row["candidate"] == name]


def test_figures_are_a_direct_count(
    bench: Bench, report: Report, sorting: Any, sorting_model: Any, better_model: Any
) -> None:
    metrics = report.facts.metrics
    counted = {}
    for name, model in (("sft", sorting_model), ("more", better_model)):
        counted[name] = right = solved(bench, model, sorting["eval"], new_tokens=8)
        rows = rows_of(report, name)
        answers = [row["answer"] == row["reference_answer"] for row in rows]
        assert [row["score"] == 1 for row in rows] == answers
        assert sum(a != b for a, b in zip(answers, right, strict=True)) <= 6, "bfloat16 there, float32 here"
        assert metrics[f"{name}/accuracy"] == pytest.approx(sum(answers) / 200)
        interval = metrics[f"{name}/accuracy_low"], metrics[f"{name}/accuracy_high"]
        assert interval == pytest.approx(wilson_interval(sum(answers) / 200, 200), abs=1e-5)
        assert metrics[f"{name}/mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 200)
        assert metrics[f"{name}/truncated"] == pytest.approx(sum(row["truncated"] for row in rows) / 200)
        counted[name] = answers
    gained = sum(now and not then for then, now in zip(counted["sft"], counted["more"], strict=True))
    lost = sum(then and not now for then, now in zip(counted["sft"], counted["more"], strict=True))
    assert metrics["more/p_value"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert "sft/p_value" not in metrics


def test_files_and_figures_of_the_report(bench: Bench, report: Report) -> None:
    summary = json.loads((report.path / "summary.json").read_text())
    assert summary["reference"] == "sft"
    assert summary["candidates"]["more"]["accuracy"] == report.facts.metrics["more/accuracy"]
    assert "budgets" not in summary
    text = (report.path / "table.md").read_text()
    assert re.search(r"\| more \| \d+\.\d% \(\d+\.\d% to \d+\.\d%\) \| \d\.\d \|", text)
    work = bench.root / "work" / report.manifest.key[:16]
    assert (work / "plots" / "accuracy.svg").exists()
    assert not (work / "plots" / "thinking_budget.svg").exists()


def test_several_answers_a_task(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"candidates": [sorting_model], "data": sorting["eval"]}
    settings = {**SETTINGS, "samples": 5, "temperature": 0.8, "rows": 60}
    found = bench.run("evaluate.tasks", inputs, **settings)[""]
    rows = rows_of(found, "model-1")
    assert len(rows) == 60
    assert found.facts.metrics["model-1/accuracy"] == pytest.approx(
        sum(each["text"] == row["reference_answer"] for row in rows for each in row["answers"]) / 300, abs=1e-6
    )
    majority = [Counter(each["text"].strip() for each in row["answers"]).most_common(1)[0][0] for row in rows]
    assert found.facts.metrics["model-1/majority"] == pytest.approx(
        sum(answer == row["reference_answer"] for answer, row in zip(majority, rows, strict=True)) / 60, abs=1e-6
    )


def test_an_accuracy_for_each_thinking_budget(bench: Bench, sorting: Any, pico: Any) -> None:
    adapter = bench.run("train.sft", {"model": pico, "data": sorting["train"]}, max_steps=3)[""]
    inputs = {"candidates": [pico, adapter], "model": pico, "data": sorting["eval"]}
    # Any answer that ends with a digit counts: what is asked here is only whether the figures are the rows'.
    verifier = {"kind": "pattern", "expression": "[0-9]", "match": "search", "name": "digits"}
    settings = {"thinking_tokens": [0, 8, None], "thinking": True, "verifier": verifier, "rows": 24}
    found = bench.run("evaluate.tasks", inputs, names=["base", "tuned"], max_new_tokens=40, **settings)[""]
    metrics = found.facts.metrics
    summary = json.loads((found.path / "summary.json").read_text())
    for name in ("base", "tuned"):
        rows = rows_of(found, name)
        assert {row["thinking_tokens"] for row in rows} == {None}
        assert metrics[f"{name}/accuracy"] == pytest.approx(sum(row["score"] for row in rows) / 24, abs=1e-6)
        others = rows_of(found, name, "budgets.jsonl")
        for budget in (0, 8):
            own = [row for row in others if row["thinking_tokens"] == budget]
            assert len(own) == 24
            wanted = sum(row["score"] for row in own) / 24
            assert metrics[f"{name}/accuracy_at_{budget}"] == pytest.approx(wanted, abs=1e-6)
            assert all(row["answer"].startswith("<think>") == (budget == 8) for row in own)
        assert [each["thinking_tokens"] for each in summary["budgets"][name]] == [0, 8, None]
        assert summary["budgets"][name][2]["accuracy"] == metrics[f"{name}/accuracy"]
    work = bench.root / "work" / found.manifest.key[:16]
    assert (work / "plots" / "thinking_budget.svg").exists()


def test_an_adapter_needs_its_base(bench: Bench, sorting: Any, sorting_model: Any, pico: Any) -> None:
    adapter = bench.run("train.sft", {"model": pico, "data": sorting["train"]}, max_steps=3)[""]
    alone = bench.attempt("evaluate.tasks", {"candidates": [adapter], "data": sorting["eval"]}, names=["lora"], rows=4)
    assert alone.status == "refused"
    assert "`lora` is an adapter; name its base as `model`" in alone.message
    wrong = bench.attempt(
        "evaluate.tasks", {"candidates": [adapter], "model": sorting_model, "data": sorting["eval"]}, rows=4
    )
    assert wrong.status == "refused"
    assert f"not on {sorting_model.digest[:12]}" in wrong.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"thinking_tokens": [64, 8]}, "thinking_tokens must rise"),
        ({"thinking_tokens": [None, 8]}, "thinking_tokens must rise"),
        ({"thinking_tokens": [300]}, "leaves nothing of max_new_tokens: 256"),
        ({"samples": 4}, "4 greedy answers are all the same; raise `temperature`"),
        ({"verifier": {"kind": "judge"}}, "the reward `judge` asks the step's input `judge`, which is not given"),
        ({"candidates": []}, "candidates"),
    ],
)
def test_bad_settings_are_refused_before_the_run(settings: dict[str, Any], said: str) -> None:
    from steps.evaluate.tasks import EvaluateTasks

    with pytest.raises(ValueError, match=re.escape(said)):
        EvaluateTasks.model_validate({"candidates": ["sft"], "data": "data.eval", **settings})


def answered(*answers: str, kind: str = "numeric") -> Solved:
    task = Task("t", ({"role": "user", "content": "?"},), "42", "test")
    scorer = Scorer(REWARDS[kind].spec.model_validate({"kind": kind}))
    return judge([[Rollout(task, text, 3) for text in answers]], scorer, 1.0)[0]


def test_majority_and_sign_test_by_hand() -> None:
    assert answered("1", "42", "42").majority
    assert not answered("1", "42").majority, "of equally frequent answers the first"
    prose = ("It is 42.", "So we get 42.0 in the end", "1", "1", "Clearly, the answer is 42")
    assert answered(*prose).majority, "they vote by what they say, not by how"
    assert not answered("42", "41", "41 is it").majority
    boxed = ("thus \\boxed{7} of 42", "I find \\boxed{7}, not 42", "42")
    assert answered(*boxed, kind="math_verify").votes == ["7", "7", "42"]
    assert stated_answer("<answer> x + 1 </answer> done") == "x + 1"
    assert number_in("no number") == "no number"
    first, second = [answered("1")] * 8 + [answered("42")] * 2, [answered("42")] * 10
    assert sign_test([each.share for each in first], [each.share for each in second]) == pytest.approx(2 * 0.5**8)
    assert sign_test([0.5, 1], [0.5, 1]) == 1
    assert metrics_of(second, first)["p_value"] == pytest.approx(2 * 0.5**8)
    assert "majority" not in metrics_of(second)


def test_where_all_are_right_the_interval_still_has_a_width() -> None:
    """Eight of eight; the figures are Wilson's, by hand: n / (n + z²)."""
    metrics = metrics_of([answered("42")] * 8)
    assert metrics["accuracy_high"] == 1
    assert metrics["accuracy_low"] == pytest.approx(8 / (8 + 1.959964**2), abs=1e-5)
    low, high = wilson_interval(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert share_interval([0.5] * 9) == wilson_interval(0.5, 9)
    assert share_interval([0.25, 0.5, 0.75] * 4) == bootstrap_interval([0.25, 0.5, 0.75] * 4)


def test_p_values_are_corrected_for_how_many_were_looked_at() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    values = {"a": {"accuracy": 1.0}, "b": {"p_value": 0.02}, "c": {"p_value": 0.03}}
    measured: dict[str, dict[int | None, dict[str, float]]] = {name: {None: each} for name, each in values.items()}
    corrected(measured)
    assert [measured[name][None]["p_value"] for name in ("b", "c")] == [0.04, 0.04]
