"""`posttrain run`: plan, show, and run under a Prefect server of our own where none is up."""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.cli.tables import plan_table
from flows.ending import Ending
from flows.execution import Execution
from flows.finish import as_it_stands
from flows.prepare import prepare
from flows.publication import is_current
from flows.runtimes import Say
from flows.terminal import Board
from flows.units import duration
from registry.home import Home

if TYPE_CHECKING:
    from flows.servers import Readiness

_SENDING = 5.0
"""Seconds that Prefect's clients have to send the last of a run that was stopped."""
_CLOSING = 20.0
"""Seconds in which the steps and the record in MLflow of such a run are to be closed."""


def run_recipe(recipe: str, overrides: Sequence[str], *, profile: str = "", publish: bool, console: Console) -> Ending:
    """Run a recipe to its end and show it.

    Where every step is cached and the publication is current there is nothing for Prefect or MLflow to do, so
    neither is started.

    Raises:
        UserError: the recipe is wrong, or a step cannot run here.
    """
    home = Home.from_environment(writes=True)
    say = partial(console.print, highlight=False, markup=False, emoji=False, soft_wrap=True)
    execution = prepare(recipe, overrides, profile=profile, home=home, say=say)
    if not execution.plan.todo and (not publish or is_current(execution)):
        for name in execution.plan.steps:
            execution.run(name)
        console.print(plan_table(execution.plan))
        ending = as_it_stands(execution, is_current(execution).sentence if publish else "")
        return _told(ending, "Nothing to do.", say)
    names = list(execution.plan.steps)
    board = Board(names, {name: step.node.kind.name for name, step in execution.plan.steps.items()}, console)
    with ExitStack() as stack:
        parameters = {"recipe": recipe, "profile": profile, "overrides": list(overrides), "publish": publish}
        ending = _under_prefect(execution, board, stack, parameters)
    console.print(board.render())
    return _told(ending, f"({duration(ending.seconds)})", say)


def _told(ending: Ending, more: str, say: Say) -> Ending:
    """Say how it ended, what must be known beside the figures, and where the report lies."""
    say(f"{ending.sentence} {more}")
    for note in ending.notes:
        say(f"Note: {note}.")
    if ending.report:
        say(f"Report: {ending.report}")
    return ending


def _under_prefect(execution: Execution, board: Board, stack: ExitStack, parameters: dict[str, Any]) -> Ending:
    from flows.servers import prefect_api

    home = execution.home
    # Imports, migrations and the first steps take seconds: they overlap with the server's start. The fork server looks
    # how busy the machine is, so it comes before our own server makes it so.
    execution.warm_up()
    url, ready = stack.enter_context(prefect_api(home))
    try:
        execution.run_early()
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        # Prefect would write half a line wherever the cursor stands for each log that it cannot send.
        logging.raiseExceptions = False
        ready.wait()
        return _flow(execution, board, url, ready, parameters)
    except BaseException as error:
        execution.launcher.close()
        _let_go(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def _flow(execution: Execution, board: Board, url: str, ready: "Readiness", parameters: dict[str, Any]) -> Ending:
    """Run the flow under the server at `url`, which answers."""
    from flows.lifecycle import board as shown
    from flows.lifecycle import lifecycle, prepared
    from flows.servers import wait_until_recorded, watched

    prepared.set(execution)
    shown.set(board)
    with watched(url, partial(_give_up, execution, board, url), ready.ended):
        with board.live():
            state = lifecycle(**parameters, return_state=True)
        if state.state_details.flow_run_id:
            wait_until_recorded(state.state_details.flow_run_id, len(execution.plan.steps))
    if execution.ending is None:
        # What broke is no step's failure but our own: show it as the exception it is.
        state.result(raise_on_failure=True)
        raise RuntimeError(f"the flow ended as {state.name} without an ending: {state.message}")
    return execution.ending


def _let_go(code: int) -> None:
    """Send what Prefect's clients hold while the server is there; should that fail, end without them, with `code`."""
    from flows.servers import send_the_rest

    if not send_the_rest(_SENDING):
        watchdog = threading.Timer(_SENDING, os._exit, (code,))
        watchdog.daemon = True
        watchdog.start()


def _give_up(execution: Execution, board: Board, url: str) -> None:
    """End this process, because its Prefect server is gone: Prefect's clients would try for minutes to reach it."""
    closing = threading.Thread(target=execution.close, kwargs={"ok": False}, daemon=True, name="closing")
    closing.start()
    closing.join(_CLOSING)
    board.console.show_cursor()
    why = f"the Prefect server at {url} has gone; what had finished is kept, run the same command again to go on"
    print(f"error: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
