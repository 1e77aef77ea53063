"""model.source opens what it took: what is damaged, missing or another's is refused at the door, in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steps.artifacts import Dataset
from steps.lm.checkpoint import load_tokenizer, model_facts
from tests.steps.test_given_template import make_base

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def checkpoint(pico: Any, tmp_path: Path) -> Path:
    """A checkpoint of a user's own."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(pico.path, folder, ignore=shutil.ignore_patterns("artifact.json"))
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def refusal(bench: Any, folder: Path) -> str:
    """Return why it is refused."""
    result = bench.attempt("model.source", {}, uri=f"file://{folder}")
    assert result.status == "refused", result
    assert "\n" not in result.message
    return result.message


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put a tensor in the place of one, or take it out."""
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_weight_that_is_missing_or_of_another_shape_is_named(bench: Any, checkpoint: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(checkpoint, name, torch.zeros(3, 4))
    assert f"1 weights are of another shape than its config says: {name} is 3 × 4, config.json asks for 512 × 256" in (
        refusal(bench, checkpoint)
    )
    change(checkpoint, name, None)
    assert f"1 weights that its config asks for are missing: {name}" in refusal(bench, checkpoint)


def test_tensors_that_nobody_uses_are_named(bench: Any, checkpoint: Path) -> None:
    change(checkpoint, "visual.weight", torch.zeros(2))
    result = bench.attempt("model.source", {}, uri=f"file://{checkpoint}")
    assert result.status == "finished"
    assert "1 tensors are no weights of this architecture, and left out: visual.weight" in result.notes


def test_a_shard_that_the_index_names_must_be_there(bench: Any, checkpoint: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / INDEX).write_text(json.dumps(index))
    # A stale one beside the one file that is read says nothing.
    assert bench.attempt("model.source", {}, uri=f"file://{checkpoint}").status == "finished"
    (checkpoint / WEIGHTS).rename(checkpoint / "model-00001-of-00002.safetensors")
    names = load_file(checkpoint / "model-00001-of-00002.safetensors").keys()
    files = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    files["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert "names 2 files of weights, and model-00002-of-00002.safetensors is missing" in refusal(bench, checkpoint)
    (checkpoint / INDEX).write_text("[]")
    assert f"{INDEX} is no index of weights" in refusal(bench, checkpoint)


@pytest.mark.parametrize("keep", [0.5, 0.001, 0])
def test_a_file_that_was_cut_off_is_no_weights(bench: Any, checkpoint: Path, keep: float) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[: int(keep * len(content))])
    assert "transformers cannot open it" in refusal(bench, checkpoint)


def test_what_only_looks_like_weights_takes_no_memory(bench: Any, checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes(b"\xff" * 4096)
    assert "transformers cannot open it" in refusal(bench, checkpoint)


def test_a_tokenizer_longer_than_the_embedding_is_anothers(bench: Any, checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(checkpoint)
    result = bench.attempt("model.source", {}, uri=f"file://{checkpoint}")
    assert any(
        "1 special tokens have no row in the embedding, no text may spell them: <image>" in n for n in result.notes
    )
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(checkpoint)
    said = refusal(bench, checkpoint)
    assert f"its tokenizer has {rows + 2} tokens, its embedding {rows} rows: 'word' ({rows + 1}) has none" in said


def test_a_text_that_spells_a_token_without_a_row_is_refused(bench: Any, checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(checkpoint)
    model = bench.run("model.source", uri=f"file://{checkpoint}")[""]
    talk = [{"role": "user", "content": "See <image>?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}))
    settings = {"source": str(tmp_path / "rows.jsonl"), "eval_fraction": 0}
    for way in ("refuse", "keep"):
        result = bench.attempt("data.prepare", {"model": model}, control_tokens=way, **settings)
        assert result.status == "refused"
        assert "line 1: it spells the control token <image>, that the model has no embedding for" in result.message
    data: Dataset = bench.run("data.prepare", {"model": model}, control_tokens="escape", **settings)["train"]
    tuned = bench.attempt("train.sft", {"model": model, "data": data}, adapter={"kind": "lora"}, max_steps=1)
    assert tuned.status == "finished", tuned.message


def test_an_adapter_is_no_model_and_beside_one_it_is_left_out(bench: Any, checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (checkpoint / "adapter_model.safetensors").write_bytes((checkpoint / WEIGHTS).read_bytes())
    result = bench.attempt("model.source", {}, uri=f"file://{checkpoint}")
    assert "adapter_config.json and adapter_model.safetensors beside the model: an adapter, which is left out" in (
        result.notes
    )
    model = bench.run("model.source", uri=f"file://{checkpoint}")[""]
    assert not any(name.startswith("adapter") for name in model.manifest.files)
    (checkpoint / "config.json").unlink()
    (checkpoint / WEIGHTS).unlink()
    assert "this is an adapter (adapter_config.json), not a model; name the model that it was trained on" in (
        refusal(bench, checkpoint)
    )


def test_an_architecture_that_is_not_known_is_said(bench: Any, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "nothing_such"}))
    assert "transformers cannot open it" in refusal(bench, checkpoint)


def test_gpt2_names_its_sizes_otherwise_and_works(bench: Any, pico: Any, sums: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = make_base(pico.path, tmp_path / "gpt2")
    (folder / WEIGHTS).unlink()
    words = len(load_tokenizer(folder))
    GPT2LMHeadModel(GPT2Config(vocab_size=words, n_embd=64, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        folder
    )
    assert "hidden_size" not in json.loads((folder / "config.json").read_text())
    facts = model_facts(folder)
    assert (facts.hidden_size, facts.vocabulary, facts.tied_embeddings) == (64, words, True)
    model = bench.run("model.source", uri=f"file://{folder}", template="chatml")[""]
    settings = {"max_steps": 4, "batch_size": 4, "dtype": "float32", "max_tokens": 64}
    adapter = bench.run("train.sft", {"model": model, "data": sums["train"]}, adapter={"kind": "lora"}, **settings)[""]
    merged = bench.run("merge.adapter", {"adapter": adapter, "base": model, "data": sums["eval"]})[""]
    gguf = bench.run("quantize.gguf", {"model": merged}, scheme="Q8_0")[""]
    assert gguf.facts.architecture == "GPT2LMHeadModel"
