"""Weights that two processes divide (FSDP2) come together again: what is given out is what one process gives."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from steps.artifacts import Dataset, DatasetFacts
from steps.frame import Resources, UserError
from steps.frame.launch import Launcher
from steps.frame.scale import PROFILES
from steps.lm.rows import read_jsonl
from steps.train._settings import common_arguments
from steps.train.sft import TrainSft
from tests.conftest import Bench
from tests.steps.conftest import curve, publish, sort_row

TWO = Resources(processes=2, cpus=2)
SFT = {"dtype": "float32", "epochs": 2, "learning_rate": 1e-3, "seed": 3, "checkpoint_steps": 5}


@pytest.fixture(scope="module")
def inputs(bench: Bench) -> dict[str, Any]:
    model = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=128, pretrain_steps=0, seed=1)[""]
    rows = [sort_row(task) for task in itertools.product(range(4), repeat=3)]
    data = publish(bench, Dataset, "sorting-few", rows, DatasetFacts(rows=len(rows)))
    return {"model": model, "data": data}


@pytest.fixture
def dividing(fresh: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    """A bench whose processes divide weights as `launch: fsdp2` says, but on processors."""
    profile = yaml.safe_load((PROFILES / "fsdp2.yaml").read_text())
    for name, value in profile["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'gloo'}{os.pathsep}{Path(__file__).parents[2]}")
    bench = fresh()
    bench.launcher = Launcher([], tmp_path / "forkserver.txt")
    yield bench
    bench.launcher.close()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"kind": "full"}, pytest.param({"kind": "lora"}, marks=pytest.mark.recipes)])
def test_divided_training_gives_out_the_weights_of_one_process(
    bench: Bench, dividing: Bench, inputs: dict[str, Any], adapter: dict[str, Any]
) -> None:
    one = bench.run("train.sft", inputs, batch_size=8, adapter=adapter, **SFT)[""]
    two = dividing.run("train.sft", inputs, batch_size=4, adapter=adapter, resources=TWO, **SFT)[""]
    assert curve(dividing, two, "loss") == pytest.approx(curve(bench, one, "loss"), abs=1e-5)
    file = "model.safetensors" if adapter["kind"] == "full" else "adapter_model.safetensors"
    wanted, found = load_file(one.path / file), load_file(two.path / file)
    assert wanted.keys() == found.keys()
    assert max(float((wanted[name] - found[name]).abs().max()) for name in wanted) < 1e-5
    assert two.facts == one.facts


@pytest.mark.slow
@pytest.mark.recipes
def test_the_best_of_divided_weights_is_given_out(bench: Bench, dividing: Bench, inputs: dict[str, Any]) -> None:
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
        resources=TWO,
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


def test_muon_cannot_train_divided_matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = TrainSft.model_validate({"model": "base", "data": "data.train", "optimizer": "muon"})
    with pytest.raises(UserError, match="Muon trains whole matrices, fsdp2 divides them"):
        common_arguments(config, tmp_path)
