"""Duplicates: what counts as the same, what does not, and that what is left out is said."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import prepared

from steps.data._conversations import Conversation
from steps.data._duplicates import bands, template_words, without_near, word_triples
from steps.lm.rows import read_jsonl

Row = Mapping[str, Any]
Lines = Callable[[Sequence[Row]], str]

INSTRUCTION = """You read short customer notes and sort them into one of three groups. Answer with the one word praise
when the writer is content, with the one word complaint when the writer is unhappy, and with the one word question when
the writer asks for something. Do not add anything else, and do not explain. Here is the note:"""


def sentence(number: int, length: int = 24) -> str:
    """A text that shares no word with that of another number."""
    return " ".join(f"w{number}-{place}" for place in range(length))


def pairs(count: int) -> list[Row]:
    return [{"question": f"What is {sentence(number, 4)}?", "answer": sentence(number)} for number in range(count)]


@pytest.fixture
def jsonl(write: Callable[[str, str], Path]) -> Lines:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def test_duplicates_go_and_the_first_stays(bench: Any, jsonl: Lines) -> None:
    rows = pairs(40)
    exact = dict(rows[0])
    near = {**rows[1], "answer": rows[1]["answer"] + " indeed"}
    source = jsonl([*rows, exact, near])
    sides = bench.run("data.prepare", source=source, eval_fraction=0.2)
    statistics = sides["train"].facts.statistics
    assert statistics["rows_read"] == 42
    assert statistics["exact_duplicates"] == 1
    assert statistics["near_duplicates"] == 1
    kept = [row for side in sides.values() for row in read_jsonl(side.rows_file)]
    assert {row["messages"][1]["content"] for row in kept} == {row["answer"] for row in rows}
    kept_near = bench.run("data.prepare", source=source, eval_fraction=0.2, near_dedup=None)
    assert sum(side.facts.rows for side in kept_near.values()) == 41


def test_near_duplicates_at_the_threshold_are_compared() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        count = bands(threshold)
        missed = (1 - threshold ** (128 // count)) ** count
        assert missed <= 0.01 and (count == 1 or (1 - threshold ** (256 // count)) ** (count // 2) > 0.01)
    assert word_triples(["a", "b", "c", "d"]) == ["a b c", "b c d"]
    assert word_triples(["a", "b"]) == ["a b"]


@pytest.mark.parametrize("near", [None, 0.8])
def test_of_duplicates_the_one_with_a_task_stays(bench: Any, jsonl: Lines, near: float | None) -> None:
    bare = pairs(3)
    tasks = [{**row, "answer": row["answer"] + (" so" if near else ""), "task": {"is": 7}} for row in bare]
    train, _ = prepared(bench, jsonl([*bare, *tasks]), near_dedup=near, eval_fraction=0)
    assert [row.get("task") for row in train] == [{"is": 7}] * 3


def labelled(count: int) -> list[Row]:
    labels = ("praise", "complaint", "question")
    return [{"question": f"{INSTRUCTION} {sentence(n, 6)}. Answer now.", "answer": labels[n % 3]} for n in range(count)]


def test_one_instruction_over_many_short_texts_makes_no_duplicates(bench: Any, jsonl: Lines) -> None:
    """Nor do two such instructions in one file, nor another label; the same text with the same label does."""
    polite = "Is this short note a polite one ? Say praise for yes, and complaint for no."
    other = [{**row, "question": row["question"].replace(INSTRUCTION, polite)} for row in labelled(30)]
    twin = {**labelled(1)[0], "answer": "complaint"}
    same = {**labelled(1)[0], "question": labelled(1)[0]["question"].upper()}
    train, _ = prepared(bench, jsonl([*labelled(150), *other, twin, same]), eval_fraction=0)
    assert len(train) == 181
    assert same["question"] not in {row["messages"][0]["content"] for row in train}


def test_words_that_many_texts_begin_or_end_with_are_a_templates() -> None:
    texts = [f"Say it : {sentence(n, 3)} . Now".split() for n in range(12)]
    assert template_words(texts) == [(3, 6)] * 12
    lone = sentence(99, 4).split()
    assert template_words([*texts, lone])[-1] == (0, 4)
    assert template_words(texts[:9]) == [(0, 8)] * 9, "nine may be copies of one text"
    assert template_words([["a", "b"]] * 12) == [(2, 2)] * 12
    assert template_words([[], *texts])[0] == (0, 0)
    # Of a thousand rows, twenty with a common beginning are too few.
    many = [sentence(n, 5).split() for n in range(2000)]
    assert template_words([*many, *texts])[-1] == (0, 8)


def test_copies_of_a_long_text_are_found_though_they_begin_alike() -> None:
    def row(number: int, answer: str = "") -> Conversation:
        return Conversation(
            (("user", f"{sentence(1, 60)} {number}"), ("assistant", answer or sentence(2, 40))), "s", f"{number}"
        )

    kept, dropped = without_near([row(number) for number in range(8)], 0.8)
    assert [each.where for each in kept] == ["0"]
    assert {each.like.where for each in dropped} == {"0"}
    assert len(without_near([row(0), row(1, sentence(3, 40))], 0.8)[0]) == 2, "another answer"


def test_only_what_is_the_same_to_the_letter_is_an_exact_duplicate(bench: Any, jsonl: Lines) -> None:
    rows = [{"question": "Is it  Polish?", "answer": "Yes"}, {"question": "is it polish?", "answer": "Yes"}]
    sides = bench.run("data.prepare", source=jsonl([*rows, rows[0]]), eval_fraction=0, near_dedup=None)
    assert sides["train"].facts.statistics["exact_duplicates"] == 1
    assert sides["train"].facts.rows == 2
    pair = {"prompt": "Is it  Polish?", "chosen": "Yes", "rejected": "No"}
    spaced = {**pair, "prompt": "Is it Polish?"}
    source = jsonl([pair, spaced, pair])
    assert bench.run("data.preferences", source=source, eval_fraction=0)["train"].facts.rows == 2
    kept = bench.run("data.preferences", source=source, eval_fraction=0, exact_dedup=False)["train"]
    assert len({row["id"] for row in read_jsonl(kept.rows_file)}) == kept.facts.rows == 3


def test_rows_that_are_repeated_on_purpose_are_kept_on_one_side(bench: Any, jsonl: Lines) -> None:
    rows = [row for row in pairs(20) for _ in range(5)]
    sides = prepared(bench, jsonl(rows), eval_fraction=0.3, near_dedup=None, exact_dedup=False)
    assert sum(map(len, sides)) == 100
    assert len({row["id"] for side in sides for row in side}) == 100
    train, held_out = ({row["messages"][0]["content"] for row in side} for side in sides)
    assert held_out and not train & held_out


def test_what_is_left_out_is_said_with_examples_where_it_is_much(bench: Any, jsonl: Lines, pico: Any) -> None:
    near = [{**row, "answer": row["answer"] + " indeed"} for row in pairs(8)]
    long = {"question": "Much?", "answer": sentence(3, 400)}
    source = jsonl([*pairs(20), *near, pairs(1)[0], long])
    result = bench.attempt("data.prepare", {"model": pico}, source=source, eval_fraction=0, max_tokens=700)
    assert result.notes == (
        "10 of 30 rows were left out: 1 exact duplicates; 8 near duplicates (`near_dedup: null` keeps them), such as "
        f"{source} line 21 (like {source} line 1), {source} line 22 (like {source} line 2), {source} line 23 (like "
        f"{source} line 3); 1 longer than max_tokens: 700",
    )
    clean = bench.attempt("data.prepare", None, source=jsonl(pairs(20)), eval_fraction=0)
    assert clean.notes == ()
