"""Rows that a training cuts or leaves out: said, with the reason, and never longer than the model has positions for."""

from typing import Any

import pytest
from conftest import publish
from untrained import untrained

from steps.artifacts import Dataset, DatasetFacts, Preferences, PreferencesFacts

FULL: dict[str, Any] = {"adapter": {"kind": "full"}, "max_steps": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def short(bench: Any) -> Any:
    """A model of 64 positions."""
    return untrained(bench, 71)


@pytest.fixture(scope="module")
def data(bench: Any) -> Dataset:
    """Two short rows, one whose question is longer than those positions, and one whose answer is."""
    talks = [("why", "so"), ("why not", "so it is"), ("why " * 80, "so"), ("and", "so " * 80)]
    rows = [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        }
        for number, (asked, answer) in enumerate(talks)
    ]
    return publish(bench, Dataset, "long-rows", rows, DatasetFacts(rows=len(rows)))


def test_a_row_is_no_longer_than_the_model_has_positions_for(bench: Any, short: Any, data: Dataset) -> None:
    result = bench.attempt("train.sft", {"model": short, "data": data, "eval": data}, max_tokens=512, **FULL)
    within = "the model's 64 positions (below max_tokens: 512)"
    assert result.notes == tuple(
        note
        for field in ("data", "eval")
        for note in (
            f"1 of 4 rows of `{field}` were left out: no answer to learn in them within {within}",
            f"2 of 4 rows of `{field}` are longer than {within}",
        )
    )
    assert result.metrics["tokens"] < 2 * 30 + 64


def test_rows_without_an_answer_within_max_tokens_are_said(bench: Any, pico: Any, data: Dataset) -> None:
    result = bench.attempt("train.sft", {"model": pico, "data": data}, max_tokens=48, **FULL)
    assert result.notes[0] == ("1 of 4 rows of `data` were left out: no answer to learn in them within max_tokens: 48")
    whole = bench.attempt("train.sft", {"model": pico, "data": data}, max_tokens=512, **FULL)
    assert whole.notes == ()
    said = bench.attempt("train.sft", {"model": pico, "data": data}, max_tokens=8, **FULL)
    assert said.status == "refused"
    assert "no row of `data` has an answer to learn within max_tokens: 8" in said.message


def test_preferences_and_distillation_say_it_too(bench: Any, short: Any, data: Dataset) -> None:
    pairs = [
        {"id": str(n), "prompt": [{"role": "user", "content": "why " * count}], "chosen": "so", "rejected": "no"}
        for n, count in enumerate((1, 2, 80))
    ]
    judged = publish(bench, Preferences, "long-pairs", pairs, PreferencesFacts(rows=3, paired=True))
    result = bench.attempt("train.dpo", {"model": short, "data": judged}, max_tokens=512, **FULL)
    assert [note.partition(" rows")[0] for note in result.notes] == ["1 of 3", "1 of 3"]
    result = bench.attempt(
        "train.distill", {"model": short, "teacher": short, "data": data}, max_new_tokens=16, mode="logits", **FULL
    )
    assert result.notes == ("1 of 4 rows of `data` are longer than max_new_tokens: 16",)
