"""The best of several candidates is given on, as what it is, and its bytes are not copied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build_graph
from flows.recipe import load_recipe
from steps.artifacts import Adapter, Model, Report, ReportFacts
from steps.frame import UserError
from tests.conftest import Bench
from tests.steps.conftest import publish

NAMES = ("small", "large", "broken")


@pytest.fixture(scope="module")
def models(bench: Bench) -> list[Any]:
    shape = {"layers": 1, "vocabulary": 320, "context": 64, "pretrain_steps": 0}
    return [bench.run("model.pico", hidden=64, seed=seed, **shape)[""] for seed in range(3)]


@pytest.fixture(scope="module")
def scores(bench: Bench) -> Any:
    metrics = {
        **{"small/accuracy": 0.25, "large/accuracy": 0.75, "broken/accuracy": 0.75},
        **{"small/perplexity": 2.0, "large/perplexity": 3.0, "broken/perplexity": float("nan")},
        "small/p_value": 0.5,
    }
    return publish(bench, Report, "scores", [], ReportFacts(metrics=metrics))


@pytest.mark.parametrize(
    ("settings", "wanted"), [({}, "large"), ({"metric": "perplexity", "lowest": True}, "small")], ids=["high", "low"]
)
def test_the_best_is_given_on(
    bench: Bench, models: list[Any], scores: Any, settings: dict[str, Any], wanted: str
) -> None:
    best = bench.run("evaluate.best", {"candidates": models, "report": scores}, names=NAMES, **settings)[""]
    chosen = models[NAMES.index(wanted)]
    assert isinstance(best, Model)
    assert best.facts == chosen.facts
    assert (best.path / "model.safetensors").samefile(chosen.path / "model.safetensors")
    assert json.loads((best.path / "choice.json").read_text())["chosen"] == wanted
    assert bench.store.fault(best.digest) is None
    assert bench.store.fault(chosen.digest) is None


def test_a_metric_that_the_report_lacks_is_named(bench: Bench, models: list[Any], scores: Any) -> None:
    inputs = {"candidates": models, "report": scores}
    result = bench.attempt("evaluate.best", inputs, names=NAMES, metric="p_value")
    assert result.status == "refused"
    assert "the report has no p_value of `large`; it has accuracy, perplexity" in result.message
    result = bench.attempt("evaluate.best", inputs, names=("small", "large", "other"))
    assert "the report has no accuracy of `other`; it is no candidate there" in result.message


def test_as_many_names_as_candidates(bench: Bench, models: list[Any], scores: Any) -> None:
    result = bench.attempt("evaluate.best", {"candidates": models, "report": scores}, names=("small", "large"))
    assert result.status == "refused"
    assert "evaluate.best: `names` has 2 entries for 3 candidates" in result.message


RECIPE = """
name: choice
base: {uses: model.pico}
steps:
  data:   {uses: data.prepare, source: python-stdlib-docs}
  sft:    {uses: train.sft, model: base, data: data.train, adapter: {kind: lora}, matrix: {adapter.rank: [4, 8]}}
  score:  {uses: evaluate.tasks, candidates: [sft], data: data.eval}
  best:   {uses: evaluate.best, candidates: CANDIDATES, report: score}
  merged: {uses: merge.adapter, adapter: best}
"""


def test_the_graph_knows_what_is_given_on(write: Callable[[str, str], Path]) -> None:
    nodes = build_graph(load_recipe(write("choice.yaml", RECIPE.replace("CANDIDATES", "sft")))).nodes
    assert nodes["best"].outputs == {"": Adapter}
    assert [ref.step for ref in nodes["best"].edges["candidates"]] == ["sft[4]", "sft[8]"]
    # The base that the chosen adapter belongs to is found through the choice.
    assert [ref.step for ref in nodes["merged"].edges["base"]] == ["base"]


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ("[sft, base]", "`sft\\[4\\]` gives an Adapter, `base` a Model; name steps of one kind"),
        ("[base]", "merge.adapter takes an Adapter here, `best` .evaluate.best. gives a Model"),
    ],
)
def test_candidates_of_another_kind_are_refused(write: Callable[[str, str], Path], candidates: str, said: str) -> None:
    text = RECIPE.replace("CANDIDATES", candidates).replace("adapter: best", "adapter: best, base: base")
    path = write("choice.yaml", text)
    with pytest.raises(UserError, match=said):
        build_graph(load_recipe(path))
