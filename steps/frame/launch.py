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

from steps.artifacts import write_atomic
from steps.frame.scale import environment, launch_command, open_to_nodes
from steps.frame.spec import LOG_NAME, PROGRESS_NAME, RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from steps.runtime.death import fatal_error, fatal_library, how_it_ended, is_native_death, last_words
from steps.runtime.proof import all_proofs

OnProgress = Callable[[Mapping[str, Any]], None]
_TAIL = 65536
"""Bytes of a log in which a death is looked for."""


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
        self._closed = False
        self._server_log_began = 0

    def warm_up(self) -> None:
        """Start the fork server if it is not running yet; returns at once."""
        with self._lock:
            if self._server is not None or self._closed:
                return
            ours, theirs = socket.socketpair()
            self._log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "steps.frame.forkserver", str(theirs.fileno()), *self._preload]
            surroundings = environment()
            with self._log.open("ab") as log:
                self._server_log_began = log.tell()
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
        dies without a result (killed, out of memory) becomes a `failed` result that names the signal, one that `close`
        ended a `failed` result that says so.
        """
        spec.work.mkdir(parents=True, exist_ok=True)
        for name in (RESULT_NAME, PROGRESS_NAME):
            (spec.work / name).unlink(missing_ok=True)
        log_began = _size(spec.work / LOG_NAME)
        path = spec.work / SPEC_NAME
        write_atomic(path, spec.model_dump_json().encode())
        self.warm_up()
        job = next(self._ids)
        fresh = bool(python) or spec.resources.world > 1
        command = launch_command(spec.resources, python or sys.executable) if fresh else []
        with open_to_nodes(spec):
            self._send({"id": job, "spec": str(path), "command": command})
            message = self._wait(job, spec, on_progress)
        if message.get("server"):
            why = "stopped with its run" if self._closed else self._server_end()
            return StepResult(status="failed", message=why)
        return _read_result(spec, message, log_began)

    def _server_end(self) -> str:
        """Say how the fork server ended, in which the libraries of all steps are loaded."""
        server = self._server
        code = server.wait(timeout=5) if server else 0
        return _told(f"the fork server {how_it_ended(code)}", self._log, self._server_log_began)

    def close(self) -> None:
        """End the fork server and every step with it; what is to be run from then on has failed."""
        with self._changed:
            self._closed = self._gone = True
            self._changed.notify_all()
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


def _read_result(spec: StepSpec, message: Mapping[str, Any], log_began: int) -> StepResult:
    """Read what became of a step; where its process or a child of it died, say of what and in which library.

    Args:
        spec: the step.
        message: what the fork server says of its process.
        log_began: where in the step's log this attempt begins.
    """
    path, log = spec.work / RESULT_NAME, spec.work / LOG_NAME
    if path.exists():
        result = StepResult.model_validate_json(path.read_bytes())
        if result.status == "failed" and "died of SIG" in result.message:
            return result.model_copy(update={"message": _told(result.message, log, log_began)})
        return result
    code = int(message["code"])
    if message.get("timeout"):
        why = f"killed after its timeout of {spec.resources.timeout_minutes:g} minutes"
    else:
        why = f"its process {how_it_ended(code)}"
        if code >= 0:
            death = fatal_error(_tail(log, log_began))
            why += " and no result" + (f", one of several died: {death}" if death else "")
    peak = int(message.get("peak_memory", 0))
    return StepResult(status="failed", message=_told(why, log, log_began), peak_memory=peak)


def _told(why: str, log: Path, began: int) -> str:
    """Add to what happened the native library in play, what is to be done, the last lines of the log, and its place."""
    text = _tail(log, began)
    parts = [why]
    if (library := fatal_library(text)) and is_native_death(why):
        parts[0] += f" in {library}"
        runtimes = [proof.runtime for proof in all_proofs().values() if library in (proof.module, *proof.beside)]
        if runtimes:
            parts.append(f"`posttrain doctor {runtimes[0]}` tells whether it works on this machine")
    if words := last_words(text):
        parts.append("it last said: " + " | ".join(words))
    return "; ".join([*parts, f"see {log}"])


def _tail(log: Path, began: int) -> str:
    """Return what a log says from `began` on, its last 64 KB at most."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(began, _size(log) - _TAIL))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_progress(work: Path) -> Mapping[str, Any]:
    try:
        return json.loads((work / PROGRESS_NAME).read_text())
    except (OSError, ValueError):
        return {}
