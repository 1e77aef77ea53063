"""A GPTQ checkpoint holds integers that stand for nearly the source's weights, and everything that is not weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calibration_rows import conversations, publish_conversations
from variants import replace, scale_noise, variant

from steps.artifacts import Dataset, Quantized
from steps.frame import UserError
from steps.frame.errors import ProofFailed
from steps.lm.chat import render, token_ids
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.gptq import dense_state, dequantize, load_gptq
from steps.quantize.gptq import check_group_size, verify_gptq

OWN_LOADER = """
import json, sys, numpy, torch
from gptqmodel import BACKEND, GPTQModel
path, ids, out = sys.argv[1:]
quantized = GPTQModel.load(path, backend=BACKEND.GPTQ_TORCH, device="cpu")
with torch.inference_mode():
    numpy.save(out, quantized.model(input_ids=torch.tensor([json.loads(ids)])).logits[0].float().numpy())
"""


@pytest.fixture(scope="module")
def rows(bench: Any) -> Dataset:
    return publish_conversations(bench.store)


@pytest.fixture(scope="module")
def int4(bench: Any, pico: Any, rows: Dataset) -> Quantized:
    return bench.run("quantize.gptq", {"model": pico, "calibration": rows}, bits=4, group_size=64)[""]


def test_the_checkpoint_keeps_what_is_not_weights(pico: Any, int4: Quantized) -> None:
    assert (int4.facts.format, int4.facts.scheme) == ("gptq", "Int4-g64")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (int4.path / name).read_bytes() == (pico.path / name).read_bytes()
    assert not list(int4.path.glob("*.csv"))
    assert int4.facts.stop_token_ids == pico.facts.stop_token_ids
    assert int4.size < 0.6 * pico.size


def test_its_weights_lie_within_a_step_of_the_sources(pico: Any, int4: Quantized) -> None:
    import torch

    source = load_model(pico.path, "float32").state_dict()
    quantized = load_gptq(int4.path).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(quantized["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    difference = (quantized[name] - source[name]).norm() / source[name].norm()
    assert 0.01 < difference < 0.2  # rounding to 16 steps of a group's range is felt, but only just
    groups = quantized[name].reshape(-1, 64)
    assert max(len(group.unique()) for group in groups) <= 16


def test_gptqmodels_own_loader_reads_the_same_model(pico: Any, int4: Quantized, tmp_path: Path) -> None:
    import numpy as np
    import torch

    tokenizer = load_tokenizer(pico.path)
    ids = token_ids(tokenizer, render(tokenizer, conversations()[0]["messages"]))
    # In a process of its own: the import changes transformers and starts threads.
    command = [sys.executable, "-c", OWN_LOADER, str(int4.path), json.dumps(ids), "logits.npy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    expected = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    with torch.inference_mode():
        found = load_gptq(int4.path)(input_ids=torch.tensor([ids])).logits[0]
    assert (found.argmax(-1) == expected.argmax(-1)).double().mean() > 0.97
    assert (found - expected).abs().mean() < 0.05 * expected.std()  # they compute in 16 bits


def test_a_second_run_gives_the_same_bytes(bench: Any, pico: Any, rows: Dataset, int4: Quantized) -> None:
    again = bench.run("quantize.gptq", {"model": pico, "calibration": rows}, bits=4, group_size=64)[""]
    assert again.digest == int4.digest


def test_asymmetric_zero_points_are_read_back(bench: Any, pico: Any, rows: Dataset) -> None:
    inputs = {"model": pico, "calibration": rows}
    result = bench.run("quantize.gptq", inputs, bits=4, group_size=64, symmetric=False, desc_act=True)[""]
    assert result.facts.scheme == "Int4-g64"
    assert bench.last.metrics["verified_top1_agreement"] > 0.9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros_less_one", [True, False])
def test_packed_integers_are_unpacked_exactly(bits: int, zeros_less_one: bool) -> None:
    import torch

    generator = torch.Generator().manual_seed(bits)
    top, each = 2**bits, 32 // bits
    values = torch.randint(0, top, (16, 8), generator=generator)
    zeros = torch.randint(0, top, (2, 8), generator=generator)
    zeros[0, 0] = 0  # less one, it borrows from its neighbour
    groups = torch.tensor([1, 0] * 8, dtype=torch.int32)
    scales = torch.rand(2, 8, generator=generator)

    def packed(integers: torch.Tensor) -> torch.Tensor:
        words = sum(integers[..., at::each].long() << (bits * at) for at in range(each))
        assert isinstance(words, torch.Tensor)
        return words

    words = packed(zeros) - (sum(1 << shift for shift in range(0, 32, bits)) if zeros_less_one else 0)
    found = dequantize(
        packed(values.T).T.contiguous().int(),
        words.int(),
        scales,
        groups,
        bits=bits,
        zeros_less_one=zeros_less_one,
    )
    rows = groups.long()
    assert torch.equal(found, ((values - zeros[rows]).float() * scales[rows]).T)


def test_a_group_size_that_does_not_divide_is_refused_at_once(bench: Any, pico: Any, rows: Dataset) -> None:
    result = bench.attempt("quantize.gptq", {"model": pico, "calibration": rows}, group_size=512)
    assert result.status == "refused"
    assert "512 does not divide 256" in result.message
    assert "256, 128, 64, 32, 16, -1 would do" in result.message
    check_group_size(pico.path, -1)


def test_a_spoilt_checkpoint_is_found_out(bench: Any, pico: Any, int4: Quantized) -> None:
    tokenizer = load_tokenizer(pico.path)
    ids = [token_ids(tokenizer, render(tokenizer, row["messages"]))[:256] for row in conversations()[:4]]
    kappa, agreement = verify_gptq(int4.path, pico, ids)
    assert kappa <= agreement
    with pytest.raises(ProofFailed, match="kappa"):
        verify_gptq(int4.path, variant(bench.store, pico, scale_noise(20.0)), ids)

    def reword(directory: Path) -> None:
        replace(directory / "chat_template.jinja", "{{ messages[0]['content'] }}")

    with pytest.raises(ProofFailed, match="template"):
        verify_gptq(int4.path, variant(bench.store, pico, reword), ids)


def test_only_gptq_checkpoints_are_opened(pico: Any) -> None:
    with pytest.raises(UserError, match="not a GPTQ checkpoint"):
        load_gptq(pico.path)
    assert "model.norm.weight" in dense_state(pico.path, bits=4, zeros_less_one=True)
