"""data.prepare: one form, no duplicates, a split that never moves, and refusals that name the row."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from steps.data._conversations import Conversation
from steps.data._hashing import uniform
from steps.data._sides import sides_by_id
from steps.lm.checkpoint import load_tokenizer
from steps.lm.rows import read_jsonl

Write = Callable[[str, str], Path]
Row = Mapping[str, Any]

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron")


def sentence(number: int, length: int = 24) -> str:
    """A text that shares next to no word triple with that of another number."""
    return " ".join(f"{WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)]}{number}" for place in range(length))


def pairs(count: int) -> list[Row]:
    return [{"question": f"What is {sentence(number, 4)}?", "answer": sentence(number)} for number in range(count)]


@pytest.fixture
def jsonl(write: Write) -> Callable[[Sequence[Row]], str]:
    return lambda rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def prepared(bench: Any, source: str | list[str], **config: Any) -> tuple[list[Row], list[Row]]:
    """Run the step; return the rows of both sides."""
    inputs = {"model": config.pop("model")} if "model" in config else None
    sides = bench.run("data.prepare", inputs, source=source, **config)
    held_out: list[Row] = list(read_jsonl(sides["eval"].rows_file)) if "eval" in sides else []
    return list(read_jsonl(sides["train"].rows_file)), held_out


def refusal(bench: Any, source: str | list[str], **config: Any) -> str:
    inputs = {"model": config.pop("model")} if "model" in config else None
    result = bench.attempt("data.prepare", inputs, source=source, **config)
    assert result.status == "refused", result
    assert "\n" not in result.message
    return result.message


def test_known_layouts_become_the_same_messages(bench: Any, write: Write) -> None:
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    layouts: list[tuple[Row, dict[str, Any]]] = [
        ({"messages": messages}, {}),
        ({"messages": [*messages, {"role": "user", "content": "thanks"}]}, {}),
        ({"prompt": "one?", "completion": "1"}, {}),
        ({"question": "one?", "answer": "1", "id": 7}, {}),
        ({"instruction": "one?", "output": "1", "input": ""}, {}),
        ({"q": "one?", "a": "1"}, {"columns": {"user": "q", "assistant": "a"}}),
        ({"turns": messages}, {"columns": {"messages": "turns"}}),
    ]
    for number, (row, config) in enumerate(layouts):
        source = str(write(f"{number}.jsonl", json.dumps(row)))
        train, _ = prepared(bench, source, eval_fraction=0, **config)
        assert [one["messages"] for one in train] == [messages], row
        assert train[0]["source"] == source


def test_system_messages_and_inputs_are_kept(bench: Any, jsonl: Any) -> None:
    source = jsonl([
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say it.", "output": "it", "system": "Own."},
    ])  # fmt: skip
    train, _ = prepared(bench, source, eval_fraction=0, system="Shared.")
    texts = sorted([message["content"] for message in row["messages"]] for row in train)
    assert texts == [["Own.", "Say it.", "it"], ["Shared.", "Add.\n\n1 2", "3"]]


def test_the_split_never_moves_a_row(bench: Any, write: Write) -> None:
    def lines(rows: Sequence[Row]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    few = prepared(bench, str(write("few.jsonl", lines(pairs(200)[::-1]))), eval_fraction=0.2)
    many = prepared(bench, str(write("many.jsonl", lines(pairs(400)))), eval_fraction=0.2)
    few_ids, many_ids = ([{row["id"] for row in side} for side in sides] for sides in (few, many))
    assert few_ids[0] < many_ids[0] and few_ids[1] < many_ids[1]
    assert 20 <= len(few_ids[1]) <= 60 and not few_ids[0] & few_ids[1]
    assert [row["id"] for row in many[0]] == sorted(many_ids[0])
    other_seed = prepared(bench, str(write("few.jsonl", lines(pairs(200)))), eval_fraction=0.2, seed=1)
    assert {row["id"] for row in other_seed[1]} != few_ids[1]


def test_limit_is_a_stable_sample(bench: Any, jsonl: Any) -> None:
    source = jsonl(pairs(200))
    whole, ten, twenty = (
        {row["id"] for side in prepared(bench, source, eval_fraction=0.3, limit=limit) for row in side}
        for limit in (None, 10, 20)
    )
    assert len(ten) == 10 and len(twenty) == 20 and ten < twenty < whole


def test_lengths_are_those_of_the_template(bench: Any, pico: Any, jsonl: Any) -> None:
    rows = pairs(60)
    source = jsonl([*rows, {"question": "long?", "answer": " ".join(sentence(number) for number in range(60, 75))}])
    sides = bench.run("data.prepare", {"model": pico}, source=source, eval_fraction=0.2, max_tokens=600)
    train = sides["train"]
    assert train.facts.template_sha256 == pico.facts.template_sha256
    assert train.manifest.parents["model"].digest == pico.digest
    assert train.facts.statistics["too_long"] == 1
    tokenizer = load_tokenizer(pico.path)
    lengths = sorted(
        len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
        for row in read_jsonl(train.rows_file)
    )
    assert train.facts.statistics["tokens_max"] == lengths[-1]
    assert train.facts.statistics["tokens_total"] == sum(lengths)
    assert bench.last.metrics["train"] == len(lengths)
    assert bench.last.metrics["tokens_p95"] > 0
    plots = bench.root / "work" / train.manifest.key[:16] / "plots"
    assert (plots / "tokens_per_row.png").stat().st_size > 5000


def test_the_order_of_the_source_does_not_show(bench: Any, jsonl: Any) -> None:
    forth, back = (
        bench.run("data.prepare", source=jsonl(rows), seed=len(rows)) for rows in (pairs(50), pairs(50)[::-1])
    )
    assert forth["train"].manifest.files == back["train"].manifest.files
    assert forth["eval"].manifest.files == back["eval"].manifest.files


def test_several_sources_are_read_in_order(bench: Any, write: Write) -> None:
    first = write("a.jsonl", json.dumps({"question": "one?", "answer": "1"}))
    second = write("b.csv", "question,answer\nONE?,1\ntwo?,2\n")
    train, _ = prepared(bench, [str(first), str(second)], eval_fraction=0)
    assert {row["messages"][0]["content"]: row["source"] for row in train} == {"one?": str(first), "two?": str(second)}


def test_the_built_in_documentation(bench: Any, pico: Any) -> None:
    sides = bench.run("data.prepare", {"model": pico}, source="python-stdlib-docs", limit=600, max_tokens=300, seed=17)
    assert sides["train"].facts.rows + sides["eval"].facts.rows == 600
    assert sides["train"].facts.statistics["rows_read"] > 3000
    assert sides["eval"].facts.rows >= 10


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
GOOD: Row = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"messages": [USER]}, "rows.jsonl line 2: the row has no assistant turn"),
        ({"messages": []}, "rows.jsonl line 2: the row has no assistant turn"),
        ({"messages": [ASSISTANT]}, "rows.jsonl line 2: the assistant speaks before any user"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "message 1 has the role `usr`; did you mean `user`?"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2, the assistant turn, is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2 must be text, not int"),
        ({"messages": "hi"}, "`messages` must be a list of objects"),
        ({"question": "x", "anwser": "y"}, "no known layout in the columns `question`, `anwser`"),
        ({"question": "x", "answer": ""}, "column `answer`, the assistant turn, is empty"),
    ],
)
def test_a_bad_row_is_named(bench: Any, jsonl: Any, bad: Row, message: str) -> None:
    assert message in refusal(bench, jsonl([GOOD, bad]))


def test_bad_input_is_refused_with_the_file(bench: Any, write: Write, tmp_path: Path) -> None:
    assert "rows.jsonl line 2: not valid JSON" in refusal(bench, str(write("rows.jsonl", f"{json.dumps(GOOD)}\n{{")))
    assert "empty.jsonl: no rows are left of the 0 read" in refusal(bench, str(write("empty.jsonl", "")))
    assert "no such file" in refusal(bench, str(tmp_path / "absent.jsonl"))
    good = str(write("good.jsonl", json.dumps(GOOD)))
    assert "raise `eval_fraction`" in refusal(bench, good, eval_fraction=1e-9)
    assert "`max_tokens` needs a `model`" in refusal(bench, good, max_tokens=10)
    columns = {"user": "questoin", "assistant": "answer"}
    source = str(write("renamed.jsonl", '{"question": "x", "answer": "y"}'))
    assert "no column `questoin`; did you mean `question`?" in refusal(bench, source, columns=columns)


def test_all_rows_too_long_is_said(bench: Any, pico: Any, jsonl: Any) -> None:
    message = refusal(bench, jsonl(pairs(3)), model=pico, max_tokens=5)
    assert re.search(r"no rows are left of the 3 read; all 3 are longer than max_tokens: 5", message)


def test_answers_to_one_question_are_on_one_side(bench: Any, jsonl: Callable[[Sequence[Row]], str]) -> None:
    """Four answers each: none of the questions is both learned and asked in the exam."""
    rows = [
        {"question": f"What is {sentence(number, 4)}?", "answer": f"{try_} {sentence(number + 400 * try_)}"}
        for number in range(100)
        for try_ in range(4)
    ]
    train, held_out = prepared(bench, jsonl(rows), near_dedup=None, eval_fraction=0.3)
    assert len(train) + len(held_out) == 400
    asked = [{row["messages"][0]["content"] for row in side} for side in (train, held_out)]
    assert not asked[0] & asked[1]
    assert 15 < len(asked[1]) < 45


def test_what_a_column_puts_together_is_on_one_side(bench: Any, jsonl: Callable[[Sequence[Row]], str]) -> None:
    """Also through others: one question stands in two documents, so that both are on its side."""
    rows = [{**row, "doc": index // 10} for index, row in enumerate(pairs(100))]
    bridge = {"question": rows[0]["question"], "answer": "something else", "doc": 9}
    train, held_out = prepared(bench, jsonl([*rows, bridge]), near_dedup=None, eval_fraction=0.4, group="doc")
    side_of = {row["messages"][0]["content"]: number for number, side in enumerate((train, held_out)) for row in side}
    sides = [{side_of[row["question"]] for row in rows[start : start + 10]} for start in range(0, 100, 10)]
    assert all(len(found) == 1 for found in sides)
    assert sides[0] == sides[9]
    assert held_out and train
    assert "dok" in refusal(bench, jsonl(rows), group="dok")


def asked(count: int, answer: str = "") -> list[Conversation]:
    return [Conversation((("user", f"{n}?"), ("assistant", answer or str(n))), "test", "test") for n in range(count)]


def test_sides_depend_on_the_questions_alone() -> None:
    rows = asked(50)
    alone = {row.id: "eval" if uniform(3, "side", row.opening) < 0.3 else "train" for row in rows}
    assert sides_by_id(rows, 3, 0.3, 0) == sides_by_id(list(reversed(rows)), 3, 0.3, 0) == alone


def test_a_question_stays_on_its_side_when_it_is_answered_otherwise_or_once_more() -> None:
    """So a file of chains and one of plain answers, split alike, leak nothing into each other's exam."""
    short, long = asked(300), asked(200, "<think>well</think>so")
    first, second = sides_by_id(short, 0, 0.2, 0.2), sides_by_id([*short, *long], 0, 0.2, 0.2)
    other = sides_by_id(long, 0, 0.2, 0.2)
    assert [first[row.id] for row in short] == [second[row.id] for row in short]
    assert [first[row.id] for row in short[:200]] == [other[row.id] for row in long]


def test_a_test_set_takes_nothing_from_the_evaluation_set(bench: Any, jsonl: Callable[[Sequence[Row]], str]) -> None:
    source = jsonl(pairs(200))
    two, three = (
        bench.run("data.prepare", source=source, eval_fraction=0.2, test_fraction=share) for share in (0, 0.3)
    )
    ids = {name: {row["id"] for row in read_jsonl(side.rows_file)} for name, side in three.items()}
    assert set(two) == {"train", "eval"}
    assert ids["eval"] == {row["id"] for row in read_jsonl(two["eval"].rows_file)}
    assert ids["train"] | ids["test"] == {row["id"] for row in read_jsonl(two["train"].rows_file)}
    assert not ids["train"] & ids["test"] and 40 < len(ids["test"]) < 80
    with pytest.raises(ValueError, match="make their sum less than 1"):
        refusal(bench, source, eval_fraction=0.5, test_fraction=0.5)
    assert "raise `test_fraction`" in refusal(bench, source, eval_fraction=0.5, test_fraction=1e-9)


def test_a_question_that_differs_in_case_or_space_or_system_message_is_the_same() -> None:
    plain = Conversation((("user", "What is it?"), ("assistant", "This.")), "test", "test")
    other = Conversation((("system", "Be brief."), ("user", " what  IS it?"), ("assistant", "That.")), "test", "test")
    assert plain.opening == other.opening
    assert plain.opening != asked(1)[0].opening


@pytest.mark.parametrize("kind", ["data.prepare", "data.preferences"])
@pytest.mark.parametrize(
    "said",
    [["Summarise the document."], ["Hi", "hello", "Hey there"]],
    ids=["a document in the system message", "a person in the system message"],
)
def test_rows_that_ask_alike_are_told_apart_by_their_system_messages(
    bench: Any, jsonl: Callable[[Sequence[Row]], str], kind: str, said: list[str]
) -> None:
    def row(number: int) -> Row:
        asked = {"role": "user", "content": said[number % len(said)]}
        prompt = [{"role": "system", "content": f"Of {sentence(number)}"}, asked]
        if kind == "data.preferences":
            return {"prompt": prompt, "chosen": f"Yes {number}.", "rejected": "No."}
        return {"messages": [*prompt, {"role": "assistant", "content": f"Yes {number}."}]}

    # One more has no system message: the one for such rows does not tell it from itself elsewhere.
    lone = row(400)
    del next(iter(lone.values()))[0]
    source = jsonl([*map(row, range(400)), lone])
    settings = {"eval_fraction": 0.2, **({"near_dedup": None} if kind == "data.prepare" else {})}
    if len(said) == 1:
        result = bench.attempt(kind, None, source=source, system="Be kind.", **settings)
        assert "401 rows have 1 different questions" in result.message
        assert "write `question: system+user`" in result.message
    settings["question"] = "system+user"
    whole = bench.run(kind, source=source, system="Be kind.", **settings)
    assert 40 < whole["eval"].facts.rows < 120
    # A part of them falls alike.
    few = bench.run(kind, source=source, limit=120, **settings)
    sides = {name: {answer(each) for each in read_jsonl(side.rows_file)} for name, side in whole.items()}
    for name, side in few.items():
        assert {answer(each) for each in read_jsonl(side.rows_file)} <= sides[name]


def answer(row: Row) -> str:
    return row["chosen"] if "chosen" in row else row["messages"][-1]["content"]


def test_two_ways_to_answer_one_question_do_not_make_it_two() -> None:
    """Nor does a date or a number in the system message, of which there are more than questions."""
    rows = [
        Conversation((("system", f"{how} It is day {n}."), *row.messages[:1], ("assistant", how)), "test", "test")
        for n, row in enumerate(asked(100))
        for how in ("Think first.", "Be brief.")
    ]
    found, plain = sides_by_id(rows, 3, 0.3, 0), sides_by_id(asked(100), 3, 0.3, 0)
    assert [found[row.id] for row in rows] == [plain[row.id] for row in asked(100) for _ in range(2)]


def test_rows_without_a_group_are_no_group(bench: Any, jsonl: Callable[[Sequence[Row]], str]) -> None:
    rows = [{**row, "author": None if index % 2 else f"author {index}"} for index, row in enumerate(pairs(200))]
    for seed in range(3):
        _, held_out = prepared(bench, jsonl(rows), near_dedup=None, eval_fraction=0.3, group="author", seed=seed)
        assert 40 < len(held_out) < 80


def test_many_rows_of_one_question_are_sorted_out_in_no_time() -> None:
    rows = [Conversation((("user", "Why?"), ("assistant", str(n))), "test", "test", group="g") for n in range(20_000)]
    began = time.process_time()
    assert len(set(sides_by_id(rows, 0, 0.3, 0.3).values())) == 1
    assert time.process_time() - began < 5
