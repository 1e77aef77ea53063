"""`posttrain up`: start the team's processes, or say that they are up."""

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from flows.reach import LOOPBACK, reach_directly
from flows.servers import STARTING, free_port, server_command, server_environment
from flows.team import processes
from flows.team.down import stop
from flows.team.state import MLFLOW, PREFECT, WORKER, Running, Team, folder
from registry.home import Home, silence_telemetry
from registry.index import Index
from steps.frame import UserError

PREFECT_PORT = 4200
MLFLOW_PORT = 5000
_WORKER_TIMEOUT = 60


def up(home: Home, say: Callable[[str], None]) -> Team:
    """Start what is not up and renew the deployments; a start that fails leaves nothing running.

    Args:
        home: whose history the servers show.
        say: shows one line of progress.

    Raises:
        UserError: a process did not start, or `infra/prefect.yaml` or a recipe's schedule is wrong.
    """
    silence_telemetry()
    # Also the worker's flows, which inherit the environment.
    reach_directly()
    _check_deployments()
    with Index(home.index).lock("team"):
        team = Team.read(home)
        if team and team.complete:
            if team.root != Path.cwd():
                raise UserError(f"this home's team was started in {team.root}; call `up` there, or `down` first")
            say("Already up; the deployments are renewed.")
            _deploy(team, home, say)
            return team
        if team or processes.members(home):
            say("An earlier team did not end well: its processes are stopped first.")
            stop(home)
        try:
            return _start(home, say)
        except BaseException:
            stop(home)
            raise


def _start(home: Home, say: Callable[[str], None]) -> Team:
    """Start the servers side by side, then the deployments, then the worker."""
    team = Team(root=Path.cwd())
    # Two processes must not both make the tables of one database; `flows.servers` and `registry.tracking` take the
    # same locks.
    with Index(home.index).lock(STARTING):
        team.services[PREFECT] = _start_prefect(home)
        team.write(home)
        if not home.has_server:
            with Index(home.index).lock("database"):
                team.services[MLFLOW] = _start_mlflow(home)
                team.write(home)
                processes.wait_for("MLflow", team.services[MLFLOW], f"{team.url(MLFLOW)}/health")
            say(f"MLflow   {team.url(MLFLOW)}")
        processes.wait_for("Prefect", team.services[PREFECT], f"{team.url(PREFECT)}/api/health")
    say(f"Prefect  {team.url(PREFECT)}")
    _deploy(team, home, say, fresh=True)
    team.services[WORKER] = _start_worker(home, team.url(PREFECT))
    team.write(home)
    _wait_for_worker(team)
    say("Worker   polls the pool `local`, one recipe at a time")
    return team


def _check_deployments() -> None:
    """Refuse a wrong file or schedule before anything starts."""
    from flows.team.deployments import nightly_schedules, read_deployments

    read_deployments()
    nightly_schedules()


def _start_prefect(home: Home) -> Running:
    port = free_port(PREFECT_PORT)
    url = f"http://{LOOPBACK}:{port}"
    # The same database as that of a run's own server: one history. The UI's pages ask the API at the URL they are told.
    environment = server_environment(home.root / "prefect", {"PREFECT_UI_API_URL": f"{url}/api"})
    (home.root / "prefect").mkdir(parents=True, exist_ok=True)
    return processes.start(server_command(port), environment, home, folder(home) / "prefect.log", url)


def _start_mlflow(home: Home) -> Running:
    """Start MLflow's server over the files that embedded MLflow writes, so that all earlier runs are in it."""
    port = free_port(MLFLOW_PORT)
    home.mlruns.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", home.tracking_uri, "--artifacts-destination", str(home.mlruns)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    url = f"http://{LOOPBACK}:{port}"
    return processes.start(command, environment, home, folder(home) / "mlflow.log", url)


def _start_worker(home: Home, prefect: str) -> Running:
    """Start the worker; its flows inherit the environment.

    Flows on this machine write MLflow's database themselves and link artifacts into place, as `posttrain run` does:
    through the server every model would be uploaded, and so stored twice. The team's MLflow server only shows and
    hands out what they wrote. Where `MLFLOW_TRACKING_URI` names a server, flows and commands alike use that one.
    """
    from flows.team.deployments import POOL

    environment = {
        **os.environ,
        "POSTTRAIN_HOME": str(home.root),
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": str(home.root / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # By these beats a server can tell a flow that lives from one whose worker was killed with it.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    # A recipe fills the machine: a second one waits in the pool.
    options = ["--pool", POOL, "--type", "process", "--name", "local", "--limit", "1"]
    command = [sys.executable, "-m", "prefect", "worker", "start", *options]
    return processes.start(command, environment, home, folder(home) / "worker.log")


def _deploy(team: Team, home: Home, say: Callable[[str], None], *, fresh: bool = False) -> None:
    from flows.team.deployments import deploy
    from flows.team.runs import client_of, close_lost, skip_missed

    with client_of(team) as client:
        for name, recipes in deploy(client, team.root).items():
            say(f"Deployed {name}" + (f", scheduled: {', '.join(recipes)}" if recipes else ""))
        if fresh:
            lost, missed = close_lost(client), skip_missed(client)
            if lost or missed:
                say(f"Closed {len(lost)} runs that a killed worker had left, skipped {len(missed)} missed nights.")


def _wait_for_worker(team: Team) -> None:
    """Wait until the server has heard of the new worker."""
    from flows.team.deployments import POOL
    from flows.team.runs import client_of

    worker = team.services[WORKER]
    began = datetime.fromtimestamp(worker.created, UTC)
    deadline = time.monotonic() + _WORKER_TIMEOUT
    with client_of(team) as client:
        while True:
            beats = [each.last_heartbeat_time for each in client.read_workers_for_work_pool(POOL)]
            if any(beat and beat > began for beat in beats):
                return
            if not worker.alive or time.monotonic() > deadline:
                raise UserError(f"the worker did not start; see {worker.log}")
            time.sleep(0.2)
