"""The flow `lifecycle`: a recipe's steps as Prefect tasks, then its report and its publication."""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture, wait
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.execution import Execution, StepState
from flows.finish import finish
from flows.prepare import prepare
from steps.frame import UserError

prepared: ContextVar[Execution | None] = ContextVar("prepared", default=None)
"""An execution that the command line has already planned; a worker plans its own."""

board: ContextVar[Any] = ContextVar("board", default=None)
"""What shows the run on a terminal, see `flows.terminal.Board`; None where there is none."""


@flow(
    name="lifecycle",
    flow_run_name="{recipe}",
    description="Run a recipe: every step once, its results recorded in MLflow, its family published.",
    task_runner=ThreadPoolTaskRunner(max_workers=16),  # pyright: ignore[reportArgumentType]
    persist_result=False,
    result_serializer="json",
)
def lifecycle(recipe: str, overrides: list[str] | None = None, publish: bool = True) -> dict[str, Any] | State:
    """Run a recipe.

    Args:
        recipe: name of a file in `recipes/` (without `.yaml`), or a path.
        overrides: `path=value` texts, e.g. `steps.sft.epochs=2`.
        publish: whether to register the family that the recipe publishes.
    """
    try:
        execution = prepared.get() or prepare(recipe, overrides or [])
    except UserError as error:
        return Failed(message=str(error))
    execution.warm_up()
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        for step in execution.plan.steps.values():
            parents = [futures[name] for name in step.node.parents]
            futures[step.name] = _step_task(execution, step.name).submit(wait_for=parents)
        wait(list(futures.values()))
        ending = finish(execution, publish=publish)
    except BaseException:
        execution.close(ok=False)
        raise
    summary = ending.summary()
    if not ending.ok:
        return Failed(message=ending.sentence, data=None)
    return summary


def _step_task(execution: Execution, name: str) -> Any:
    """Make the task of one step; it carries the step's name, so Prefect's UI reads as the recipe."""

    def run_step() -> State:
        show = board.get()
        if show:
            show.started(name)
        state = execution.run(name)
        if show:
            show.ended(state)
        return _as_prefect(state)

    kind = execution.plan.steps[name].node.kind
    return task(name=name, task_run_name=name, description=kind.summary, tags=[kind.name], persist_result=False)(
        run_step
    )


def _as_prefect(state: StepState) -> State:
    """Translate a step's outcome; a failure is a state, not an exception, so that no traceback is logged."""
    logger = get_run_logger()
    if state.outcome in ("failed", "refused"):
        logger.error("%s: %s", state.planned.name, state.message)
        return Failed(message=state.message)
    logger.info("%s: %s in %.1f s", state.planned.name, state.outcome, state.seconds)
    return Completed(name="Cached" if state.outcome == "cached" else "Completed", message=state.message or None)


class ProgressArtifacts:
    """Prefect progress artifacts, one a running step, updated every two seconds at most."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, float]] = {}

    def show(self, name: str, shown: Mapping[str, Any], now: float) -> None:
        """Create or update the artifact of a step."""
        percent = 100 * float(shown.get("done", 0)) / (float(shown.get("total", 0)) or 1)
        if name not in self._made:
            key = f"progress-{slug(name)}"
            made = create_progress_artifact(progress=percent, key=key, description=f"Progress of `{name}`")
            self._made[name] = (made, now)
        elif now - self._made[name][1] > 2 or percent >= 100:
            update_progress_artifact(artifact_id=self._made[name][0], progress=percent)
            self._made[name] = (self._made[name][0], now)


def slug(name: str) -> str:
    """Return a name as Prefect's artifact keys allow: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


__all__ = ["board", "lifecycle", "prepared"]
