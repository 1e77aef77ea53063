"""`evaluate.best`: the candidate that a report says did best, given on as a step's own output."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from steps.artifacts import MANIFEST_NAME, Adapter, Artifact, Draft, Model, Report
from steps.evaluate._names import candidate_names
from steps.frame import Chooses, Follows, Input, Job, Like, NamesOf, StepConfig, UserError, step

CHOICE_NAME = "choice.json"


class EvaluateBest(StepConfig):
    """Choose among candidates by a metric of a report: the member of a matrix, or the round, that did best."""

    candidates: list[Input[Model | Adapter]] = Field(min_length=1)
    """Models or adapters to choose from, all of one kind."""
    names: tuple[str, ...] | None = NamesOf("candidates")
    """Their names in the report, in their order."""
    model: Input[Model] | None = Follows("candidates.model", required=False)
    """What candidates that are adapters were trained on; found by itself."""
    report: Annotated[Input[Report], Chooses()]
    """A report on them all, such as that of `evaluate.tasks`."""
    metric: str = "accuracy"
    """The report's metric by which they are ranked."""
    lowest: bool = False
    """Choose the lowest value (a perplexity) instead of the highest."""


@step("evaluate.best", produces=Like("candidates"), reference="https://arxiv.org/abs/2504.15777", opens=False)
def evaluate_best(config: EvaluateBest, job: Job) -> Draft:
    """Link the files of the best candidate; of equally good ones the first is taken."""
    names = candidate_names("evaluate.best", config.names, len(config.candidates))
    values = ranked(config, names, job.name)
    best = next(iter(values))
    place = names.index(best)
    chosen = config.candidates[place]
    out = job.output()
    _link(chosen, out)
    content = {"chosen": best, "metric": config.metric, "values": values}
    (out / CHOICE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    job.log.info("by %s the best is %s: %s", config.metric, best, shown)
    job.log_metrics({"chosen": place, config.metric: values[best]})
    return Draft(type(chosen), out, chosen.facts)


def ranked(config: EvaluateBest, names: tuple[str, ...], step_name: str) -> dict[str, float]:
    """Return the metric of every candidate, the best first.

    Raises:
        UserError: the report does not have it for one of them.
    """
    metrics: Mapping[str, float] = config.report.facts.metrics
    values = {}
    for name in names:
        if f"{name}/{config.metric}" not in metrics:
            of_others = sorted({key.rpartition("/")[2] for key in metrics if key.startswith(f"{name}/")})
            known = f"it has {', '.join(of_others)}" if of_others else "it is no candidate there"
            raise UserError(f"step `{step_name}`: the report has no {config.metric} of `{name}`; {known}")
        values[name] = metrics[f"{name}/{config.metric}"]
    sign = 1 if config.lowest else -1
    # What is not a number did worst, whichever way the metric points.
    return dict(sorted(values.items(), key=lambda item: (math.isnan(item[1]), sign * item[1])))


def _link(chosen: Artifact, out: Path) -> None:
    """Link every file: the bytes are there once, and read-only."""
    for name in chosen.manifest.files:
        if name not in (MANIFEST_NAME, CHOICE_NAME):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(chosen.path / name, out / name)
