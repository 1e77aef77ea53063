"""The Prefect server behind a run: one that is already up, or one of our own for as long as the run takes."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

from flows.reach import LOOPBACK, answers, asking, is_absent, reach_directly, refusal
from flows.team.state import prefect_url
from registry.home import Home, silence_telemetry
from registry.index import Index
from steps.frame import UserError
from steps.frame.forkserver import die_with_parent

_START_TIMEOUT = 90
_ABSENCE = 60.0
"""Seconds after which a run gives up a server that others own."""
STARTING = "prefect"
"""Name of the lock on Prefect's database while a server makes or migrates its tables."""


class Readiness:
    """Whether a server answers yet; it is waited for in a thread of its own."""

    def __init__(self, wait: Callable[[], None] | None = None, ended: Callable[[], bool] | None = None) -> None:
        """Wait in the background; without `wait` it answers already."""
        self.ended = ended
        """Whether a server of our own has ended; None of one that others own."""
        self._error: Exception | None = None
        self._wait = wait
        self._thread = threading.Thread(target=self._watch, daemon=True, name="prefect-server-watch")
        self._thread.start()

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            UserError: it did not start.
        """
        self._thread.join()
        if self._error:
            raise self._error

    def _watch(self) -> None:
        try:
            if self._wait:
                self._wait()
        # Whatever it is: who waits must not take it for a server that answers.
        except Exception as error:
            self._error = error


class LocalServer:
    """A Prefect server on loopback with its SQLite database below the home.

    Prefect's ephemeral mode would need no server, but it loses the records of task runs when the process ends.
    """

    def __init__(self, home: Home) -> None:
        self.folder = home.root / "prefect"
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}/api"
        self.process: subprocess.Popen[bytes] | None = None
        # The servers of runs at one time share the database: only one may make its tables.
        self._starting = ExitStack()
        self._lock = Index(home.index).lock(STARTING)

    def start(self) -> None:
        """Start it; returns before it answers. Must be called from a thread that lives as long as the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._starting.enter_context(self._lock)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                server_command(self.port),
                env=server_environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The server goes when we go, even by SIGKILL; Ctrl-C is ours to answer.
                preexec_fn=_become_child,
            )

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            UserError: it ended, or did not answer in time.
        """
        process = self.process
        assert process is not None, "start() comes first"
        deadline = time.monotonic() + _START_TIMEOUT
        with self._starting:
            while not answers(f"{self.url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"the local Prefect server did not start; see {self.folder / 'server.log'}")
                time.sleep(0.1)

    def ended(self) -> bool:
        """Whether it has ended."""
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> None:
        """Stop it and wait for its end."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=8)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def prefect_api(home: Home) -> Iterator[tuple[str, Readiness]]:
    """Yield the API's URL, and what waits until it answers; a server of our own ends with the context.

    A server named by `PREFECT_API_URL`, or the one that `posttrain up` started, is used where it answers.
    """
    reach_directly()
    url = os.environ.get("PREFECT_API_URL") or ""
    team = "" if url else prefect_url(home)
    if url or (team and answers(f"{team}/health")):
        os.environ["PREFECT_API_URL"] = url or team
        # Prefect reads its settings once, when it is first imported.
        os.environ.setdefault("PREFECT_HOME", str(home.root / "prefect"))
        if url and (why := refusal(url)):
            said = str(why).partition("\n")[0] or type(why).__name__
            raise UserError(
                f"PREFECT_API_URL={url}: no Prefect server answers there ({said}); start it, or unset the variable"
            )
        yield url or team, Readiness()
        return
    server = LocalServer(home)
    server.start()
    os.environ["PREFECT_API_URL"] = server.url
    os.environ["PREFECT_HOME"] = str(server.folder)
    try:
        yield server.url, Readiness(server.wait, server.ended)
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.stop()


def wait_until_recorded(flow_run_id: UUID, tasks: int, timeout: float = 15) -> bool:
    """Send what this process still holds, and wait until the server has the end of every task run.

    Clients send logs and the states of task runs in the background, also after the flow has ended: a server that is
    stopped at once would show its last steps as running for ever, and this process would try for minutes to reach it.

    Returns:
        Whether the server has them all.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    deadline = time.monotonic() + timeout
    send_the_rest(timeout)
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
            if sum(bool(run.state and run.state.is_final()) for run in runs) >= tasks:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def send_the_rest(timeout: float) -> bool:
    """Send what Prefect's clients still hold; return whether all was sent within the timeout (seconds, for each kind).

    They also send when the interpreter ends, without any limit: by then the server has to be there, or nothing to send.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    sent = True
    for service in (APILogWorker, EventsWorker):
        ended = service.drain_all(timeout=timeout)
        assert isinstance(ended, tuple), "only a thread with an event loop gets something to await"
        sent = sent and not ended[1]
    return sent


@contextmanager
def watched(url: str, lost: Callable[[], None], ended: Callable[[], bool] | None = None) -> Iterator[None]:
    """Call `lost`, in a thread of its own, if the server of an API goes during the context.

    Args:
        url: of the API.
        lost: what to do then.
        ended: whether the process of a server of our own has ended. One that others own is asked, as Prefect's clients
            ask it; it may be away for a while, to be started anew, or because a tunnel is.
    """
    over = threading.Event()

    def look(away: Callable[[], bool]) -> None:
        last = time.monotonic()
        while not over.wait(0.5):
            if not away():
                last = time.monotonic()
            elif (ended or time.monotonic() - last > _ABSENCE) and not over.is_set():
                return lost()
        return None

    def watch() -> None:
        if ended:
            return look(ended)
        with asking(url) as client:
            return look(lambda: is_absent(client))

    threading.Thread(target=watch, daemon=True, name="prefect-server-lost").start()
    try:
        yield
    finally:
        over.set()


def server_command(port: int) -> list[str]:
    """Return the command that serves Prefect's API and UI on loopback."""
    app = "prefect.server.api.server:create_app"
    where = ["--host", LOOPBACK, "--port", str(port)]
    # A client that keeps its connection open must not hold up the end.
    ending = ["--timeout-graceful-shutdown", "2"]
    return [sys.executable, "-m", "uvicorn", "--factory", app, *where, *ending, "--log-level", "warning"]


def server_environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a server whose database lies in `folder`; telemetry is off unless asked for."""
    silence_telemetry()
    return {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        **(extra or {}),
    }


def free_port(wanted: int = 0) -> int:
    """Return a port on loopback that nobody listens on: the wanted one where it is free."""
    with socket.socket() as probe:
        try:
            # As servers do: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, wanted))
        except OSError:
            return free_port()
        return int(probe.getsockname()[1])


def _become_child() -> None:
    os.setpgrp()
    die_with_parent()
