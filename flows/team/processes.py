"""Processes that outlive their parent, and how to be sure that none is left."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows.reach import answers
from flows.team.state import Running
from registry.home import Home
from steps.frame import UserError

MARK = "POSTTRAIN_TEAM"
"""Environment variable that names the home; every process of the team inherits it, so that a scan finds them all."""
_PATIENCE = 10
"""Seconds within which a killed process is gone."""


def start(command: Sequence[str], environment: Mapping[str, str], home: Home, log: Path, url: str = "") -> Running:
    """Start a process in a session of its own, its output going to `log`; it stays when this one ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: str(home.root)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    return Running(pid=process.pid, created=psutil.Process(process.pid).create_time(), url=url, log=log)


def wait_for(name: str, service: Running, health: str, timeout: float = 90) -> None:
    """Wait until a page answers.

    Raises:
        UserError: the process ended, or did not answer in time.
    """
    deadline = time.monotonic() + timeout
    while not answers(health):
        if not service.alive:
            raise UserError(f"{name} ended while it started; see {service.log}")
        if time.monotonic() > deadline:
            raise UserError(f"{name} did not answer at {health} within {timeout:.0f} s; see {service.log}")
        time.sleep(0.1)


def members(home: Home) -> list[psutil.Process]:
    """Return every live process that carries the mark of this home: services, flows, fork servers, steps."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK)
            if mark and Path(mark).resolve() == home.root and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            # Another user's, a kernel thread, or one that has just ended.
            continue
    return [process for process in found if process.pid != os.getpid()]


def tree(running: Iterable[Running]) -> set[psutil.Process]:
    """Return the processes that still run and all their descendants."""
    found: set[psutil.Process] = set()
    for service in running:
        if service.alive:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(service.pid)
                found |= {process, *process.children(recursive=True)}
    return found


def runs_on(url: str) -> list[str]:
    """Return the commands, `run RECIPE ...`, of this user's runs that are connected to a server on this machine."""
    port = urlsplit(url).port
    connected = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.pid and port and connection.raddr and connection.raddr.port == port
    }
    found = []
    for pid in sorted(connected):
        with suppress(psutil.Error):
            words = psutil.Process(pid).cmdline()
            if "run" in words:
                found.append(shlex.join(words[words.index("run") :]))
    return found


def kill(processes: Collection[psutil.Process], *, grace: float = 0) -> None:
    """End processes: asked first where there is a grace (seconds), then killed; returns when they are gone."""
    if grace:
        _signal(processes, signal.SIGTERM)
        _, processes = psutil.wait_procs(processes, timeout=grace)
    _signal(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=_PATIENCE)


def _signal(processes: Collection[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            # It has ended, or is another user's: whoever asked looks who is left.
            continue
