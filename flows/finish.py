"""The end of an execution: publication, report, and what MLflow and Prefect show of it."""

from datetime import UTC, datetime
from pathlib import Path

from flows.ending import Ending
from flows.execution import Execution, StepState, versions
from flows.publication import Publication, publish_release
from flows.report import ReportStep, RunReport, comparison_png, prefect_table, read_notes, report_page
from flows.team.state import mlflow_url
from steps.artifacts.atomic import write_atomic
from steps.frame.spec import METRICS_NAME

REPORT = "report.html"
PICTURE = "comparison.png"
COMPARING = ("evaluate.compare", "evaluate.tasks")
"""Step kinds whose Report the page shows as a comparison of models."""
CHOOSING = "evaluate.best"
"""Step kind whose output is one of its candidates."""


def finish(execution: Execution, *, publish: bool) -> Ending:
    """Publish where all steps are done, write the report, end the record."""
    done = Ending.of(execution)
    publication = publish_release(execution) if done.ok and publish else Publication("")
    report = report_of(execution, publication.sentence)
    page, picture = report_page(report), comparison_png(report)
    record = execution.record
    record.log_file(page, REPORT)
    record.log_table("steps", table := prefect_table(report))
    record.log_metrics(_headline_metrics(report))
    if picture:
        record.log_file(picture, PICTURE)
    shown = report_path(execution)
    show_latest(shown, page)
    show_latest(shown.with_name(PICTURE), picture)
    execution.close(ok=done.ok)
    execution.ending = Ending.of(
        execution,
        publication.sentence,
        publication.release,
        report=shown,
        table=table,
        notes=tuple(read_notes(report)),
        picture=picture,
        links=_links(execution),
    )
    return execution.ending


def as_it_stands(execution: Execution, publication: str) -> Ending:
    """Sum up an execution that had nothing to do: what is noted of its reports, and the page of the run before."""
    page = report_path(execution)
    notes = tuple(read_notes(report_of(execution, publication)))
    return Ending.of(execution, publication, notes=notes, report=page if page.is_file() else None)


def _headline_metrics(report: RunReport) -> dict[str, float]:
    """Return the comparisons' figures, so that MLflow can compare whole runs: `quality/merged/perplexity`."""
    return {
        f"{step.name}/{name}": value
        for step in report.steps
        if step.name in report.comparisons
        for name, value in step.metrics.items()
        if "/" in name
    }


def _links(execution: Execution) -> dict[str, str]:
    """Return the pages of MLflow that show this run and its report."""
    server = mlflow_url(execution.home)
    run = f"{server}/#/experiments/{execution.record.experiment}/runs/{execution.record.run_id}"
    # Else MLflow's pages take the run for one of an agent, and show traces.
    view = "?workflowType=machine_learning"
    return {"MLflow run": f"{run}{view}", "Report": f"{run}/artifacts/{REPORT}{view}"} if server else {}


def report_path(execution: Execution) -> Path:
    """Return where the report of a recipe's latest run lies."""
    return execution.home.root / "reports" / execution.plan.graph.loaded.name / REPORT


def show_latest(path: Path, content: bytes | None) -> None:
    """Put a part of the report where the latest run's lies. Of two runs that end at once, each leaves it whole."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, content)


def report_of(execution: Execution, publication: str) -> RunReport:
    """Gather what the report shows."""
    loaded = execution.plan.graph.loaded
    comparisons = {
        name: execution.home.store.path(state.entry.outputs[""])
        for name, state in execution.states.items()
        if state.entry and state.planned.node.kind.name in COMPARING
    }
    return RunReport(
        recipe=loaded.name,
        description=loaded.recipe.description,
        yaml=loaded.yaml,
        began=execution.began,
        seconds=(datetime.now(UTC) - execution.began).total_seconds(),
        steps=[_step(execution, state) for state in execution.states.values()],
        comparisons=comparisons,
        publication=publication,
        versions=versions(),
    )


def _step(execution: Execution, state: StepState) -> ReportStep:
    node, entry = state.planned.node, state.entry
    # The curve of a cached step lies in its own work directory as long as that is kept.
    metrics_file = execution.home.work(state.planned.key) / METRICS_NAME
    return ReportStep(
        name=node.name,
        kind=node.kind.name,
        status=state.outcome,
        seconds=entry.seconds if entry else state.seconds,
        peak_memory=entry.peak_memory if entry else 0,
        parents=tuple(node.parents),
        outputs=dict(entry.outputs) if entry else {},
        output_kinds={name: kind.kind for name, kind in node.outputs.items()},
        metrics=dict(entry.metrics) if entry else {},
        metrics_file=metrics_file if metrics_file.is_file() else None,
        message=state.message,
        notes=entry.notes if entry else (),
        chosen=_chosen(state),
    )


def _chosen(state: StepState) -> str:
    """Name the step whose output this one chose; nothing where choosing is not what it does."""
    node, entry = state.planned.node, state.entry
    if entry is None or node.kind.name != CHOOSING:
        return ""
    return node.edges["candidates"][int(entry.metrics["chosen"])].step
