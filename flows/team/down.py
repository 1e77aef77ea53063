"""`posttrain down`: stop the team's processes and all that they started."""

from dataclasses import dataclass

import psutil

from flows.reach import answers, reach_directly
from flows.team import processes
from flows.team.state import MLFLOW, PREFECT, Team, state_file
from registry.home import Home
from registry.index import Index
from steps.frame import UserError

_GRACE = 8
"""Seconds that a server has to close its database."""


@dataclass(frozen=True)
class Stopped:
    """What ended with the team, beside its own processes."""

    cut_off: list[str]
    """Names of the runs that the worker had begun."""
    without_server: list[str]
    """Commands of runs that others began, which used the Prefect server and now end."""


def down(home: Home) -> Stopped:
    """Stop everything and say which runs were cut off. Does nothing where nothing is up.

    Raises:
        UserError: a process could not be stopped; what is known of it is kept.
    """
    with Index(home.index).lock("team"):
        return stop(home)


def stop(home: Home) -> Stopped:
    """Do what `down` does; the caller holds the lock `team`.

    The worker and its flows are killed rather than asked: a worker takes over a minute to obey, and a flow may be
    killed at any moment and loses no finished step. Then the server is told what became of its runs.

    Raises:
        UserError: a process could not be stopped.
    """
    reach_directly()
    team = Team.read(home)
    servers = [team.services[name] for name in (PREFECT, MLFLOW) if name in team.services] if team else []
    spared = processes.tree(servers)
    processes.kill([process for process in _all(home, team) if process not in spared])
    cut_off = _tell_server(team) if team else []
    without_server = processes.runs_on(team.url(PREFECT)) if team else []
    processes.kill(_all(home, team), grace=_GRACE)
    if left := _all(home, team):
        told = ", ".join(f"{process.pid}" for process in left)
        raise UserError(f"these processes of the team still run and may not be stopped by this user: {told}")
    state_file(home).unlink(missing_ok=True)
    return Stopped(cut_off, without_server)


def _all(home: Home, team: Team | None) -> list[psutil.Process]:
    """Return the processes that carry the home's mark and those that the state file names, with all below them."""
    return list({*processes.members(home), *processes.tree(team.services.values() if team else ())})


def _tell_server(team: Team) -> list[str]:
    if not answers(f"{team.url(PREFECT)}/api/health"):
        return []
    from flows.team.runs import cancel_begun, client_of

    with client_of(team) as client:
        return cancel_begun(client)
