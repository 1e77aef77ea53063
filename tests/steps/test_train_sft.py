"""Supervised fine-tuning: what is learned of a row, what packing and accumulation must not change, and resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from steps.artifacts import Dataset, DatasetFacts
from steps.frame import UserError, load_kind
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.rows import read_jsonl
from steps.train.sft import labelled
from tests.conftest import Bench
from tests.steps.conftest import curve, publish, run_and_kill, sum_row
from tests.steps.untrained import untrained

SETTINGS: dict[str, Any] = {
    "adapter": {"kind": "lora", "rank": 8},
    "batch_size": 8,
    "learning_rate": 5e-3,
    "dtype": "float32",
    "seed": 3,
}
# Loss of the first batch of 8 sums on an untrained model, float32.
FIRST_LOSS = 5.717780


@pytest.fixture(scope="session")
def few(bench: Bench) -> Dataset:
    """32 sums."""
    rows = [sum_row(left, 3 * left % 47) for left in range(32)]
    return publish(bench, Dataset, "few-sums", rows, DatasetFacts(rows=len(rows)))


def talk() -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "red", "learn": False},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "green"},
    ]


def test_the_first_loss_is_what_it_was_and_a_second_run_gives_the_same_bytes(
    bench: Bench, few: Dataset, fresh: Callable[[], Bench]
) -> None:
    benches, model = [fresh(), fresh()], untrained(bench, seed=1)
    first, second = (
        each.run("train.sft", {"model": model, "data": few}, max_steps=6, **SETTINGS)[""] for each in benches
    )
    assert curve(benches[0], first, "loss")[1] == pytest.approx(FIRST_LOSS, abs=1e-5)
    assert curve(benches[0], first, "loss") == curve(benches[1], second, "loss")
    assert first.digest == second.digest


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_message_that_says_learn_false_is_not_learned(pico: Any, train_on: Any) -> None:
    assert spans(pico, talk(), train_on) == ["green<|im_end|>"]
    last_unlearned = [*talk()[2:], *talk()[:2]]
    assert spans(pico, last_unlearned, train_on) == (["green<|im_end|>"] if train_on == "all" else [])


def test_data_prepare_carries_learn_false(bench: Bench, pico: Any, write: Callable[[str, str], Path]) -> None:
    source = str(write("talk.jsonl", json.dumps({"messages": talk()}) + "\n"))
    data = bench.run("data.prepare", source=source, eval_fraction=0, near_dedup=None, system="Be brief.")["train"]
    messages = next(read_jsonl(data.rows_file))["messages"]
    assert [message.get("learn") for message in messages] == [None, None, False, None, None]
    assert spans(pico, messages, "all") == ["green<|im_end|>"]
    unclear = str(write("unclear.jsonl", json.dumps({"messages": [{**talk()[0], "learn": "no"}, talk()[1]]}) + "\n"))
    result = bench.attempt("data.prepare", source=unclear)
    assert "message 1 has learn: 'no'; it must be true or false" in result.message


def test_all_turns_or_the_last_are_learned(pico: Any) -> None:
    messages = [{key: value for key, value in each.items() if key != "learn"} for each in talk()]
    assert spans(pico, messages, "all") == ["red<|im_end|>", "green<|im_end|>"]
    assert spans(pico, messages, "last") == ["green<|im_end|>"]


def test_a_users_token_is_no_loss_term(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    messages = talk()
    ids, labels = labelled(messages, tokenizer, pico.facts.stop_token_ids, "all")[0]
    messages[2] = {"role": "user", "content": "Anothet."}
    other_ids, other_labels = labelled(messages, tokenizer, pico.facts.stop_token_ids, "all")[0]
    assert ids != other_ids
    assert [label for label in labels if label != -100] == [label for label in other_labels if label != -100]
    model = load_model(pico.path, "float32")
    import torch

    # The terms themselves: of all positions only the learned ones have a gradient with respect to their logits.
    logits = model(input_ids=torch.tensor([ids])).logits
    logits.retain_grad()
    torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(labels[1:])).backward()
    touched = logits.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [index - 1 for index, label in enumerate(labels) if label != -100]


def spans(model: Any, messages: list[dict[str, Any]], train_on: Any) -> list[str]:
    """What is learned, as the texts of unbroken runs."""
    tokenizer = load_tokenizer(model.path)
    _, labels = labelled(messages, tokenizer, model.facts.stop_token_ids, train_on)[0]
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


@pytest.mark.parametrize("attention", ["rows", "sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(pico: Any, attention: str) -> None:
    import torch

    from steps.train._row_attention import attend_by_rows

    rows = [list(range(start, start + length)) for start, length in ((5, 9), (40, 14), (80, 6), (100, 11), (130, 3))]
    batch = pack_of(rows)
    model = load_model(pico.path, "float32")
    if attention == "rows":
        assert attend_by_rows(model)
    else:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        # With a cache transformers would take the positions for one row's.
        inside = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        assert batch["input_ids"].shape[0] > 1
        found = 0
        for sequence, ids in zip(inside, batch["input_ids"], strict=True):
            for row in rows:
                start = position_of(row, ids.tolist())
                if start is None:
                    continue
                alone = model(input_ids=torch.tensor([row])).logits[0]
                torch.testing.assert_close(sequence[start : start + len(row)], alone, atol=1e-5, rtol=1e-5)
                found += 1
        assert found == len(rows)
        # Not a bit of a row depends on what stands before it.
        other = batch["input_ids"].clone()
        first = int((batch["position_ids"][0, 1:] == 0).nonzero()[0]) + 1
        other[0, :first] += 300
        changed = model(input_ids=other, position_ids=batch["position_ids"], use_cache=False).logits
    assert torch.equal(changed[0, first:], inside[0, first:])
    assert not torch.equal(changed[0, :first], inside[0, :first])
    assert bool((batch["labels"][batch["position_ids"] == 0] == -100).all())


def pack_of(rows: list[list[int]]) -> dict[str, Any]:
    """One batch with all rows, packed into sequences of at most 24 tokens."""
    from datasets import Dataset as Table

    from steps.train._packing import PackedCollator, packed

    table = packed(Table.from_dict({"input_ids": rows, "labels": rows}), 24)
    return PackedCollator(0, return_position_ids=True)([dict(row) for row in table])


def position_of(row: list[int], ids: list[int]) -> int | None:
    return next((start for start in range(len(ids)) if ids[start : start + len(row)] == row), None)


def test_packed_and_unpacked_losses_agree(bench: Bench, pico: Any, few: Dataset) -> None:
    """Five steps on all rows at once, so that gradients must agree too."""
    settings = {**SETTINGS, "batch_size": 32, "epochs": 5}
    inputs = {"model": pico, "data": few}
    plain, dense = (
        bench.run("train.sft", inputs, max_tokens=64, packing=packing, **settings)[""] for packing in (False, True)
    )
    assert curve(bench, dense, "loss") == pytest.approx(curve(bench, plain, "loss"), abs=1e-5)
    assert curve(bench, plain, "loss").keys() == {1, 5}


def test_accumulation_is_a_larger_batch(bench: Bench, pico: Any, few: Dataset) -> None:
    inputs = {"model": pico, "data": few}
    settings = {**SETTINGS, "epochs": 3}
    whole, parts = (
        bench.run("train.sft", inputs, **{**settings, "batch_size": size, "accumulation": 16 // size})[""]
        for size in (16, 4)
    )
    assert curve(bench, parts, "loss") == pytest.approx(curve(bench, whole, "loss"), abs=1e-5)


def test_checkpointed_activations_change_nothing(bench: Bench, pico: Any, few: Dataset) -> None:
    inputs = {"model": pico, "data": few}
    plain, again = (
        bench.run("train.sft", inputs, max_steps=5, gradient_checkpointing=checkpointing, **SETTINGS)[""]
        for checkpointing in (False, True)
    )
    assert curve(bench, again, "loss") == pytest.approx(curve(bench, plain, "loss"), abs=1e-5)


def test_neftune_adds_noise_to_training_only(bench: Bench, pico: Any, few: Dataset) -> None:
    inputs = {"model": pico, "data": few, "eval": few}
    settings = {**SETTINGS, "learning_rate": 1e-9, "max_steps": 1}
    plain, noisy = (bench.run("train.sft", inputs, neftune_alpha=alpha, **settings)[""] for alpha in (None, 20.0))
    losses = [curve(bench, each, "loss")[1] for each in (plain, noisy)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert curve(bench, noisy, "eval_loss")[1] == pytest.approx(curve(bench, plain, "eval_loss")[1], abs=1e-5)


def test_it_stops_when_the_evaluation_loss_rises_and_gives_out_the_best_weights(
    bench: Bench, pico: Any, few: Dataset, sums: dict[str, Dataset]
) -> None:
    inputs = {"model": pico, "data": few, "eval": sums["eval"]}
    stopping = {"patience": 2, "min_delta": 0.0}
    settings = {**SETTINGS, "learning_rate": 2e-2, "schedule": "constant_with_warmup"}
    adapter = bench.run("train.sft", inputs, epochs=60, eval_steps=4, early_stopping=stopping, **settings)[""]
    found = curve(bench, adapter, "eval_loss")
    best = min(found, key=lambda step: found[step])
    assert list(found)[-3:] == [best, best + 4, best + 8]
    assert max(found) < 240
    kept = bench.root / "work" / adapter.manifest.key[:16] / "scratch" / "checkpoints" / f"checkpoint-{best}"
    given, saved = (load_file(path / "adapter_model.safetensors") for path in (adapter.path, kept))
    assert all(bool((given[name] == saved[name]).all()) for name in saved)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_other_optimizers_learn(bench: Bench, pico: Any, few: Dataset, optimizer: str) -> None:
    settings = {**SETTINGS, "optimizer": optimizer, "epochs": 10, "final_rate": 0.1}
    found = curve(bench, bench.run("train.sft", {"model": pico, "data": few}, **settings)[""], "loss")
    assert found[1] - found[max(found)] > 1


def test_muon_gets_the_matrices_and_a_checkpoint_has_both(pico: Any, tmp_path: Path) -> None:
    import torch

    from steps.train._muon import muon_for

    def step(model: Any, optimizer: Any) -> None:
        model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = load_model(pico.path, "float32")
    optimizer = muon_for(model, 1e-3, 0.1)
    matrices, embeddings, vectors = optimizer.param_groups
    assert {tuple(each.shape) for each in embeddings["params"]} == {(pico.facts.vocabulary, 256)}
    assert len(matrices["params"]) == 2 * 7
    assert {each.ndim for each in vectors["params"]} == {1}
    step(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    step(model, optimizer)
    other = load_model(pico.path, "float32")
    resumed = muon_for(other, 1e-3, 0.1)
    weights, state = torch.load(tmp_path / "state.pt")
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    step(other, resumed)
    ends = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, another) for one, another in ends)


HARD = {
    "dropout, noise, Muon": {
        "adapter": {"kind": "lora", "rank": 8, "dropout": 0.1},
        "neftune_alpha": 5.0,
        "optimizer": "muon",
    },
    "fast SVD, packing, 8 bits, best weights": {
        "adapter": {"kind": "pissa", "rank": 8, "iterations": 4},
        "packing": True,
        "max_tokens": 64,
        "optimizer": "adamw_8bit",
        "early_stopping": {"patience": 4},
    },
    "4-bit base, evaluation": {"adapter": {"kind": "qlora", "rank": 8}, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("changes", HARD.values(), ids=HARD)
def test_a_killed_training_resumes_to_the_same_bytes(
    pico: Any, few: Dataset, sums: dict[str, Dataset], fresh: Callable[[], Bench], changes: dict[str, Any]
) -> None:
    # Eight batches an epoch, a checkpoint every three steps: the one killed at is in the middle of an epoch.
    settings = {**SETTINGS, "batch_size": 4, "epochs": 4, "checkpoint_steps": 3, **changes}
    inputs = {"model": pico, "data": few}
    if "early_stopping" in changes or "4-bit" in str(changes):
        inputs["eval"] = few
    undisturbed = fresh().run("train.sft", inputs, **settings)[""]
    disturbed = fresh()
    assert "SIGKILL" in run_and_kill(disturbed, "train.sft", inputs, settings, beyond=8).message
    resumed = disturbed.run("train.sft", inputs, **settings)[""]
    log = (disturbed.root / "work" / resumed.manifest.key[:16] / "log.txt").read_text()
    assert "resuming from checkpoint-" in log
    assert resumed.digest == undisturbed.digest


def test_evaluation_leaves_a_four_bit_base_as_it_is(bench: Bench, pico: Any, few: Dataset) -> None:
    """On a processor with AVX512-BF16 bitsandbytes would repack the weights at the first evaluation."""
    settings = {**SETTINGS, "adapter": {"kind": "qlora", "rank": 8}, "max_steps": 15, "dtype": "bfloat16"}
    plain = bench.run("train.sft", {"model": pico, "data": few}, **settings)[""]
    evaluated = bench.run("train.sft", {"model": pico, "data": few, "eval": few}, eval_steps=2, **settings)[""]
    assert curve(bench, evaluated, "loss") == curve(bench, plain, "loss")
    found = curve(bench, evaluated, "eval_loss")
    assert found[2] - found[14] > 0.5


def test_packing_is_refused_where_rows_would_see_each_other(pico: Any) -> None:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from steps.train._packing import check_isolation

    torch.manual_seed(0)
    small = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    check_isolation(load_model(pico.path, "bfloat16"))
    with pytest.raises(UserError, match="see each other in Mamba2ForCausalLM"):
        check_isolation(Mamba2ForCausalLM(small))


def test_a_model_with_a_sliding_window_keeps_its_mask() -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from steps.train._row_attention import attend_by_rows

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    for window, by_rows in ((None, True), (8, False)):
        model = MistralForCausalLM(
            MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=window, **sizes)  # pyright: ignore
        )
        assert attend_by_rows(model) is by_rows
        assert (model.config._attn_implementation == "sdpa") is not by_rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"early_stopping": {"patience": 2}}, "early_stopping: there is nothing to evaluate on"),
        ({"eval_steps": 2}, "eval_steps: there is nothing to evaluate on"),
        ({"optimizer": "muon", "adapter": {"kind": "oft"}}, "Muon trains matrices"),
        ({"schedule": "linear", "final_rate": 0.1}, "final_rate: only a cosine"),
        ({"adapter": {"kind": "lorra"}}, "adapter"),
    ],
)
def test_what_cannot_work_is_refused_at_plan_time(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        load_kind("train.sft").config.model_validate({"model": "base", "data": "data", **settings})


def test_rows_without_anything_to_learn_are_refused(bench: Bench, pico: Any) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "learn": False}]
    row = {"id": "0", "messages": messages, "source": "test"}
    data = publish(bench, Dataset, "unlearnable", [row], DatasetFacts(rows=1))
    result = bench.attempt("train.sft", {"model": pico, "data": data}, max_steps=1, **SETTINGS)
    assert result.status == "refused"
    assert "no row of `data` has an answer to learn" in result.message
