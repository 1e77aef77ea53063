"""Processes that outlive their parent, and how to be sure that none is left."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from flows.team.state import Running
from registry.home import Home
from steps.frame import UserError

MARK = "POSTTRAIN_TEAM"
"""Environment variable that names the home; every process of the team inherits it, so that a scan finds them all."""


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


def answers(url: str) -> bool:
    """Whether a page answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def members(home: Home) -> list[psutil.Process]:
    """Return every live process that carries the mark of this home: services, flows, fork servers, steps."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home.root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            # Another user's, a kernel thread, or one that has just ended.
            continue
    return [process for process in found if process.pid != os.getpid()]


def tree(running: Collection[Running]) -> set[int]:
    """Return the ids of the processes and of all their descendants."""
    found: set[int] = set()
    for service in running:
        if service.alive:
            children = psutil.Process(service.pid).children(recursive=True)
            found |= {service.pid, *(child.pid for child in children)}
    return found


def kill(processes: Collection[psutil.Process], *, grace: float = 0) -> None:
    """End processes: asked first where there is a grace (seconds), then killed; returns when they are gone."""
    if grace:
        _signal(processes, signal.SIGTERM)
        _, processes = psutil.wait_procs(processes, timeout=grace)
    _signal(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def _signal(processes: Collection[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
