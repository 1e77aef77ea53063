"""What rows hold beside plain messages: masks, tools, what nobody reads, halves of characters, folders."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import prepared, refusal

from steps.artifacts import Dataset, Preferences
from steps.lm.rows import read_jsonl
from steps.sources import fingerprint, read_rows

Row = Mapping[str, Any]
Lines = Callable[[Sequence[Row]], str]


@pytest.fixture
def jsonl(write: Callable[[str, str], Path]) -> Lines:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def turns(*marks: Row) -> Row:
    """A conversation of as many pairs of turns as there are marks, which the assistant's turns carry."""
    messages: list[Row] = []
    for number, mark in enumerate(marks):
        messages += [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}.", **mark}]
    return {"messages": messages}


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"learn": False}, {"loss": 0, "weight": 0}],
)
def test_a_turn_that_says_so_in_any_common_format_is_not_learned(bench: Any, jsonl: Lines, mark: Row) -> None:
    ((row,), _) = prepared(bench, jsonl([turns(mark, {"weight": 1}, {"train": None})]), eval_fraction=0)
    learned = [message.get("learn", True) for message in row["messages"] if message["role"] == "assistant"]
    assert learned == [False, True, True]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ({"weight": 0.5}, "message 2 has weight: 0.5; it must be true or false (or 1 or 0)"),
        ({"loss": "no"}, "message 2 has loss: 'no'; it must be true or false"),
        ({"learn": True, "weight": 0}, "message 2 has learn: True and weight: 0, which say the opposite"),
    ],
)
def test_a_mask_that_is_none_or_that_disagrees_is_refused(bench: Any, jsonl: Lines, mark: Row, said: str) -> None:
    assert said in refusal(bench, jsonl([turns({}), turns(mark)]), eval_fraction=0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**turns({}), "tools": [{"type": "function"}]}, "`tools` must be a list of objects"),
        (turns({"tool_calls": [{"id": "1"}]}), "message 2: a tool call must have a `function` with a `name`"),
        (turns({"function_call": {"arguments": "{}"}}), "message 2: a tool call must have a `function` with a `name`"),
    ],
    ids=["tools", "tool_calls", "function_call"],
)
def test_tools_that_are_none_are_refused(bench: Any, jsonl: Lines, row: Row, said: str) -> None:
    assert f"line 2: {said}" in refusal(bench, jsonl([turns({}), row]), eval_fraction=0)


def test_empty_columns_of_tools_say_nothing(bench: Any, jsonl: Lines) -> None:
    row = {**turns({"tool_calls": None, "tool_call_id": ""}), "tools": "[]", "functions": []}
    result = bench.attempt("data.prepare", None, source=jsonl([row]), eval_fraction=0)
    assert (result.status, result.notes) == ("finished", ())
    row |= {"tools": "hammer, saw", "functions": ["def f(): ..."]}
    result = bench.attempt("data.prepare", None, source=jsonl([row]), eval_fraction=0)
    assert result.notes == ("not used: `functions` (1 rows), `tools` (1 rows)",)


def test_columns_and_keys_that_nobody_reads_are_named(bench: Any, jsonl: Lines) -> None:
    rows = [
        {**turns({"name": "Bo"}), "id": 7, "level": 3, "task": {"is": 1}, "system": None},
        {**turns({}, {}), "level": 4, "system": "Be kind.", "doc": "a"},
    ]
    result = bench.attempt("data.prepare", None, source=jsonl(rows), eval_fraction=0, group="doc")
    assert result.status == "refused", "a row without the column that is named"
    rows[0] |= {"doc": ""}
    result = bench.attempt("data.prepare", None, source=jsonl(rows), eval_fraction=0, group="doc")
    assert result.notes == ("not used: `level` (2 rows), `messages.name` (1 rows)",)
    plain = [{"q": "1?", "a": "1", "input": "x"}, {"q": "2?", "a": "2", "input": ""}]
    columns = {"user": "q", "assistant": "a"}
    result = bench.attempt("data.prepare", None, source=jsonl(plain), eval_fraction=0, columns=columns)
    assert result.notes == ("not used: `input` (1 rows)",)
    known = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    assert bench.attempt("data.prepare", None, source=jsonl(known), eval_fraction=0).notes == ()


def test_half_a_surrogate_pair_is_mended_and_named(bench: Any, write: Callable[[str, str], Path]) -> None:
    lines = [
        r'{"prompt": "whole \ud83d\ude00", "completion": "so"}',
        r'{"prompt": "cut", "completion": "in half \ud83d"}',
        r'{"prompt": "other half", "completion": "\ude00 here", "\ud800": 1}',
    ]
    source = str(write("halves.jsonl", "\n".join(lines)))
    result = bench.attempt("data.prepare", None, source=source, eval_fraction=0)
    assert result.notes == (
        f"2 rows held half a surrogate pair, which is no character; it became U+FFFD: {source} line 2, {source} line 3",
        "not used: `\ufffd` (1 rows)",
    )
    train = Dataset.of(bench.store.open(result.outputs["train"]))
    texts = {message["content"] for row in read_jsonl(train.rows_file) for message in row["messages"]}
    assert texts == {"whole \U0001f600", "so", "cut", "in half \ufffd", "other half", "\ufffd here"}
    pair = r'{"prompt": "a", "chosen": "b \udc00", "rejected": "c"}'
    source = str(write("pair.jsonl", pair.replace("}", ', "score_chosen": 5}')))
    result = bench.attempt("data.preferences", None, source=source, eval_fraction=0)
    assert [note.partition(":")[0] for note in result.notes] == [
        "1 rows held half a surrogate pair, which is no character; it became U+FFFD",
        "not used",
    ]
    made = Preferences.of(bench.store.open(result.outputs["train"]))
    assert [row["chosen"] for row in read_jsonl(made.rows_file)] == ["b \ufffd"]


def test_a_folder_stands_for_the_data_files_in_it(tmp_path: Path, write: Callable[[str, str], Path]) -> None:
    for name in ("data/b.jsonl", "data/more/a.jsonl", "data/.hidden/c.jsonl", "data/.d.jsonl", "data/README.md"):
        write(name, json.dumps({"name": name}))
    root = write("data/b.jsonl", json.dumps({"name": "data/b.jsonl"})).parent.parent
    found = [row.values["name"] for row in read_rows("data", tmp_path, root)]
    assert found == ["data/b.jsonl", "data/more/a.jsonl"]
    before = fingerprint("data", root)
    write("data/README.md", "other")
    assert fingerprint("data", root) == before
    write("data/more/a.jsonl", "{}")
    assert fingerprint("data", root) != before


def test_a_folder_that_is_called_like_a_pattern_is_none(tmp_path: Path) -> None:
    root = tmp_path / "pro[ject]*"
    for name in ("plain.jsonl", "da?ta/[1].jsonl", "da?ta/2.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"name": name}))

    def names(uri: str) -> list[str]:
        return [row.values["name"] for row in read_rows(uri, tmp_path, root)]

    assert names("*.jsonl") == names(f"{root}/pl*.jsonl") == ["plain.jsonl"]
    assert names("da?ta/*.jsonl") == ["da?ta/2.jsonl", "da?ta/[1].jsonl"]
    assert names("da?ta/[1].jsonl") == ["da?ta/[1].jsonl"]
    assert names("d*/2.jsonl") == ["da?ta/2.jsonl"]
