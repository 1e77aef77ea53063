"""Every kind of adapter trains, is saved and found again, and merges into what base + adapter was."""

import json
from typing import Any

import pytest

from steps.artifacts import Dataset
from steps.frame import UserError
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.train._adapters import Lora, Oft, Pissa, trainable_model
from steps.train._checkpoints import last_checkpoint
from steps.train.sft import labelled
from tests.conftest import Bench
from tests.steps.conftest import curve

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj", "down_proj"]},
    "qlora": {"kind": "qlora", "rank": 8},
    "qlora-fp4": {"kind": "qlora", "rank": 8, "quant_type": "fp4", "double_quant": False},
    "dora": {"kind": "dora", "rank": 8},
    "rslora": {"kind": "rslora", "rank": 32},
    "pissa": {"kind": "pissa", "rank": 8},
    "oft": {"kind": "oft", "block_size": 32},
    "oft-exact": {"kind": "oft", "block_size": 16, "exact": True},
}


@pytest.fixture(scope="session")
def adapters(bench: Bench, pico: Any, sums: dict[str, Dataset]) -> dict[str, Any]:
    """An adapter of each kind after 30 steps."""
    made = {}
    for name, method in METHODS.items():
        rate = 2e-2 if method["kind"] == "oft" else 5e-3
        inputs = {"model": pico, "data": sums["train"]}
        made[name] = bench.run(
            "train.sft", inputs, adapter=method, max_steps=30, batch_size=16, learning_rate=rate, dtype="float32"
        )[""]
    return made


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_merges(
    bench: Bench, pico: Any, sums: dict[str, Dataset], adapters: dict[str, Any], name: str
) -> None:
    adapter = adapters[name]
    losses = curve(bench, adapter, "loss")
    assert losses[1] - losses[max(losses)] > 1
    merged = bench.run("merge.adapter", {"adapter": adapter, "base": pico, "data": sums["eval"]})[""]
    parity = json.loads((merged.path / "parity.json").read_text())
    assert parity["mean_kl"] < 0.01
    assert parity["greedy_agreement"] > 0.95
    # It is no parity with an adapter that does nothing.
    assert loss(merged, sums["eval"]) < loss(pico, sums["eval"]) - 1
    assert parity["onto"] == ("dequantised" if adapter.facts.four_bit else "original")


def test_a_four_bit_merge_measures_both_bases(
    bench: Bench, pico: Any, sums: dict[str, Dataset], adapters: dict[str, Any]
) -> None:
    merged = bench.run("merge.adapter", {"adapter": adapters["qlora"], "base": pico, "data": sums["eval"]})[""]
    measured = json.loads((merged.path / "parity.json").read_text())["measured"]
    assert measured["dequantised"]["mean_kl"] < measured["original"]["mean_kl"]
    assert adapters["qlora"].facts.four_bit.quant_type == "nf4"
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())


def test_pissa_is_given_out_as_lora_on_the_base_itself(
    bench: Bench, pico: Any, sums: dict[str, Dataset], adapters: dict[str, Any]
) -> None:
    """What was trained (rest of the weights + B·A) gives the same logits as base + what was given out."""
    import torch
    from peft import PeftModel

    adapter = adapters["pissa"]
    settings = json.loads((adapter.path / "adapter_config.json").read_text())
    assert (settings["r"], settings["init_lora_weights"], adapter.facts.rank) == (16, True, 16)
    trained = trainable_model(pico, Pissa(rank=8), "float32")
    checkpoint = last_checkpoint(bench.root / "work" / adapter.manifest.key[:16] / "scratch" / "checkpoints")
    trained.load_adapter(str(checkpoint), "default")
    given = PeftModel.from_pretrained(load_model(pico.path, "float32"), str(adapter.path))
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (trained, given)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Oft(block_size=48), "block_size: 48 does not divide the 256 inputs of model.layers.0"),
        (Pissa(rank=300), "rank: 300 is more than the 256 singular values"),
        (Pissa(rank=200), "rank: 200 is more than the 128 singular values"),
        (Lora(targets=["q_proj", "lm_head"]), "output layer cannot have an adapter"),
        (Lora(targets=["query"]), "adapter.targets: "),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(pico: Any, method: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainable_model(pico, method, "float32")


def loss(model: Any, data: Dataset) -> float:
    """Mean loss per answer token on the first 32 rows."""
    import torch

    from steps.lm.rows import read_jsonl

    network, tokenizer = load_model(model.path, "float32"), load_tokenizer(model.path)
    total, count = 0.0, 0
    with torch.no_grad():
        for row, _ in zip(read_jsonl(data.rows_file), range(32), strict=False):
            ids, labels = labelled(row["messages"], tokenizer, model.facts.stop_token_ids, "all")[0]
            logits = network(input_ids=torch.tensor([ids])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
            count += sum(label != -100 for label in labels)
    return total / count


def test_an_adapter_on_tied_embeddings_is_refused_before_the_training(bench: Any, sums: Any) -> None:
    model = bench.run("model.pico", hidden=64, layers=1, vocabulary=320, context=64, pretrain_steps=0)[""]
    method = {"kind": "lora", "targets": ["q_proj", "embed_tokens"]}
    result = bench.attempt("train.sft", {"model": model, "data": sums["train"]}, adapter=method, max_steps=2)
    assert result.status == "refused" and "is the output layer, too (tied embeddings)" in result.message
