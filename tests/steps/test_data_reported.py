"""Inputs that went wrong in other tools, by their public reports: each is read right here, or refused in a sentence.

The names are those of the reports: the repository and the number of the issue or pull request.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import prepared, refusal

from steps.lm.checkpoint import load_tokenizer
from steps.lm.rows import read_jsonl
from steps.train.sft import labelled
from tests.steps.test_given_template import make_base

Lines = Callable[[Sequence[Any]], str]
TALK = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def jsonl(write: Callable[[str, str], Path]) -> Lines:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.mark.parametrize("packing", [False, True])
def test_trl_6668_rows_whose_answers_are_cut_off_teach_nothing_and_are_counted(
    bench: Any, pico: Any, jsonl: Lines, packing: bool
) -> None:
    """There a run over prompts longer than the limit reported a loss of 0.0 and finished, packed ones still do."""
    long = " ".join(["Think about it carefully before responding."] * 8)
    rows = [{"prompt": f"{long} What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(12)]
    rows += [{"prompt": f"{n}+{n}", "completion": f"{2 * n}"} for n in range(6)]
    data = bench.run("data.prepare", source=jsonl(rows), eval_fraction=0, near_dedup=None)["train"]
    settings = {"max_tokens": 40, "packing": packing, "max_steps": 1, "batch_size": 2, "adapter": {"kind": "lora"}}
    result = bench.attempt("train.sft", {"model": pico, "data": data}, **settings)
    assert result.status == "finished" and result.metrics["rows_without_answer"] == 12
    assert any("12 of 18 rows of `data` were left out: no answer to learn in them" in note for note in result.notes)
    all_long = bench.run("data.prepare", source=jsonl(rows[:12]), eval_fraction=0, near_dedup=None)["train"]
    result = bench.attempt("train.sft", {"model": pico, "data": all_long}, **settings)
    assert (
        result.status == "refused" and "no row of `data` has an answer to learn within max_tokens: 40" in result.message
    )


def test_llm_course_33_a_model_that_pads_with_its_end_learns_to_end(pico: Any, tmp_path: Path) -> None:
    """There whatever equals the padding token was masked, the end of every answer, too."""
    folder = make_base(pico.path, tmp_path / "base")
    (folder / "chat_template.jinja").write_text((pico.path / "chat_template.jinja").read_text())
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    ((ids, labels),) = labelled(TALK, tokenizer, (2,), "all")
    assert labels[-2:] == [2, -100] or labels[-1] == 2
    assert 2 in ids


def test_axolotl_325_names_of_assistants_in_sharegpt(bench: Any, jsonl: Lines) -> None:
    """There one row that said `bing` stopped everything, without its line."""
    rows = [
        {"conversations": [{"from": "human", "value": f"{name}?"}, {"from": name, "value": f"I am {name}."}]}
        for name in ("gpt", "chatgpt", "bing", "bard", "assistant")
    ]
    train, _ = prepared(bench, jsonl(rows), eval_fraction=0, near_dedup=None)
    assert len(train) == 5 and all(row["messages"][1]["role"] == "assistant" for row in train)
    odd = {"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]}
    assert "rows.jsonl line 2: message 2 has the role `narrator`" in refusal(
        bench, jsonl([rows[0], odd]), eval_fraction=0
    )


def test_llama_factory_2529_calls_of_functions_in_sharegpt(bench: Any, jsonl: Lines) -> None:
    """There `function_call` and `observation` were invalid role tags."""
    talk = [
        ("human", "Weather in Rome?"),
        ("function_call", '{"name": "get_weather", "arguments": {"city": "Rome"}}'),
        ("observation", "18 C"),
        ("gpt", "It is 18 C."),
    ]
    tools = json.dumps([{"name": "get_weather", "parameters": {}}])
    row = {"conversations": [{"from": who, "value": text} for who, text in talk], "tools": tools}
    ((found,), _) = prepared(bench, jsonl([row]), eval_fraction=0)
    roles = [message["role"] for message in found["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert found["messages"][1]["tool_calls"] == [{"name": "get_weather", "arguments": {"city": "Rome"}}]
    assert found["messages"][0]["tools"][0]["name"] == "get_weather"


def test_qwen3_1314_a_system_message_in_a_column_of_its_own(bench: Any, jsonl: Lines) -> None:
    """LLaMA-Factory's rows have it beside the messages; whoever reads these alone loses it."""
    row = {
        "conversations": [
            {"from": "human", "value": "Hi?"},
            {"from": "gpt", "value": "No.", "loss": False},
            {"from": "human", "value": "Hi!"},
            {"from": "gpt", "value": "Hi."},
        ],
        "system": "Be kind.",
    }
    ((found,), _) = prepared(bench, jsonl([row]), eval_fraction=0, system="Be brief.")
    assert found["messages"][0] == {"role": "system", "content": "Be kind."}
    assert [message.get("learn", True) for message in found["messages"]] == [True, True, False, True, True]
    result = bench.attempt("data.prepare", {}, source=jsonl([row]), eval_fraction=0)
    assert result.notes == ()


def test_llama_factory_2571_a_file_that_is_one_array_or_one_table(bench: Any, write: Callable[..., Path]) -> None:
    """Alpaca's data are one JSON array; pandas writes one object of columns, which has no rows."""
    rows = [{"instruction": f"Add {n}.", "input": "", "output": str(n)} for n in range(5)]
    train, _ = prepared(bench, str(write("rows.json", json.dumps(rows, indent=1))), eval_fraction=0, near_dedup=None)
    assert len(train) == 5
    columns = {"instruction": {"0": "Add."}, "output": {"0": "1"}}
    said = refusal(bench, str(write("columns.json", json.dumps(columns))), eval_fraction=0)
    assert "columns.json: a JSON object, where the file must be one array of objects" in said


def test_llama_factory_alpaca_history_is_said_before(bench: Any, jsonl: Lines) -> None:
    """Its rows keep earlier turns as pairs."""
    row = {"instruction": "And why?", "input": "", "output": "It is known.", "history": [["Is it so?", "Yes."]]}
    ((found,), _) = prepared(bench, jsonl([row]), eval_fraction=0)
    assert [message["content"] for message in found["messages"]] == ["Is it so?", "Yes.", "And why?", "It is known."]
    # Of another form it is something else, and named.
    result = bench.attempt("data.prepare", {}, source=jsonl([row | {"history": ["Is it so?"]}]), eval_fraction=0)
    assert result.notes == ("not used: `history` (1 rows)",)


def test_llama_factory_preferences_as_single_messages(bench: Any, jsonl: Lines) -> None:
    """Its preferences hold one message on each side, and the conversation in ShareGPT's column."""
    row = {
        "conversations": [{"from": "human", "value": "Is it so?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    data = bench.run("data.preferences", source=jsonl([row]), eval_fraction=0)["train"]
    (found,) = read_jsonl(data.rows_file)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (
        [{"role": "user", "content": "Is it so?"}],
        "Yes.",
        "No.",
    )


def test_unsloth_3444_new_tokens_are_in_the_merge(bench: Any, pico: Any, sums: Any, tmp_path: Path) -> None:
    """There the adapter knew the added tokens and the merged model did not."""
    folder = make_base(pico.path, tmp_path / "base")
    base = bench.run("model.source", uri=f"file://{folder}", template="llama3")[""]
    settings = {"max_steps": 30, "batch_size": 8, "learning_rate": 3e-3, "dtype": "float32"}
    adapter = bench.run("train.sft", {"model": base, "data": sums["train"]}, adapter={"kind": "lora"}, **settings)[""]
    merged = bench.run("merge.adapter", {"adapter": adapter, "base": base, "data": sums["eval"]})[""]
    report = bench.run(
        "evaluate.compare", {"reference": merged, "candidates": [base], "data": sums["eval"]}, names=("base",)
    )[""]
    assert report.facts.metrics["reference/stopped"] > 0.9 > report.facts.metrics["base/stopped"]


def test_open_instruct_190_a_tokenizer_with_one_more_token_than_the_base(bench: Any, pico: Any, tmp_path: Path) -> None:
    """There a padding token was added to the tokenizer alone, and the merge failed after the training."""
    folder = make_base(pico.path, tmp_path / "base")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["[MORE]"])
    tokenizer.save_pretrained(folder)
    result = bench.attempt("model.source", {}, uri=f"file://{folder}")
    assert result.status == "refused" and "'[MORE]' (1024) has none" in result.message
