"""How fast a training goes: a token costs what PyTorch counts, and the rates are those of the log's own times."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from steps.artifacts import Preferences
from steps.train._rl import rollout_cost
from steps.train._speed import Speed, cost_of, peak
from steps.train.grpo import TrainGrpo
from tests.steps.comparisons import comparison_rows, facts
from tests.steps.conftest import curve, publish

ROWS, LENGTH = 2, 64


def llama(tied: bool) -> Any:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def counted(model: Any, learning: bool) -> int:
    """Return what PyTorch counts for one token of a batch."""
    ids = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        if learning:
            model(ids, labels=ids).loss.backward()
        else:
            with torch.no_grad():
                model(ids)
    return counter.get_total_flops() // (ROWS * LENGTH)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_costs_what_pytorch_counts(tied: bool) -> None:
    model = llama(tied)
    assert cost_of(model, LENGTH) == pytest.approx(counted(model, learning=True), rel=0.01)
    assert cost_of(model, LENGTH, forwards=1, passes=0) == pytest.approx(counted(model, learning=False), rel=0.01)


def test_frozen_weights_have_no_gradients_to_pay_for() -> None:
    model = get_peft_model(llama(tied=True), LoraConfig(r=8, target_modules="all-linear"))
    # The first layer's inputs need no gradient below its adapters, which the count does not know.
    assert cost_of(model, LENGTH) == pytest.approx(counted(model, learning=True), rel=0.06)


def test_a_rollout_is_sampled_compared_and_learned_from() -> None:
    model = llama(tied=True)
    settings = {"model": "base", "data": "data", "rewards": [{"kind": "exact"}], "max_new_tokens": 128}
    learning, forward = (cost_of(model, 64, forwards, 1 - forwards) or 0 for forwards in (0, 1))
    for more, times, passes in (
        ({}, 1, 1),
        ({"kl": 0.1}, 2, 1),
        ({"kl": 0.1, "iterations": 2}, 3, 2),
        ({"rollouts": {"kind": "vllm", "mode": "server", "url": "http://localhost"}}, 0, 1),
    ):
        config = TrainGrpo.model_validate({**settings, **more})
        assert rollout_cost(config, model) == pytest.approx(times * forward + passes * learning)


def test_a_mixture_of_experts_has_no_such_count() -> None:
    assert cost_of(SimpleNamespace(config=MixtralConfig()), LENGTH) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla K80", None),
    ],
)
def test_the_peak_is_told_by_the_gpu_s_name(name: str, teraflops: float | None) -> None:
    assert peak(name) == (teraflops and teraflops * 1e12)


def test_mfu_is_a_share_of_all_gpus_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    job: Any = SimpleNamespace(resources=SimpleNamespace(world=8))
    # A model of 8e9 weights, 10,000 tokens a second on each GPU: 6 · 8e9 · 1e4 / 989e12.
    speed = Speed(job, 6 * 8e9)._speed((0.0, 0.0), (2.0, 160_000.0))
    assert speed == {"tokens_per_second": 80_000, "mfu": pytest.approx(0.4853, abs=1e-4)}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_speed_of_a_training_is_recorded(bench: Any, sorting: Any, pico: Any, packing: bool) -> None:
    model = bench.run(
        "train.sft",
        {"model": pico, "data": sorting["train"]},
        dtype="float32",
        max_steps=12,
        batch_size=4,
        packing=packing,
        max_tokens=128,
    )[""]
    work = bench.root / "work" / model.manifest.key[:16]
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["time"] for line in lines if "loss" in line["values"]}
    rates = curve(bench, model, "tokens_per_second")
    assert list(rates) == [5, 10]
    if not packing:
        tokens = curve(bench, model, "num_tokens")
        for before, step in ((1, 5), (5, 10)):
            expected = (tokens[step] - tokens[before]) / (logged[step] - logged[before])
            assert rates[step] == pytest.approx(expected, rel=0.05)
    (mean,) = (line["values"] for line in lines if "tokens_per_second/mean" in line["values"])
    assert min(rates.values()) <= mean["tokens_per_second/mean"] <= max(rates.values())
    assert "mfu/mean" not in mean


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train.dpo", {}),
        ("train.kto", {}),
        ("train.orpo", {}),
        ("train.reward", {}),
        ("train.distill", {"max_new_tokens": 4}),
    ],
)
def test_every_kind_of_training_records_its_speed(
    bench: Any, sorting: Any, sorting_model: Any, kind: str, settings: dict[str, Any]
) -> None:
    rows = list(comparison_rows(sorting["eval"]))
    inputs = {"model": sorting_model, "data": publish(bench, Preferences, "speed", rows, facts(rows))}
    if kind == "train.distill":
        inputs = {"model": sorting_model, "teacher": sorting_model, "data": sorting["eval"]}
    trained = bench.run(kind, inputs, dtype="float32", max_steps=10, batch_size=4, **settings)[""]
    rates = curve(bench, trained, "tokens_per_second")
    assert list(rates) == [5, 10]
    assert min(rates.values()) > 0
