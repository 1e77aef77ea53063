"""Data files as nobody should write them: read or refused in one sentence, and no row is gone without being counted.

150 files here, 2,000 at night (`make test-recipes`). Another seed, `POSTTRAIN_FUZZ_SEED=5`, makes others.
"""

import csv
import datetime
import decimal
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

SEED = int(os.environ.get("POSTTRAIN_FUZZ_SEED", "1"))
WORDS = "harbour ginger falcon engine copper saddle velvet stone apple candle".split()  # noqa: SIM905
ODD: list[Any] = [
    None,
    "",
    " ",
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [None],
    [[]],
    {"role": "user"},
    [{"role": "user"}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["x"]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": "["}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 3}}]},
    ],
    [{"from": "human", "value": "a"}, {"from": 3, "value": "b"}],
    [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b", "weight": []}],
    "\x00",
    "\u2028line\u2029",
    "\ud83d",
    "😀" * 50,
    "x" * 100_000,
    10**30,
    "<|im_end|>",
    "[{'role': 'user'}]",
    '[{"role": "user", "content": "a"}]',
]


PIECES = [b"\n", b"\r\n", b"\x00", b"\xff", b'"', b"\xef\xbb\xbf", b"[" * 3000]


def text(chance: random.Random) -> str:
    """Some words."""
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))


def sound_row(chance: random.Random) -> dict[str, Any]:
    """A row of some layout."""
    asked, said = text(chance), text(chance)
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return chance.choice(
        [
            {"messages": talk},
            {"prompt": asked, "completion": said},
            {"instruction": asked, "input": text(chance), "output": said},
            {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]},
            {"messages": talk, "tools": [{"name": "look"}], "id": chance.randint(0, 9)},
        ]
    )


def odd_row(chance: random.Random) -> dict[str, Any]:
    """A row in which something is as it should not be."""
    row = dict(sound_row(chance))
    name = chance.choice([*row, "extra", "task", "system", "tools", "messages", ""])
    row[name] = chance.choice(ODD)
    if chance.random() < 0.3 and isinstance(row.get("messages"), list) and row["messages"]:
        messages = [dict(each) if isinstance(each, dict) else each for each in row["messages"]]
        if isinstance(messages[-1], dict):
            key = chance.choice(["role", "content", "weight", "tool_calls", "name", "learn"])
            messages[-1][key] = chance.choice(ODD)
        row["messages"] = messages
    return row


def rows_of(chance: random.Random) -> list[dict[str, Any]]:
    """Rows of one layout or of several, most of them sound."""
    kind = sound_row(chance)
    rows = []
    for _ in range(chance.randint(1, 12)):
        row = sound_row(chance)
        while chance.random() < 0.8 and set(row) != set(kind):
            row = sound_row(chance)
        rows.append(odd_row(chance) if chance.random() < 0.06 else row)
    return rows


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    for _ in range(chance.choice([0, 0, 0, 1, 1, 3])):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(6):
            case 0:
                content = content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
            case 1:
                content = content[:at]
            case 2:
                content = content[:at] + content[max(0, at - 40) : at] + content[at:]
            case 3:
                content = content[:at] + chance.choice(
                    [b"\n", b"\r\n", b"\x00", b"\xff", b'"', b"\xef\xbb\xbf", b"[" * 3000]
                )
            case 4:
                content = content.replace(b"\n", chance.choice([b"\r\n", b"\n\n", b"\r"]))
            case _:
                content = chance.choice([b"\xef\xbb\xbf", b"", b"\n"]) + content
    return content


def write_file(folder: Path, chance: random.Random) -> Path:
    """Write one data file; some are damaged."""
    rows = rows_of(chance)
    ending = chance.choice([".jsonl", ".jsonl", ".csv", ".parquet"])
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif ending == ".csv":
        stream = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(stream, names, lineterminator=chance.choice(["\n", "\r\n"]))
        writer.writeheader()
        flat = [{key: each if isinstance(each, str) else json.dumps(each) for key, each in row.items()} for row in rows]
        writer.writerows(flat)
        content = stream.getvalue().encode("utf-8", "surrogatepass")
    else:
        content = parquet_bytes(rows, chance)
    path.write_bytes(damaged(content, chance))
    return path


def parquet_bytes(rows: list[dict[str, Any]], chance: random.Random) -> bytes:
    """The rows as Parquet, with a column of a type that JSON does not have."""
    column = chance.choice(
        [
            datetime.date(2020, 1, 1),
            datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            datetime.timedelta(days=1),
            decimal.Decimal("1.5"),
            b"\xff\x00",
            None,
        ]
    )
    name = chance.choice(["when", "id", "task", "prompt", "messages"])
    extra = {name: column} if chance.random() < 0.4 else {}
    try:
        table = pa.Table.from_pylist([{**row, **extra} for row in rows])
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        table = pa.Table.from_pylist([{"prompt": "a", "completion": "b", **extra}])
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def count(path: Path) -> int:
    """How many rows a sound file has, by other readers than ours."""
    if path.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    if path.suffix == ".parquet":
        return parquet.read_metadata(path).num_rows
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return sum(1 for _ in csv.DictReader(stream))


def check(bench: Any, path: Path, model: Any) -> str:
    """Run the step; return how it ended."""
    inputs = {"model": model} if path.suffix == ".jsonl" else {}
    result = bench.attempt("data.prepare", inputs, source=str(path), eval_fraction=0)
    label = f"{result.status}: {result.message}"
    assert result.status in ("finished", "refused"), label
    if result.status == "refused":
        assert "\n" not in result.message and len(result.message) < 700, label
        assert path.name in result.message, label
    else:
        found = result.metrics
        assert found["rows_read"] == count(path), label
        left_out = found["exact_duplicates"] + found["near_duplicates"] + found["too_long"]
        assert found["train"] == found["rows_read"] - left_out, label
        if left_out:
            assert any("rows were left out" in note for note in result.notes), label
    return result.status


def check_many(bench: Any, folder: Path, model: Any, seeds: range) -> None:
    ends: list[str] = []
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        path = write_file(place, random.Random(seed))
        try:
            ends.append(check(bench, path, model))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {path}: {error}") from error
    # Neither all sound nor all refused: the files are neither harmless nor hopeless.
    assert 0.1 < ends.count("finished") / len(ends) < 0.9


@pytest.fixture(scope="module")
def model(bench: Any) -> Any:
    return bench.run("model.pico", hidden=32, layers=1, vocabulary=320, context=64, pretrain_steps=0)[""]


def test_150_files_are_read_or_refused_in_one_sentence(bench: Any, model: Any, tmp_path: Path) -> None:
    check_many(bench, tmp_path, model, range(SEED * 10_000, SEED * 10_000 + 150))


@pytest.mark.recipes
def test_2000_files_are_read_or_refused_in_one_sentence(bench: Any, model: Any, tmp_path: Path) -> None:
    check_many(bench, tmp_path, model, range(SEED * 10_000, SEED * 10_000 + 2_000))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("deep.jsonl", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "line 1: not valid JSON"),
        ("long.jsonl", b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
        ("twice.csv", b"prompt,prompt\na,b\n", "line 1: two columns are called `prompt`"),
        ("none.csv", b"", "no rows are left of the 0 read"),
        ("none.jsonl", b"", "no rows are left of the 0 read"),
    ],
)
def test_what_a_fuzzer_found(bench: Any, write: Callable[..., Path], name: str, content: bytes, said: str) -> None:
    path = write(name, "")
    path.write_bytes(content)
    result = bench.attempt("data.prepare", {}, source=str(path), eval_fraction=0)
    assert result.status == "refused" and said in result.message and name in result.message
