"""Tools in rows are kept: described, called and answered, and rendered by templates that can."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_prepare import prepared, refusal

from steps.lm.chat import render
from steps.lm.checkpoint import load_tokenizer
from tests.steps.test_given_template import make_base

Row = Mapping[str, Any]
Lines = Callable[[Sequence[Row]], str]
TEMPLATE = Path(__file__).parent / "masks" / "qwen3-tools.jinja"
GIVEN = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
ASKED: list[Row] = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "18 C", "name": "get_weather"},
    {"role": "assistant", "content": "It is 18 C."},
]


@pytest.fixture
def jsonl(write: Callable[[str, str], Path]) -> Lines:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.fixture(scope="module")
def caller(bench: Any, pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose template renders tools."""
    folder = make_base(pico.path, tmp_path_factory.mktemp("base") / "base")
    return bench.run("model.source", uri=f"file://{folder}", template=str(TEMPLATE))[""]


def test_tools_calls_and_what_they_gave_are_kept_and_rendered(bench: Any, jsonl: Lines, caller: Any) -> None:
    ((row,), _) = prepared(bench, jsonl([{"tools": [WEATHER], "messages": ASKED}]), eval_fraction=0)
    text = render(load_tokenizer(caller.path), row["messages"])
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "<tool_response>\n18 C\n</tool_response>" in text
    result = bench.attempt(
        "data.prepare", {"model": caller}, source=jsonl([{"tools": [WEATHER], "messages": ASKED}]), eval_fraction=0
    )
    assert result.notes == ()


@pytest.mark.parametrize(
    "row",
    [
        {
            "tools": json.dumps([WEATHER]),
            "messages": [ASKED[0], {**ASKED[1], "tool_calls": json.dumps([CALL])}, *ASKED[2:]],
        },
        {
            "tools": [WEATHER],
            "messages": [
                ASKED[0],
                {
                    **ASKED[1],
                    "tool_calls": [{**CALL, "function": GIVEN}],
                },
                *ASKED[2:],
            ],
        },
        {
            "tools": [WEATHER],
            "messages": [
                ASKED[0],
                {
                    "role": "assistant",
                    "content": "",
                    "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                },
                {"role": "function", "content": "18 C", "name": "get_weather"},
                ASKED[3],
            ],
        },
    ],
    ids=["all as text", "arguments as text", "functions"],
)
def test_other_ways_to_write_a_call_are_the_same_row(bench: Any, jsonl: Lines, row: Row) -> None:
    plain = prepared(bench, jsonl([{"tools": [WEATHER], "messages": ASKED}]), eval_fraction=0)
    assert prepared(bench, jsonl([row]), eval_fraction=0) == plain


def test_parquet_fills_what_a_call_does_not_have(bench: Any, jsonl: Lines, tmp_path: Path) -> None:
    rows = [{"tools": [WEATHER], "messages": ASKED}, {"tools": None, "messages": [ASKED[0], ASKED[3]]}]
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), tmp_path / "rows.parquet")
    found, _ = prepared(bench, str(tmp_path / "rows.parquet"), eval_fraction=0)
    wanted = prepared(bench, jsonl(rows), eval_fraction=0)[0]
    assert [each["messages"] for each in found] == [each["messages"] for each in wanted]


def test_other_calls_are_other_rows(bench: Any, jsonl: Lines) -> None:
    other = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    rows = [{"messages": [ASKED[0], {**ASKED[1], "tool_calls": [call]}]} for call in (CALL, other)]
    assert len(prepared(bench, jsonl(rows), eval_fraction=0)[0]) == 2
    described = [{"messages": ASKED, "tools": [{**WEATHER, "strict": strict}]} for strict in (True, False)]
    assert len(prepared(bench, jsonl(described), eval_fraction=0, near_dedup=None)[0]) == 2


def test_a_template_that_cannot_render_them_is_said_with_the_row(bench: Any, jsonl: Lines, pico: Any) -> None:
    plain = {"messages": [ASKED[0], ASKED[3]]}
    rows = jsonl([plain, {"tools": [WEATHER], "messages": ASKED}])
    result = bench.attempt("data.prepare", {"model": pico}, source=rows, eval_fraction=0)
    assert result.status == "refused" and "rows.jsonl line 2" in result.message
    assert "does not render tools: `get_weather`" in result.message


def test_fine_tuning_learns_the_calls_and_rollouts_say_that_they_cannot_ask(
    bench: Any, jsonl: Lines, caller: Any
) -> None:
    rows = [
        {"tools": [WEATHER], "messages": [{**ASKED[0], "content": f"Weather in Rome on day {day}?"}, *ASKED[1:]]}
        for day in range(8)
    ]
    data = bench.run("data.prepare", {"model": caller}, source=jsonl(rows), eval_fraction=0, near_dedup=None)["train"]
    small = {"max_steps": 1, "batch_size": 4}
    tuned = bench.attempt("train.sft", {"model": caller, "data": data}, adapter={"kind": "lora"}, **small)
    assert tuned.status == "finished" and tuned.metrics["rows"] == 8, tuned.message
    asked = bench.attempt(
        "train.grpo", {"model": caller, "data": data}, rewards=[{"kind": "exact"}], group_size=4, max_steps=1
    )
    assert asked.status == "refused" and "rows of `data` have tools" in asked.message


@pytest.mark.parametrize("column", ["conversations", "conversation", "turns"])
def test_sharegpts_rows_are_read(bench: Any, jsonl: Lines, column: str) -> None:
    talk = [("system", "Be brief."), ("human", "Hi?"), ("gpt", "Hi."), ("human", "Bye?"), ("gpt", "Bye.")]
    row = {column: [{"from": speaker, "value": text} for speaker, text in talk]}
    columns = {"messages": column} if column == "turns" else {}
    ((found,), _) = prepared(bench, jsonl([row]), eval_fraction=0, columns=columns)
    assert [each["role"] for each in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [each["content"] for each in found["messages"]] == [text for _, text in talk]


def test_contents_in_parts_are_joined_and_pictures_refused(bench: Any, jsonl: Lines) -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}]
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": parts}]
    ((row,), _) = prepared(bench, jsonl([{"messages": messages}]), eval_fraction=0)
    assert row["messages"][1]["content"] == "One, two."
    picture = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, messages[1]]
    said = refusal(bench, jsonl([{"messages": messages}, {"messages": picture}]), eval_fraction=0)
    assert "line 2: message 1 has a part of type `image`; posttrain trains on text alone" in said


def test_a_list_that_asks_and_one_that_answers_are_one_conversation(bench: Any, jsonl: Lines) -> None:
    asked = [ASKED[0], {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "Rome."}]
    ((row,), _) = prepared(bench, jsonl([{"prompt": asked, "completion": [ASKED[3]]}]), eval_fraction=0)
    assert [each["content"] for each in row["messages"]] == ["Weather in Rome?", "Where?", "Rome.", "It is 18 C."]
    learned = [each.get("learn", True) for each in row["messages"] if each["role"] == "assistant"]
    assert learned == [False, True]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_stand_apart_are_put_before_the_answer(bench: Any, jsonl: Lines, key: str) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", key: "Two and two."}]
    ((row,), _) = prepared(bench, jsonl([{"messages": messages}]), eval_fraction=0)
    assert row["messages"][1]["content"] == "<think>\nTwo and two.\n</think>\n\n4"
