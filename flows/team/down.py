"""`posttrain down`: stop the team's processes and all that they started."""

from flows.team import processes
from flows.team.state import MLFLOW, PREFECT, Team, state_file
from registry.home import Home
from registry.index import Index

_GRACE = 8
"""Seconds that a server has to close its database."""


def down(home: Home) -> list[str]:
    """Stop everything; return the names of the runs that were cut off. Does nothing where nothing is up."""
    with Index(home.index).lock("team"):
        return stop(home)


def stop(home: Home) -> list[str]:
    """Do what `down` does; the caller holds the lock `team`.

    The worker and its flows are killed rather than asked: a worker takes over a minute to obey, and a flow may be
    killed at any moment and loses no finished step. Then the server is told what became of its runs.
    """
    team = Team.read(home)
    servers = [team.services[name] for name in (PREFECT, MLFLOW) if name in team.services] if team else []
    spared = processes.tree(servers)
    processes.kill([process for process in processes.members(home) if process.pid not in spared])
    stopped = _tell_server(team) if team else []
    processes.kill(processes.members(home), grace=_GRACE)
    state_file(home).unlink(missing_ok=True)
    return stopped


def _tell_server(team: Team) -> list[str]:
    if not processes.answers(f"{team.url(PREFECT)}/api/health"):
        return []
    from flows.team.runs import cancel_begun, client_of

    with client_of(team) as client:
        return cancel_begun(client)
