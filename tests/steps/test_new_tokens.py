"""Control tokens that a template brought are learned, by adapters too, and survive the merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steps.artifacts import Dataset
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.rows import read_jsonl
from tests.steps.test_given_template import make_base

EMBEDDING = "model.embed_tokens.weight"
KINDS: list[tuple[dict[str, Any], bool]] = [
    ({"kind": "lora"}, True),
    ({"kind": "lora"}, False),
    ({"kind": "dora"}, True),
    ({"kind": "qlora"}, True),
    ({"kind": "oft"}, False),
    ({"kind": "full"}, True),
]


def untie(folder: Path) -> None:
    """Give the model an output embedding of its own."""
    config = json.loads((folder / "config.json").read_text())
    model = load_model(folder, "bfloat16")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = load_model(folder, "bfloat16")
    apart.load_state_dict(tensors)
    with torch.no_grad():
        apart.get_output_embeddings().weight.mul_(1.01)  # pyright: ignore
    apart.save_pretrained(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def given(bench: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Both kinds of base with Llama 3's template, which is new to them."""
    small = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=64, pretrain_steps=20)[""]
    folder = make_base(small.path, tmp_path_factory.mktemp("base") / "base")
    if not request.param:
        untie(folder)
    return bench.run("model.source", uri=f"file://{folder}", template="llama3")[""]


@pytest.mark.parametrize("method", [method for method, _ in KINDS], ids=lambda method: method["kind"])
def test_a_training_learns_them_and_the_merge_keeps_them(
    bench: Any, given: Any, sums: dict[str, Dataset], method: dict[str, Any]
) -> None:
    if (method, given.facts.tied_embeddings) not in KINDS:
        return
    settings = {"max_steps": 60, "batch_size": 16, "learning_rate": 3e-3, "dtype": "float32", "adapter": method}
    result = bench.attempt("train.sft", {"model": given, "data": sums["train"]}, **settings)
    assert result.status == "finished", result.message
    trained = bench.run("train.sft", {"model": given, "data": sums["train"]}, **settings)[""]
    if method["kind"] != "full":
        assert "beside the adapter the embeddings of 3 control tokens were learned" in result.notes
        trained = bench.run("merge.adapter", {"adapter": trained, "base": given, "data": sums["eval"]})[""]
    assert trained.facts.new_tokens == ()
    before, after = (load_file(each.path / "model.safetensors") for each in (given, trained))
    names = [EMBEDDING] if given.facts.tied_embeddings else [EMBEDDING, "lm_head.weight"]
    new = list(given.facts.new_tokens)
    for name in names:
        assert not torch.equal(after[name][new].float(), before[name][new].float()), name
    if method["kind"] not in ("full", "oft"):
        old = [token for token in range(given.facts.vocabulary) if token not in new]
        assert torch.equal(after[EMBEDDING][old].float(), before[EMBEDDING][old].float())
    answers = bench.run(
        "data.sample",
        {"model": trained, "data": sums["eval"]},
        samples=1,
        temperature=0,
        max_new_tokens=12,
        rewards=[{"kind": "exact"}],
    )[""]
    cut = [row["samples"][0]["truncated"] for row in read_jsonl(answers.rows_file)]
    assert sum(cut) < 0.1 * len(cut)


@pytest.mark.parametrize("kind", ["oft", "pissa"])
def test_what_cannot_learn_them_says_what_can(bench: Any, given: Any, sums: dict[str, Dataset], kind: str) -> None:
    if not given.facts.tied_embeddings:
        return
    result = bench.attempt("train.sft", {"model": given, "data": sums["train"]}, max_steps=2, adapter={"kind": kind})
    assert result.status == "refused" and "take `lora`, or `full`" in result.message


def test_tokens_that_the_vocabulary_has_but_nobody_trained_are_found(bench: Any, pico: Any, tmp_path: Path) -> None:
    """As in Gemma 3's base models: the tokens of turns are there, and like the unused ones."""
    folder = make_base(pico.path, tmp_path / "base")
    tokenizer, model = load_tokenizer(folder), load_model(folder, "bfloat16")
    names = ["<start_of_turn>", "<end_of_turn>", *(f"<other{number}>" for number in range(8))]
    tokenizer.add_tokens(names, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight: Any = model.get_input_embeddings().weight
        noise = torch.randn(len(names), weight.shape[1], generator=torch.Generator().manual_seed(1))
        weight[-len(names) :] = 0.05 + 0.005 * noise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = bench.attempt("model.source", {}, uri=f"file://{folder}", template="gemma")
    assert any("<start_of_turn>, <end_of_turn>: in the vocabulary, but never trained" in note for note in result.notes)
    found = bench.run("model.source", uri=f"file://{folder}", template="gemma")[""]
    ids: Any = tokenizer.convert_tokens_to_ids(names[:2])
    assert found.facts.new_tokens == tuple(ids)
    # Once they are stops of the model's own, it has learned them.
    settings = json.loads((folder / "generation_config.json").read_text())
    stop = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, stop]}))
    assert bench.run("model.source", uri=f"file://{folder}", template="gemma")[""].facts.new_tokens == ()


def test_the_template_and_its_end_survive_every_format_and_the_package(
    bench: Any, pico: Any, sums: dict[str, Dataset], tmp_path: Path
) -> None:
    folder = make_base(pico.path, tmp_path / "base")
    base = bench.run("model.source", uri=f"file://{folder}", template="llama3")[""]
    settings = {"max_steps": 40, "batch_size": 16, "learning_rate": 3e-3, "dtype": "float32"}
    adapter = bench.run("train.sft", {"model": base, "data": sums["train"]}, adapter={"kind": "lora"}, **settings)[""]
    merged = bench.run("merge.adapter", {"adapter": adapter, "base": base, "data": sums["eval"]})[""]
    gguf = bench.run("quantize.gguf", {"model": merged}, scheme="Q8_0")[""]
    gptq = bench.run(
        "quantize.gptq", {"model": merged, "calibration": sums["train"]}, bits=8, group_size=64, calibration_rows=8
    )[""]
    inputs = {"reference": merged, "candidates": [gguf, gptq], "data": sums["eval"]}
    report = bench.run("evaluate.compare", inputs, names=("gguf", "gptq"), new_tokens=12)[""]
    for name in ("reference", "gguf", "gptq"):
        assert report.facts.metrics[f"{name}/stopped"] > 0.9
    bundle = bench.run(
        "package.bundle",
        {"members": [merged, gguf, gptq], "report": report},
        names=("merged", "gguf", "gptq"),
        title="x",
    )[""]
    templates = {(bundle.path / file).read_text() for file in bundle.manifest.files if file.endswith(".jinja")}
    assert templates == {(base.path / "chat_template.jinja").read_text()}
    for each in (merged, gguf, gptq):
        assert each.facts.template_sha256 == base.facts.template_sha256
        assert each.facts.stop_token_ids == base.facts.stop_token_ids
