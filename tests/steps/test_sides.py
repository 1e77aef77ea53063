"""Preferences and conversations of one question stand on one side; rows of two data sets are told apart."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts, Samples, SamplesFacts
from steps.lm.rows import read_jsonl
from tests.conftest import Bench
from tests.steps.conftest import publish, sort_row

SPLIT: dict[str, Any] = {"eval_fraction": 0.2, "test_fraction": 0.2, "seed": 3}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(row: Mapping[str, Any]) -> str:
    return next(message["content"] for message in row.get("messages") or row["prompt"] if message["role"] == "user")


def questions(side: Any) -> set[str]:
    return {opened(row) for row in read_jsonl(side.rows_file)}


def test_preferences_hold_out_the_questions_that_conversations_do(bench: Bench, tmp_path: Path) -> None:
    """Also those that go on over several turns, the first answer of which is what another row prefers."""
    asked = [f"What is {number}?" for number in range(300)]
    talks = [{"question": each, "answer": "So."} for each in asked]
    turns = [{"role": "assistant", "content": "Well."}, {"role": "user", "content": "And?"}]
    ranked = [
        {"prompt": [{"role": "user", "content": each}, *more], "chosen": "So.", "rejected": "No."}
        for each in asked
        for more in ([], turns)
    ]
    data = bench.run("data.prepare", source=write(tmp_path / "a.jsonl", talks), near_dedup=None, **SPLIT)
    pairs = bench.run("data.preferences", source=write(tmp_path / "b.jsonl", ranked), **SPLIT)
    for side in ("train", "eval", "test"):
        assert questions(data[side]) == questions(pairs[side])
        assert pairs[side].facts.rows == 2 * len(questions(pairs[side]))
    with pytest.raises(ValueError, match="make their sum less than 1"):
        bench.run("data.preferences", source="b.jsonl", eval_fraction=0.5, test_fraction=0.5)


def samples(bench: Bench, name: str, *answers: tuple[str, float, bool]) -> Samples:
    given = [{"text": text, "score": score, "tokens": 3, "truncated": cut} for text, score, cut in answers]
    row = {**sort_row((3, 1, 2)), "samples": given}
    return publish(bench, Samples, name, [row], SamplesFacts(rows=1, samples=len(given)))


def test_a_union_keeps_other_answers_to_a_question_and_every_row_has_an_id_of_its_own(bench: Bench) -> None:
    first = publish(bench, Dataset, "first", [sort_row((3, 1, 2)), sort_row((5, 4, 1))], DatasetFacts(rows=2))
    tries = samples(bench, "two ways", ("1 2 3", 1.0, False), ("123", 1.0, False))
    found = bench.run("data.reject", {"samples": tries}, keep="all")[""]
    for union, rows in ((True, 3), (False, 4)):
        mixed = list(read_jsonl(bench.run("data.mix", {"parts": [first, found]}, union=union)[""].rows_file))
        assert len(mixed) == len({row["id"] for row in mixed}) == rows
        assert {row["messages"][-1]["content"] for row in mixed} == {"1 2 3", "123", "1 4 5"}


def test_two_tasks_of_one_id_are_both_answered(bench: Bench, sorting_model: Any) -> None:
    twice = [sort_row((3, 1, 2)), {**sort_row((9, 8, 7)), "id": "3 1 2"}]
    data = publish(bench, Dataset, "one id", twice, DatasetFacts(rows=2))
    made = bench.run("data.sample", {"model": sorting_model, "data": data}, samples=1, temperature=0, max_new_tokens=8)
    assert [opened(row) for row in read_jsonl(made[""].rows_file)] == ["sort 3 1 2", "sort 9 8 7"]
    first, second = (row["samples"][0]["text"] for row in read_jsonl(made[""].rows_file))
    assert first != second


def test_answers_that_were_cut_off_or_empty_are_neither_chosen_nor_rejected(bench: Bench) -> None:
    cut = samples(bench, "cut", ("1 2", 0.9, True), ("", 0.8, False), ("1 2 3", 1.0, False), ("3 2 1", 0.0, False))
    (pair,) = read_jsonl(bench.run("data.judge", {"data": cut}, verified=True, pairs="all_pairs")[""].rows_file)
    assert (pair["chosen"], pair["rejected"]) == ("1 2 3", "3 2 1")
    kept = bench.run("data.reject", {"samples": cut}, threshold=None, keep="all")[""]
    assert [row["messages"][-1]["content"] for row in read_jsonl(kept.rows_file)] == ["1 2 3", "3 2 1"]
    assert kept.facts.statistics["empty"] == 1
