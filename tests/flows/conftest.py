"""Recipes written by tests, and homes of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.graph import Graph, build_graph
from flows.recipe import load_recipe
from registry.home import Home

ROOT = Path(__file__).parents[2]

SMALL = """
name: small
base: {uses: model.pico, pretrain_steps: 4}
seed: 3
steps:
  data: {uses: data.prepare, source: python-stdlib-docs, limit: 60, max_tokens: 200, eval_fraction: 0.2}
  sft: {uses: train.sft, model: base, data: data.train, max_steps: 4, batch_size: 4}
  merged: {uses: merge.adapter, adapter: sft}
  gguf: {uses: quantize.gguf, model: merged, matrix: {scheme: [Q8_0, F16]}}
publish: {family: small, members: [merged, gguf]}
"""


def builder(base: str, path: Path) -> Callable[..., Graph]:
    """Return what builds the graph of a recipe text, with replacements and overrides."""

    def build(*changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> Graph:
        text = base
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        return build_graph(load_recipe(path, overrides))

    return build


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Graph]:
    """Build the graph of a recipe text, with replacements and overrides."""

    return builder(SMALL, tmp_path / "small.yaml")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty home, also for commands."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return Home.from_environment()
