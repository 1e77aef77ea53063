"""Fine-tuning learns, resumes to the same bytes, and merges into what base + adapter was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts, Manifest, digest_tree
from steps.lm.chat import conversation
from steps.lm.checkpoint import load_tokenizer
from steps.lm.rows import read_jsonl, write_jsonl

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def conversations() -> Iterator[dict[str, Any]]:
    for index in range(64):
        first, second = WORDS[index % 8], WORDS[index // 8]
        messages = [
            {"role": "user", "content": f"Join {first} and {second}."},
            {"role": "assistant", "content": f"{first}-{second}"},
        ]
        yield {"id": f"{index:03}", "messages": messages, "source": "test"}


@pytest.fixture(scope="session")
def joined(bench: Any) -> Dataset:
    staging = bench.root / "joined"
    staging.mkdir()
    count = write_jsonl(staging / "rows.jsonl", conversations())
    tree = digest_tree(staging)
    manifest = Manifest(
        kind="Dataset",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test",
        output="train",
        key="joined",
        config={},
        libraries={},
        facts=DatasetFacts(rows=count, format="messages").model_dump(),
    )
    return bench.store.publish(staging, manifest)


@pytest.fixture(scope="session")
def tuned(bench: Any, pico: Any, joined: Dataset) -> Any:
    inputs = {"model": pico, "data": joined}
    return bench.run("train.sft", inputs, epochs=12, batch_size=8, learning_rate=4e-3, checkpoint_steps=8, seed=3)[""]


def losses(work: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["values"]["loss"] for row in rows if "loss" in row["values"]}


def work_of(bench: Any, artifact: Any) -> Path:
    return bench.root / "work" / artifact.manifest.key[:16]


def test_mask_covers_the_answer_and_its_stop_token_only(pico: Any, joined: Dataset) -> None:
    tokenizer = load_tokenizer(pico.path)
    row = next(read_jsonl(joined.rows_file))
    rendered = conversation(tokenizer, row["messages"])
    answer = [token for token, mine in zip(rendered.ids, rendered.assistant, strict=True) if mine]
    assert tokenizer.decode(answer) == "alpha-alpha<|im_end|>"
    assert str(tokenizer.decode(rendered.ids[: rendered.prompt_length])).endswith("<|im_start|>assistant\n")


def test_sft_learns(bench: Any, tuned: Any) -> None:
    curve = losses(work_of(bench, tuned))
    # Two nats a token: the answers have become seven times likelier. A rank 16 adapter on so small a base gets no
    # further; `test_full_training_gives_a_model` trains every weight.
    assert curve[1] - curve[max(curve)] > 2
    assert tuned.kind == "Adapter"
    assert not any("/" in str(value) and str(bench.root) in str(value) for value in tuned.manifest.config.values())


def test_adapter_config_names_no_path(tuned: Any, pico: Any) -> None:
    settings = json.loads((tuned.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"artifact://{pico.digest}"
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_merged_model_is_base_plus_adapter(bench: Any, tuned: Any, pico: Any, joined: Dataset) -> None:
    merged = bench.run("merge.adapter", {"adapter": tuned, "base": pico, "data": joined})[""]
    parity = json.loads((merged.path / "parity.json").read_text())
    assert parity["mean_kl"] < 0.01
    assert parity["greedy_agreement"] > 0.95
    assert merged.facts.template_sha256 == pico.facts.template_sha256


def test_merge_refuses_what_is_not_the_same_model(bench: Any, tuned: Any, pico: Any, joined: Dataset) -> None:
    result = bench.attempt("merge.adapter", {"adapter": tuned, "base": pico, "data": joined}, max_kl=1e-12)
    assert result.status == "failed"
    assert "is not base + adapter" in result.message


def test_merge_refuses_another_base(bench: Any, tuned: Any) -> None:
    other = bench.run("model.pico", seed=2, pretrain_steps=1)[""]
    result = bench.attempt("merge.adapter", {"adapter": tuned, "base": other})
    assert result.status == "refused"
    assert "was trained on" in result.message


def test_full_training_gives_a_model(bench: Any, pico: Any, joined: Dataset) -> None:
    inputs = {"model": pico, "data": joined}
    model = bench.run("train.sft", inputs, adapter={"kind": "full"}, max_steps=12, learning_rate=1e-3)[""]
    assert model.kind == "Model"
    curve = losses(work_of(bench, model))
    assert curve[max(curve)] < curve[1]
