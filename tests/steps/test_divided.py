"""Weights that two processes divide (FSDP2, ZeRO) come together again: what is given out is what one process gives."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from steps.artifacts import Dataset, DatasetFacts, Preferences
from steps.frame import Resources
from steps.frame.config import Launch
from steps.frame.launch import Launcher
from steps.lm.rows import read_jsonl
from tests.conftest import Bench
from tests.steps.comparisons import comparison_rows, facts
from tests.steps.conftest import curve, publish, sort_row

SFT = {"dtype": "float32", "epochs": 2, "learning_rate": 1e-3, "seed": 3, "checkpoint_steps": 5}


@pytest.fixture(scope="module")
def inputs(bench: Bench) -> dict[str, Any]:
    model = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=128, pretrain_steps=0, seed=1)[""]
    rows = [sort_row(task) for task in itertools.product(range(4), repeat=3)]
    data = publish(bench, Dataset, "sorting-few", rows, DatasetFacts(rows=len(rows)))
    return {"model": model, "data": data}


@pytest.fixture
def dividing(fresh: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    """A bench whose processes do on processors what a profile for GPUs says."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'gloo'}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    bench = fresh()
    bench.launcher = Launcher([], tmp_path / "forkserver.txt")
    yield bench
    bench.launcher.close()


def two(launch: Launch) -> Resources:
    return Resources(gpus=2, cpus=2, launch=launch)


def assert_same(wanted: Any, found: Any) -> None:
    """The same facts, and weights that differ by no more than the order of a sum does."""
    assert found.facts == wanted.facts
    (file,) = (path.name for path in wanted.path.glob("*model.safetensors"))
    ours, theirs = load_file(wanted.path / file), load_file(found.path / file)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.recipes)])
@pytest.mark.parametrize(
    "launch", ["fsdp2", *(pytest.param(name, marks=pytest.mark.recipes) for name in ("zero3", "zero2"))]
)
def test_divided_training_gives_out_the_weights_of_one_process(
    bench: Bench, dividing: Bench, inputs: dict[str, Any], launch: Launch, adapter: str
) -> None:
    settings = {**SFT, "adapter": {"kind": adapter}}
    alone = bench.run("train.sft", inputs, batch_size=8, **settings)[""]
    shared = dividing.run("train.sft", inputs, batch_size=4, resources=two(launch), **settings)[""]
    assert curve(dividing, shared, "loss") == pytest.approx(curve(bench, alone, "loss"), abs=1e-5)
    assert_same(alone, shared)


@pytest.mark.slow
@pytest.mark.recipes
@pytest.mark.parametrize("launch", ["fsdp2", "zero3", "zero2"])
def test_a_killed_divided_training_goes_on_to_the_same_weights(
    bench: Bench, dividing: Bench, inputs: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    settings = {**SFT, "adapter": {"kind": "full"}, "epochs": 8}
    alone = bench.run("train.sft", inputs, batch_size=8, **settings)[""]
    spec = dividing.spec("train.sft", inputs, batch_size=4, resources=two(launch), **settings)
    flow = threading.Thread(target=dividing.launcher.run, args=(spec,))
    flow.start()
    deadline = time.monotonic() + 120
    while not list(spec.work.glob("scratch/checkpoints-*/checkpoint-5/trainer_state.json")):
        assert time.monotonic() < deadline and flow.is_alive()
        time.sleep(0.01)
    dividing.launcher.close()
    flow.join()
    dividing.launcher = Launcher([], tmp_path / "again.txt")
    result = dividing.launcher.run(spec)
    assert "resuming from checkpoint-" in (spec.work / "log.txt").read_text()
    assert_same(alone, dividing.store.open(result.outputs[""]))


@pytest.mark.slow
@pytest.mark.recipes
@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
def test_the_best_of_divided_weights_is_given_out(
    bench: Bench, dividing: Bench, inputs: dict[str, Any], launch: Launch
) -> None:
    settings = {**SFT, "learning_rate": 1e-3, "max_steps": 4, "eval_steps": 2, "adapter": {"kind": "full"}}
    rewards = [{"kind": "length", "target": 3}]
    held_out = {**inputs, "eval": inputs["data"]}
    policy = dividing.run(
        "train.grpo",
        held_out,
        rewards=rewards,
        group_size=8,
        batch_size=16,
        max_new_tokens=6,
        resources=two(launch),
        **settings,
    )[""]
    scores = curve(dividing, policy, "held_out")
    assert sorted(scores) == [0, 2, 4]
    samples = bench.run(
        "data.sample",
        {"model": policy, "data": inputs["data"]},
        rewards=rewards,
        samples=1,
        temperature=0,
        max_new_tokens=6,
    )[""]
    found = [row["samples"][0]["score"] for row in read_jsonl(samples.rows_file)]
    assert sum(found) / len(found) == pytest.approx(max(scores.values()), abs=0.02)


@pytest.fixture(scope="module")
def compared(bench: Bench, inputs: dict[str, Any]) -> dict[str, Any]:
    """The model, and preferences between right and wrong answers to the same tasks."""
    rows = list(comparison_rows(inputs["data"]))
    return {"model": inputs["model"], "data": publish(bench, Preferences, "compared-few", rows, facts(rows))}


@pytest.mark.slow
@pytest.mark.recipes
@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["train.dpo", "train.kto", "train.orpo", "train.reward"])
def test_other_divided_trainings_give_the_weights_of_one_process(
    bench: Bench, dividing: Bench, compared: dict[str, Any], launch: Launch, kind: str
) -> None:
    settings = {**SFT, "epochs": 1, "adapter": {"kind": "full"}}
    alone = bench.run(kind, compared, batch_size=8, **settings)[""]
    shared = dividing.run(kind, compared, batch_size=4, resources=two(launch), **settings)[""]
    assert_same(alone, shared)


@pytest.mark.slow
@pytest.mark.recipes
def test_a_reward_model_in_bfloat16_is_divided_too(bench: Bench, dividing: Bench, compared: dict[str, Any]) -> None:
    """Its head computes in float32, whatever it is handed."""
    settings = {**SFT, "epochs": 1, "adapter": {"kind": "full"}, "dtype": "bfloat16"}
    alone = bench.run("train.reward", compared, batch_size=8, **settings)[""]
    shared = dividing.run("train.reward", compared, batch_size=4, resources=two("fsdp2"), **settings)[""]
    assert curve(dividing, shared, "loss") == pytest.approx(curve(bench, alone, "loss"), abs=0.02)


@pytest.mark.slow
@pytest.mark.recipes
@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
def test_what_is_only_asked_is_loaded_whole(
    bench: Bench, dividing: Bench, inputs: dict[str, Any], compared: dict[str, Any], launch: Launch
) -> None:
    settings = {**SFT, "epochs": 1, "adapter": {"kind": "full"}}
    judge = bench.run("train.reward", compared, batch_size=8, **settings)[""]
    policy = dividing.run(
        "train.grpo",
        {**inputs, "reward_model": judge},
        rewards=[{"kind": "reward_model"}],
        group_size=4,
        batch_size=8,
        max_new_tokens=6,
        resources=two(launch),
        **{**settings, "max_steps": 2},
    )[""]
    assert len(set(curve(dividing, policy, "reward/reward_model").values())) == 2


@pytest.mark.slow
@pytest.mark.recipes
@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
def test_a_process_whose_answers_end_early_goes_on_with_the_others(
    dividing: Bench, sorting: Any, sorting_model: Any, launch: Launch
) -> None:
    """A trained model's answers end at different lengths; layers that are divided must be gathered by all alike."""
    resources = Resources(gpus=2, cpus=2, launch=launch, timeout_minutes=2)
    policy = dividing.run(
        "train.grpo",
        {"model": sorting_model, "data": sorting["train"]},
        rewards=[{"kind": "exact"}],
        group_size=2,
        batch_size=2,
        max_new_tokens=16,
        temperature=3.0,
        **{**SFT, "max_steps": 6, "epochs": 1},
        resources=resources,
    )[""]
    assert len(curve(dividing, policy, "accuracy")) == 6
    assert len(set(curve(dividing, policy, "length/mean").values())) > 1
