"""Launch steps in processes of their own, through the fork server, and wait for them."""

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.frame.scale import environment, launch_command, open_to_nodes
from steps.frame.spec import LOG_NAME, PROGRESS_NAME, RESULT_NAME, SPEC_NAME, StepResult, StepSpec

OnProgress = Callable[[Mapping[str, Any]], None]


class Launcher:
    """Starts step processes; safe to use from several threads.

    The fork server is started by `warm_up` (or by the first step) and its imports go on in the background, so that
    they overlap with whatever else a flow does first. `close` kills what still runs.
    """

    def __init__(self, preload: Sequence[str], log: Path) -> None:
        self._preload = list(preload)
        self._log = log
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._exits: dict[int, Mapping[str, Any]] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._gone = False

    def warm_up(self) -> None:
        """Start the fork server if it is not running yet; returns at once."""
        with self._lock:
            if self._server is not None:
                return
            ours, theirs = socket.socketpair()
            self._log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "steps.frame.forkserver", str(theirs.fileno()), *self._preload]
            surroundings = environment()
            with self._log.open("ab") as log:
                log.write(f"GOMP_SPINCOUNT={surroundings['GOMP_SPINCOUNT']}\n".encode())
                log.flush()
                self._server = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=surroundings,
                    start_new_session=True,
                )
            theirs.close()
            self._link = ours
            threading.Thread(target=self._listen, args=(ours,), daemon=True, name="fork-server-listener").start()

    def run(self, spec: StepSpec, on_progress: OnProgress | None = None, python: str = "") -> StepResult:
        """Run one step to its end.

        It is a fork of the server's, unless it asks for several processes or for an interpreter of another environment,
        `python`: then the fork becomes the command that starts them.

        A step that outlives its timeout is terminated, then killed, with its whole process group. A process that
        dies without a result (killed, out of memory) becomes a `failed` result that names the signal.
        """
        spec.work.mkdir(parents=True, exist_ok=True)
        for name in (RESULT_NAME, PROGRESS_NAME):
            (spec.work / name).unlink(missing_ok=True)
        path = spec.work / SPEC_NAME
        path.write_text(spec.model_dump_json())
        self.warm_up()
        job = next(self._ids)
        fresh = bool(python) or spec.resources.world > 1
        command = launch_command(spec.resources, python or sys.executable) if fresh else []
        with open_to_nodes(spec):
            self._send({"id": job, "spec": str(path), "command": command})
            message = self._wait(job, spec, on_progress)
        return _read_result(spec, message)

    def close(self) -> None:
        """End the fork server and every step with it."""
        with self._lock:
            server, link = self._server, self._link
            self._server = self._link = None
        if link is not None:
            link.shutdown(socket.SHUT_RDWR)
            link.close()
        if server is not None:
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _wait(self, job: int, spec: StepSpec, on_progress: OnProgress | None) -> Mapping[str, Any]:
        limit = spec.resources.timeout_minutes * 60
        began = time.monotonic()
        last: Mapping[str, Any] = {}
        asked_to_stop = 0.0
        while True:
            with self._changed:
                if job not in self._exits and not self._gone:
                    self._changed.wait(timeout=0.25)
                if job in self._exits:
                    message = self._exits.pop(job)
                    return {**message, "timeout": True} if asked_to_stop else message
                if self._gone:
                    return {"code": -signal.SIGKILL, "server": True}
            now = time.monotonic()
            if limit and now - began > limit and now - asked_to_stop > 10:
                self._send({"id": job, "signal": int(signal.SIGKILL if asked_to_stop else signal.SIGTERM)})
                asked_to_stop = now
            if on_progress and (found := _read_progress(spec.work)) != last and found:
                last = found
                on_progress(found)

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            if self._link is not None and not self._gone:
                self._link.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, link: socket.socket) -> None:
        buffer = b""
        while True:
            try:
                data = link.recv(65536)
            except OSError:
                data = b""
            with self._changed:
                if not data:
                    self._gone = True
                    self._changed.notify_all()
                    return
                buffer += data
                *lines, buffer = buffer.split(b"\n")
                for message in map(json.loads, lines):
                    if "code" in message:
                        self._exits[message["id"]] = message
                self._changed.notify_all()


def _read_result(spec: StepSpec, message: Mapping[str, Any]) -> StepResult:
    path = spec.work / RESULT_NAME
    if path.exists():
        return StepResult.model_validate_json(path.read_bytes())
    code = int(message["code"])
    if message.get("timeout"):
        why = f"killed after its timeout of {spec.resources.timeout_minutes:g} minutes"
    elif message.get("server"):
        why = "the fork server ended"
    elif code < 0:
        why = f"its process died of {signal.Signals(-code).name}"
    else:
        why = f"its process ended with code {code} and no result"
    peak = int(message.get("peak_memory", 0))
    return StepResult(status="failed", message=f"{why}; see {spec.work / LOG_NAME}", peak_memory=peak)


def _read_progress(work: Path) -> Mapping[str, Any]:
    try:
        return json.loads((work / PROGRESS_NAME).read_text())
    except (OSError, ValueError):
        return {}
