"""The flow `lifecycle`: a recipe's steps as Prefect tasks, then its report and its publication."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.ending import Ending
from flows.execution import Execution, StepState
from flows.finish import finish
from flows.prefect_artifacts import Progress, show_ending
from flows.prepare import prepare
from flows.terminal import Board
from registry.errors import RegistryError
from steps.frame import UserError

prepared: ContextVar[Execution | None] = ContextVar("prepared", default=None)
"""An execution that the command line has already planned; a worker plans its own."""

board: ContextVar[Board | None] = ContextVar("board", default=None)
"""What shows the run on a terminal; None where there is none."""


def run_name() -> str:
    """Return the recipe's name and profile, by which the UI lists a run; a recipe may be given as a path."""
    profile = flow_run.parameters.get("profile")
    return Path(flow_run.parameters["recipe"]).stem + (f"@{profile}" if profile else "")


@flow(name="lifecycle", flow_run_name=run_name, persist_result=False, result_serializer="json")
def lifecycle(recipe: str, profile: str = "", overrides: Sequence[str] = (), publish: bool = True) -> State:
    """Run a recipe from its data to a published family.

    Args:
        recipe: Name of a file in `recipes/`.
        profile: One of the recipe's profiles, such as `pico`; empty for the recipe as it stands.
        overrides: Keys of the recipe to change for this run, each as path=value: `steps.sft.epochs=2`.
        publish: Register the family that the recipe publishes; its gates decide on the champion.
    """
    try:
        execution = prepared.get() or prepare(recipe, overrides, profile=profile)
    except (UserError, RegistryError) as error:
        return Failed(message=str(error))
    ending = run_steps(execution, publish=publish)
    return Completed(message=ending.sentence) if ending.ok else Failed(message=ending.sentence)


def run_steps(execution: Execution, *, publish: bool) -> Ending:
    """Run every step as a task of the current flow run, publish, report, and show all of it in Prefect."""
    progress, shown = Progress(), board.get()

    def on_progress(name: str, values: Mapping[str, Any]) -> None:
        progress.show(name, values)
        if shown:
            shown.progress(name, values)

    execution.on_progress = on_progress
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
    show_ending(ending)
    return ending


def _step_task(execution: Execution, name: str) -> Any:
    """Make the task of one step; it carries the step's name, so Prefect's UI reads as the recipe."""

    def run_step() -> State:
        shown = board.get()
        if shown:
            shown.started(name)
        state = execution.run(name)
        if shown:
            shown.ended(state)
        return _as_prefect(state)

    kind = execution.plan.steps[name].node.kind
    make = task(name=name, task_run_name=name, description=kind.summary, tags=[kind.name], persist_result=False)
    return make(run_step)


def _as_prefect(state: StepState) -> State:
    """Translate a step's outcome; a failure is a state, not an exception, so that no traceback is logged."""
    logger = get_run_logger()
    if state.outcome in ("failed", "refused"):
        logger.error("%s: %s", state.planned.name, state.message)
        return Failed(message=state.message)
    logger.info("%s: %s in %.1f s", state.planned.name, state.outcome, state.seconds)
    return Completed(name="Cached" if state.outcome == "cached" else "Completed", message=state.message or None)
