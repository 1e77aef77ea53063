"""Plain text: documents are packed and learned whole, completions after their prompts; no template is needed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Documents
from steps.lm.checkpoint import load_tokenizer
from steps.lm.plain_text import PlainTexts, document_end
from steps.lm.rows import read_jsonl
from tests.steps.test_given_template import make_base

Write = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def base(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base model without a template."""
    small = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=64, pretrain_steps=30)[""]
    folder = make_base(small.path, tmp_path_factory.mktemp("base") / "base")
    return bench.run("model.source", uri=f"file://{folder}")[""]


def letter(number: int) -> str:
    """A document of one manner: whoever reads some of them can go on with others."""
    names = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
    one, other = names[number % 8], names[number // 8 % 8]
    return f"Dear {one}, the {number} parcels for {other} have come. They are in the hall. Yours, {other}. " * 3


@pytest.fixture(scope="module")
def letters(bench: Any, base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Documents]:
    """Letters to learn from and letters held out."""
    folder = tmp_path_factory.mktemp("letters")
    for number in range(120):
        (folder / f"{number}.txt").write_text(letter(number))
    return bench.run(
        "data.prepare", {"model": base}, source=str(folder), format="text", eval_fraction=0.2, near_dedup=None
    )


def test_files_columns_and_rows_become_documents(bench: Any, write: Write) -> None:
    rows = "".join(json.dumps({"body": letter(number), "by": number % 3}) + "\n" for number in range(30))
    found = bench.run(
        "data.prepare",
        source=str(write("rows.jsonl", rows)),
        format="text",
        columns={"text": "body"},
        group="by",
        eval_fraction=0.4,
        near_dedup=None,
    )
    texts = {side: [row["text"] for row in read_jsonl(found[side].rows_file)] for side in ("train", "eval")}
    assert sorted(texts["train"] + texts["eval"]) == sorted(letter(number) for number in range(30))
    assert found["train"].kind == "Documents" and found["train"].facts.layout == "text"
    groups = [{int(text.split()[3]) % 3 for text in side} for side in texts.values()]
    assert not groups[0] & groups[1]


def test_a_document_is_learned_whole_and_ends(base: Any) -> None:
    tokenizer = load_tokenizer(base.path)
    plain = PlainTexts(tokenizer, base.facts.stop_token_ids, 16)
    pieces = plain.learned({"prompt": "", "text": letter(5)}, whole=True)
    assert all(len(ids) <= 16 and ids == labels for ids, labels in pieces) and len(pieces) > 3
    whole = [token for ids, _ in pieces for token in ids]
    assert tokenizer.decode(whole) == letter(5) + "<|endoftext|>"
    ((ids, labels),) = plain.learned({"prompt": "2+2=", "text": "4"}, whole=False)
    assert tokenizer.decode([label for label in labels if label != -100]) == "4<|endoftext|>"
    assert tokenizer.decode(ids) == "2+2=4<|endoftext|>"


def test_documents_end_as_in_pretraining_where_a_template_has_an_end_of_its_own(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(document_end(tokenizer, pico.facts.stop_token_ids) or 0) == "<|endoftext|>"


def test_continued_pretraining_lowers_the_perplexity_of_what_is_held_out(
    bench: Any, base: Any, letters: dict[str, Documents]
) -> None:
    settings = {"max_tokens": 48, "batch_size": 8, "max_steps": 60, "learning_rate": 3e-3, "dtype": "float32"}
    inputs = {"model": base, "data": letters["train"], "eval": letters["eval"]}
    result = bench.attempt("train.sft", inputs, adapter={"kind": "lora"}, eval_steps=20, **settings)
    assert result.status == "finished", result.message
    # Every token but the first of each sequence is learned; sequences are nearly full.
    assert result.metrics["answer_tokens"] == result.metrics["tokens"]
    assert result.metrics["sequences"] * 48 < 1.2 * result.metrics["tokens"]
    adapter = bench.run("train.sft", inputs, adapter={"kind": "lora"}, eval_steps=20, **settings)[""]
    merged = bench.run("merge.adapter", {"adapter": adapter, "base": base, "data": letters["eval"]})[""]
    assert merged.facts.template_sha256 is None and merged.facts.stop_token_ids == base.facts.stop_token_ids
    report = bench.run(
        "evaluate.compare", {"reference": merged, "candidates": [base], "data": letters["eval"]}, names=("base",)
    )[""]
    content = json.loads((report.path / "summary.json").read_text())
    (low, high), (before, _) = (content["intervals"][name]["perplexity"] for name in ("reference", "base"))
    assert low < content["candidates"]["reference"]["perplexity"] < high < before
    assert content["generated_rows"] == 0 and "answer_score" not in report.facts.metrics


def test_completions_are_learned_after_their_prompts_and_answered(bench: Any, base: Any, write: Write) -> None:
    towns = {"Ada": "Rome", "Bo": "Oslo", "Cy": "Bonn", "Di": "Lyon"}
    pairs = [(f"{number}. {name} is of", f" {town}.") for number in range(20) for name, town in towns.items()]
    rows = "".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in pairs)
    sides = bench.run(
        "data.prepare",
        {"model": base},
        source=str(write("towns.jsonl", rows)),
        format="completion",
        eval_fraction=0.2,
        near_dedup=None,
    )
    settings = {"batch_size": 16, "max_steps": 150, "learning_rate": 3e-3, "dtype": "float32"}
    tuned = bench.run("train.sft", {"model": base, "data": sides["train"]}, adapter={"kind": "full"}, **settings)[""]
    report = bench.run(
        "evaluate.compare",
        {"reference": tuned, "candidates": [base], "data": sides["eval"]},
        names=("base",),
        score="exact",
        new_tokens=8,
    )[""]
    metrics = report.facts.metrics
    assert metrics["reference/answer_score"] > 0.5 > metrics["base/answer_score"]
    answers = [row["answer"] for row in read_jsonl(report.rows_file) if row["answer"] is not None]
    # The tuned one, measured first, ends by itself.
    assert {answer.strip(" .") for answer in answers[: len(answers) // 2]} <= {*towns.values()}


def test_a_gguf_is_made_of_a_model_without_a_template(bench: Any, base: Any, letters: dict[str, Documents]) -> None:
    gguf = bench.run("quantize.gguf", {"model": base, "calibration": letters["train"]}, scheme="Q8_0")[""]
    assert gguf.facts.template_sha256 is None
    inputs = {"reference": base, "candidates": [gguf], "data": letters["eval"]}
    report = bench.run("evaluate.compare", inputs, names=("gguf",))[""]
    assert report.facts.metrics["gguf/kl"] < 0.05


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"columns": {"user": "q"}}, "columns: format: text has no `user`; it has text"),
        ({"system": "Be kind."}, "format: text has no system message"),
    ],
)
def test_settings_of_conversations_are_refused(bench: Any, write: Write, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        bench.attempt("data.prepare", {}, source=str(write("a.txt", "x")), format="text", **config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": 3}', "rows.jsonl line 1: column `text` must be text, not int"),
        ('{"text": " "}', "rows.jsonl: no rows are left of the 1 read"),
        ('{"texts": "x"}', "rows.jsonl line 1: there is no column `text`; did you mean `texts`?"),
    ],
)
def test_what_is_no_document_is_refused(bench: Any, write: Write, text: str, said: str) -> None:
    result = bench.attempt("data.prepare", {}, source=str(write("rows.jsonl", text)), format="text")
    assert result.status == "refused" and said in result.message


def test_a_text_that_spells_a_control_token_is_refused_escaped_or_kept(bench: Any, pico: Any, write: Write) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"The end mark {n}?"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(("It is <|im_end|> and more.", "None."))
    ]
    source = str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    settings = {"source": source, "eval_fraction": 0}
    result = bench.attempt("data.prepare", {"model": pico}, **settings)
    assert result.status == "refused"
    assert "rows.jsonl line 1: it spells the control token <|im_end|>" in result.message
    assert "control_tokens: escape" in result.message
    for way, content in (("escape", "It is <\u200b|im_end|> and more."), ("keep", "It is <|im_end|> and more.")):
        result = bench.attempt("data.prepare", {"model": pico}, control_tokens=way, **settings)
        assert any("1 rows spell a control token" in note and "line 1" in note for note in result.notes)
        data = bench.run("data.prepare", {"model": pico}, control_tokens=way, **settings)["train"]
        assert content in [row["messages"][1]["content"] for row in read_jsonl(data.rows_file)]
        trained = bench.attempt("train.sft", {"model": pico, "data": data}, adapter={"kind": "lora"}, max_steps=1)
        said = any("in 1 of 2 rows of `data` an answer spells a stop token" in note for note in trained.notes)
        assert said is (way == "keep")
