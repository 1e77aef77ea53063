"""What a report kind declares as its metrics is what its reports hold: gates are checked by it before anything runs."""

from typing import Any

import pytest

from registry.gates import STATISTICS, Evidence
from steps.artifacts import Report
from steps.frame import Metric
from steps.frame.kinds import all_kinds, load_kind
from tests.conftest import Bench

FIRST, OTHER = "one", "two"
COMPARE = {"rows": 4, "max_tokens": 160, "generate_rows": 2, "new_tokens": 4, "reference_name": FIRST, "names": [OTHER]}
TASKS = {"rows": 4, "max_new_tokens": 4, "names": [FIRST, OTHER]}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("evaluate.compare", COMPARE),
        ("evaluate.tasks", TASKS),
        ("evaluate.tasks", {**TASKS, "samples": 2, "temperature": 1.0}),
        ("evaluate.tasks", {**TASKS, "thinking_tokens": [0, 2, None]}),
    ],
)
def test_a_report_holds_the_metrics_that_its_kind_declares(
    bench: Bench, pico: Any, sums: Any, kind: str, settings: dict[str, Any]
) -> None:
    inputs: dict[str, Any] = {"data": sums["eval"], "candidates": [pico, pico]}
    if kind == "evaluate.compare":
        inputs |= {"reference": pico, "candidates": [pico]}
    given = {**inputs, **settings}
    declared = load_kind(kind).config.model_validate(given).metrics
    report = bench.run(kind, inputs, dtype="float32", **settings)[""]
    assert isinstance(report, Report)
    assert names_of(report, OTHER) == {each.name for each in declared if each.summed_up}
    assert names_of(report, FIRST) == {each.name for each in declared if each.summed_up and not each.distance}
    for metric in filter(lambda each: each.paired, declared):
        field = STATISTICS[metric.name].field
        assert any(isinstance(row[field], float) for row in Evidence.of(report).rows[OTHER]), metric


def names_of(report: Report, model: str) -> set[str]:
    return {name.removeprefix(f"{model}/") for name in report.facts.metrics if name.startswith(f"{model}/")}


def test_every_kind_of_report_declares_metrics_and_no_distance_is_paired() -> None:
    reports = [kind for kind in all_kinds() if Report in kind.outputs.get("", ())]
    assert {kind.name for kind in reports} == {"evaluate.compare", "evaluate.tasks"}
    metrics: list[Metric] = [metric for kind in reports for metric in kind.config.model_construct().metrics]
    assert not [each for each in metrics if each.distance and each.paired]
    assert {each.name for each in metrics if each.paired} == set(STATISTICS)
