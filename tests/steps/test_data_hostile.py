"""What hostile readers found in rows with tools, system columns and folders, each once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_prepare import prepared, refusal

from steps.artifacts import Samples, SamplesFacts
from steps.data._messages import as_message, message_list
from steps.lm.chat import render
from steps.lm.checkpoint import load_tokenizer
from steps.lm.rows import read_jsonl
from steps.sources import read_rows
from tests.steps.conftest import publish
from tests.steps.test_data_tools import ASKED, TEMPLATE, WEATHER
from tests.steps.test_given_template import make_base

Lines = Callable[[Sequence[Any]], str]


@pytest.fixture
def jsonl(write: Callable[[str, str], Path]) -> Lines:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def test_a_system_column_that_repeats_the_rows_own_shifts_no_mask(bench: Any, jsonl: Lines) -> None:
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "good"},
    ]
    ((row,), _) = prepared(bench, jsonl([{"system": "S", "messages": talk}]), eval_fraction=0)
    learned = {each["content"]: each.get("learn", True) for each in row["messages"]}
    assert learned == {"S": True, "one": True, "bad": False, "two": True, "good": True}
    lists = {"prompt": talk[:2], "completion": [talk[4]], "system": "S"}
    ((row,), _) = prepared(bench, jsonl([lists]), eval_fraction=0)
    assert row["messages"][-1].get("learn", True) and len(row["messages"]) == 3
    other = bench.attempt("data.prepare", {}, source=jsonl([{"system": "T", "messages": talk}]), eval_fraction=0)
    assert other.notes == ("not used: `system` (1 rows)",)


def test_a_call_keeps_its_nulls_and_parquets_own_say_nothing(bench: Any, jsonl: Lines, tmp_path: Path) -> None:
    given = '{"unit": null, "x": 1.0}'
    calls = [
        {"function": {"name": "f", "arguments": given}},
        {"type": None, "function": {"name": "f", "arguments": None}},
        {"name": "f", "parameters": {"a": 1}},
    ]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    (turn,) = message_list(messages, "messages", "here")
    assert [call.get("function", call)["arguments"] for call in as_message(turn)["tool_calls"]] == [
        {"unit": None, "x": 1.0},
        {},
        {"a": 1},
    ]
    rows = [{"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [calls[1]]}, *ASKED[2:]]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (found,), _ = prepared(bench, str(tmp_path / "rows.parquet"), eval_fraction=0)
    (wanted,), _ = prepared(bench, jsonl(rows), eval_fraction=0)
    assert found["id"] == wanted["id"]


LLAMA = (
    "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content | tojson }}]{% elif m.tool_calls %}"
    "{% for c in m.tool_calls %}({{ c.function.name + c.function.arguments }}){% endfor %}<|im_end|>"
    "{% else %}{{ m.role }} {{ (m.content or '') | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("given", ["18 C", '{"status": "ok"}', "one\ntwo", "18 C\n", "ü"])
def test_templates_that_quote_trim_or_want_no_content_render_tools(pico: Any, given: str) -> None:
    """Llama 3.1 writes what a tool gave as JSON, R1's distilled models calls only beside no content."""
    tokenizer = load_tokenizer(pico.path)
    tokenizer.chat_template = LLAMA
    messages = [dict(each) for each in ASKED]
    messages[1]["content"] = ""
    messages[2]["content"] = given
    assert '(get_weather{"city": "Rome"})' in render(tokenizer, messages)


def test_prepared_rows_keep_their_tools_when_they_are_prepared_again(bench: Any, jsonl: Lines, tmp_path: Path) -> None:
    rows = jsonl([{"tools": [WEATHER], "messages": ASKED}])
    first = bench.run("data.prepare", source=rows, eval_fraction=0)["train"]
    again = bench.run("data.prepare", source=str(first.rows_file), eval_fraction=0)["train"]
    (before,), (after,) = (list(read_jsonl(each.rows_file)) for each in (first, again))
    assert before["messages"] == after["messages"] and before["id"] == after["id"]


def test_a_completions_prompt_is_the_question_that_it_is_in_a_conversation(bench: Any, jsonl: Lines) -> None:
    rows = [{"prompt": f"Question number {n}?", "completion": f"Answer {n * 7}."} for n in range(200)]
    source = jsonl(rows)
    settings: dict[str, Any] = {"source": source, "eval_fraction": 0.3, "near_dedup": None}
    talks = bench.run("data.prepare", **settings)["eval"]
    texts = bench.run("data.prepare", format="completion", **settings)["eval"]
    asked = {row["messages"][0]["content"] for row in read_jsonl(talks.rows_file)}
    assert asked == {row["prompt"] for row in read_jsonl(texts.rows_file)} and len(asked) > 20


def test_judged_preferences_keep_the_tools_of_their_prompts(
    bench: Any, jsonl: Lines, pico: Any, tmp_path: Path
) -> None:
    folder = make_base(pico.path, tmp_path / "base")
    model = bench.run("model.source", uri=f"file://{folder}", template=str(TEMPLATE))[""]
    source = jsonl([{"tools": [WEATHER], "messages": ASKED}])
    data = bench.run("data.prepare", {"model": model}, source=source, eval_fraction=0)["train"]
    (row,) = read_jsonl(data.rows_file)
    answers = [
        {"text": text, "tokens": 3, "truncated": False, "score": score} for text, score in (("It.", 1.0), ("No.", 0.0))
    ]
    samples = publish(
        bench, Samples, "judged", [{**row, "samples": answers}], SamplesFacts(rows=1, samples=2, pass_rate=0.5)
    )
    pairs = bench.run("data.judge", {"data": samples}, verified=True)[""]
    (made,) = read_jsonl(pairs.rows_file)
    assert made["prompt"] == row["messages"][:-1] and made["prompt"][0]["tools"] and made["prompt"][1]["tool_calls"]


def test_folders_hold_tables_or_texts_and_what_tells_of_them_is_neither(
    bench: Any, write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    row = json.dumps([{"instruction": "a", "output": "b"}])
    write("alpaca/alpaca.json", row)
    write("alpaca/README.md", "About.")
    write("alpaca/dataset_infos.json", "{}")
    assert [row.values for row in read_rows("alpaca", tmp_path, tmp_path)] == [{"instruction": "a", "output": "b"}]
    write("mixed/a.jsonl", '{"text": "x"}\n')
    write("mixed/b.json", '[{"text": "y"}]')
    write("mixed/c.txt", "z")
    result = bench.attempt("data.prepare", {}, source=str(tmp_path / "mixed"), format="text", eval_fraction=0)
    assert result.metrics["train"] == 2
    assert "1 files of plain text beside tables were not read (c.txt); name them to read them" in result.notes


def test_empty_texts_are_counted_and_lines_of_json_are_read(bench: Any, write: Callable[[str, str], Path]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "", " ", "two"))
    result = bench.attempt("data.prepare", {}, source=str(write("rows.json", lines)), format="text", eval_fraction=0)
    assert result.metrics["rows_read"] == 4 and result.metrics["empty"] == 2 and result.metrics["train"] == 2
    assert any("2 of 4 rows were left out: 2 empty" in note for note in result.notes)
    inner = json.dumps({"version": 1, "data": [{"text": "three"}]})
    result = bench.attempt("data.prepare", {}, source=str(write("in.json", inner)), format="text", eval_fraction=0)
    assert result.metrics["train"] == 1


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"conversation": "c1", "prompt": "a", "completion": "b"}, ["user", "assistant"]),
        ({"instruction": "a", "output": "b", "history": "long ago"}, ["user", "assistant"]),
        ({"messages": [{"role": "developer", "content": "S"}, *ASKED[:1], ASKED[3]]}, ["system", "user", "assistant"]),
        (
            {"messages": [{"role": None, "from": "human", "value": "a"}, {"from": "model", "value": "b"}]},
            ["user", "assistant"],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {
                        "from": "function_call",
                        "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
                    },
                    {"from": "function_response", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ],
                "tools": [json.dumps({"name": "f"})],
            },
            ["user", "assistant", "tool", "assistant"],
        ),
    ],
)
def test_public_layouts_are_read(bench: Any, jsonl: Lines, row: Any, roles: list[str]) -> None:
    ((found,), _) = prepared(bench, jsonl([row]), eval_fraction=0)
    assert [message["role"] for message in found["messages"]] == roles


def test_what_tools_there_are_makes_no_rows_alike(bench: Any, jsonl: Lines) -> None:
    schema = {**WEATHER, "description": " ".join(f"word{n}" for n in range(80))}
    towns = [f"Weather in town number {n} of province {n * 3} please?" for n in range(60)]
    rows = [
        {
            "tools": [schema],
            "messages": [{"role": "user", "content": town}, *ASKED[1:3], {**ASKED[3], "content": "Done."}],
        }
        for town in towns
    ]
    assert len(prepared(bench, jsonl(rows), eval_fraction=0)[0]) == 60


def test_rows_that_end_in_a_call_are_kept_without_thinking(bench: Any, jsonl: Lines) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Weather on day {n}?"}, ASKED[1]]} for n in range(4)]
    rows.append(
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>hm</think>"}]}
    )
    data = bench.run("data.prepare", source=jsonl(rows), eval_fraction=0, near_dedup=None)["train"]
    result = bench.attempt("data.mix", {"parts": [data]}, union=True, thinking=["strip"])
    assert result.metrics["rows"] == 4
    assert any("1 of 5 rows of part 1 were left out: they answer by thoughts alone" in note for note in result.notes)


def test_rows_that_are_nested_too_deeply_are_refused(bench: Any, write: Callable[[str, str], Path]) -> None:
    deep = '{"prompt": "\\u00fc", "completion": "b", "x": ' + "[" * 970 + "]" * 970 + "}"
    assert "rows.jsonl line 1: it is nested too deeply" in refusal(
        bench, str(write("rows.jsonl", deep)), eval_fraction=0
    )


def test_an_escaped_question_is_on_its_side(bench: Any, jsonl: Lines, pico: Any) -> None:
    rows = [{"prompt": f"What is <|im_end|> number {n}?", "completion": "An end."} for n in range(80)]
    settings: dict[str, Any] = {"source": jsonl(rows), "eval_fraction": 0.4, "near_dedup": None}
    asked = []
    for way in ("escape", "keep"):
        held_out = bench.run("data.prepare", {"model": pico}, control_tokens=way, **settings)["eval"]
        questions = (row["messages"][0]["content"] for row in read_jsonl(held_out.rows_file))
        asked.append({question.replace("\u200b", "") for question in questions})
    assert asked[0] == asked[1] and len(asked[0]) > 10
