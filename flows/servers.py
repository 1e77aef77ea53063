"""The Prefect server behind a run: one that is already up, or one of our own for as long as the run takes."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from registry.home import Home, silence_telemetry
from steps.frame import UserError
from steps.frame.forkserver import die_with_parent

_START_TIMEOUT = 90


class LocalServer:
    """A Prefect server on loopback with its SQLite database below the home.

    Prefect's ephemeral mode would need no server, but it loses the records of task runs when the process ends.
    """

    def __init__(self, home: Home) -> None:
        self.folder = home.root / "prefect"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns before it answers. Must be called from a thread that lives as long as the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
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
        while not is_healthy(self.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the local Prefect server did not start; see {self.folder / 'server.log'}")
            time.sleep(0.1)

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
def prefect_api(home: Home) -> Iterator[tuple[str, threading.Event]]:
    """Yield the API's URL and an event that is set once it answers; a server of our own ends with the context.

    A server named by `PREFECT_API_URL` is used where it answers.
    """
    ready = threading.Event()
    url = os.environ.get("PREFECT_API_URL", "")
    if url and is_healthy(url):
        ready.set()
        yield url, ready
        return
    if url:
        raise UserError(f"PREFECT_API_URL={url}: no Prefect server answers there; start it, or unset the variable")
    server = LocalServer(home)
    server.start()
    os.environ["PREFECT_API_URL"] = server.url
    os.environ["PREFECT_HOME"] = str(server.folder)
    try:
        yield server.url, _set_when_up(server, ready)
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.stop()


def server_command(port: int) -> list[str]:
    """Return the command that serves Prefect's API and UI on loopback."""
    app = "prefect.server.api.server:create_app"
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", "--factory", app, *where, "--log-level", "warning"]


def server_environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a server whose database lies in `folder`; telemetry is off unless asked for."""
    silence_telemetry()
    return {
        **os.environ,
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        **(extra or {}),
    }


def is_healthy(url: str) -> bool:
    """Whether a Prefect API answers at `url`."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _set_when_up(server: LocalServer, ready: threading.Event) -> threading.Event:
    def watch() -> None:
        try:
            server.wait()
        finally:
            ready.set()

    threading.Thread(target=watch, daemon=True, name="prefect-server-watch").start()
    return ready


def _become_child() -> None:
    os.setpgrp()
    die_with_parent()
