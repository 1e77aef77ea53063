"""What Prefect's pages show of a run beyond its states: progress, outcome, gate decision, table, picture, links."""

import base64
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException

from flows.ending import Ending
from registry.gates import GateDecision, GateOutcome

_INTERVAL = 2.0
"""Seconds between two updates of one step's progress."""


class Progress:
    """A progress bar for each running step. Called from each step's own thread, within its task run.

    A step that began before its task run did (see `Execution.run_early`) has no task run to draw a bar on.
    """

    def __init__(self) -> None:
        self._bars: dict[str, tuple[UUID, float]] = {}

    def show(self, name: str, values: Mapping[str, Any]) -> None:
        """Draw or move the bar of a step; `values` holds `done` and `total`."""
        if TaskRunContext.get() is None:
            return
        percent = 100 * float(values.get("done", 0)) / (float(values.get("total", 0)) or 1)
        bar, at = self._bars.get(name, (None, 0.0))
        if bar is not None and percent < 100 and time.monotonic() - at < _INTERVAL:
            return
        if bar is None:
            bar = _shown(create_progress_artifact, progress=percent, key=slug("progress", name), description=name)
        else:
            _shown(update_progress_artifact, artifact_id=bar, progress=percent)
        if bar is not None:
            self._bars[name] = (bar, time.monotonic())


def show_ending(ending: Ending) -> None:
    """Show how a run ended: the outcome and its gates, a row a step, the comparison, and where the rest lies."""
    recipe = ending.recipe
    _shown(create_markdown_artifact, key=slug(recipe, "outcome"), markdown=outcome(ending), description="How it ended")
    _shown(create_table_artifact, key=slug(recipe, "steps"), table=ending.table, description="Steps")
    if ending.picture:
        data = base64.b64encode(ending.picture).decode()
        address = f"data:image/png;base64,{data}"
        _shown(
            create_image_artifact, key=slug(recipe, "comparison"), image_url=address, description="Quality against size"
        )
    for name, address in ending.links.items():
        _shown(create_link_artifact, key=slug(recipe, name), link=address, link_text=name, description=name)


def show_unchanged(recipe: str, sentence: str) -> None:
    """Show that there was nothing to do."""
    markdown = f"## {recipe}: unchanged\n\n{sentence}\n"
    _shown(create_markdown_artifact, key=slug(recipe, "outcome"), markdown=markdown, description="How it ended")


def outcome(ending: Ending) -> str:
    """Write the outcome in Markdown: one sentence, the gates one by one, and where the report lies."""
    lines = [f"## {ending.recipe}: {ending.verdict}", "", ending.sentence, ""]
    decision = ending.release.decision if ending.release else None
    if decision and decision.outcomes:
        lines += [*_gate_table(decision), ""]
    if ending.report:
        lines.append(f"Report: `{ending.report}`")
    return "\n".join(lines) + "\n"


def slug(*words: str) -> str:
    """Join words as Prefect's artifact keys allow: lower-case letters, digits and dashes.

    >>> slug("pico", "gguf[Q4_K_M]")
    'pico-gguf-q4-k-m'
    """
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _gate_table(decision: GateDecision) -> list[str]:
    head = ["| gate | member | held | candidate | champion |", "| --- | --- | --- | --- | --- |"]
    said = [f"- {each.sentence}" for each in decision.outcomes]
    return [*head, *map(_gate_row, decision.outcomes), "", *said]


def _gate_row(each: GateOutcome) -> str:
    values = ["" if value is None else f"{value:.4g}" for value in (each.value, each.champion)]
    return f"| {' | '.join([each.gate.metric, each.member, 'yes' if each.passed else '**no**', *values])} |"


def _shown(create: Callable[..., Any], **values: Any) -> Any:
    """Make an artifact; a server that does not take it must not fail the step that it is about."""
    try:
        return create(**values)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("Prefect did not take artifact %s: %s", values.get("key", ""), error)
        return None
