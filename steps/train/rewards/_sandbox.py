"""Where answers are run and checked: in processes that are confined by the kernel and end in time.

What is always so: a process group of its own, limits on memory (for each process), processor time, wall time, file
size and open files, an environment without the caller's variables, a temporary working directory. Where the kernel
allows namespaces (Linux, unless a container forbids them): no network at all, a file system that cannot be changed
and, for answers, shows only Python and the system's libraries, a limit on the number of processes, and no process that
survives. Where it does not: Python code is refused sockets and other programs by an audit hook, which keeps honest
mistakes off the network, not an attacker; what then does not hold is logged once.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import IO, Any

from steps.frame.errors import UserError
from steps.frame.pinned import check_unedited
from steps.frame.scale import cores
from steps.train.rewards import _confined

TIMED_OUT = 124
"""Exit code where time ran out."""
_NOT_CONFINED = 125

_PROGRAM = _confined.__path__[0]
_START_SECONDS = 120
_GRACE_SECONDS = 10
_log = logging.getLogger("posttrain.rewards")


@dataclass(frozen=True)
class Limits:
    """What a confined process may use."""

    seconds: float | None
    """Wall time; also processor time, for each process. None is for servers, which are ended by whoever asks them."""
    memory_mb: int = 512
    """Address space of each process."""
    file_mb: int = 8
    """Size of a file, and of all output; four times as much for all files together."""
    processes: int = 8
    """Processes and threads at one time."""
    network: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a confined process ended."""

    code: int
    """Exit code; `TIMED_OUT`, or 128 and a signal's number."""
    output: str


def run_confined(job: str, content: Mapping[str, Any], limits: Limits, command: Sequence[str] = ()) -> Outcome:
    """Run one job of `_confined` to its end.

    Args:
        job: `tests`, `program` or `command`.
        content: what the job reads.
        limits: what it may use.
        command: for `command`, the program to become; it is trusted, so it sees all files and its caller's `HOME`.

    Raises:
        UserError: it cannot be confined here.
    """
    _say_what_is_missing()
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder, tempfile.TemporaryFile() as output:
        order = _order(job, limits, folder, command=list(command))
        process = subprocess.Popen(
            _command(order, packages=False),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            env=_environment(folder, trusted=bool(command)),
            start_new_session=True,
        )
        try:
            patience = None if limits.seconds is None else limits.seconds + _GRACE_SECONDS
            process.communicate(json.dumps(content).encode(), timeout=patience)
            code = process.returncode
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:
            _end(process)
        if code == _NOT_CONFINED:
            raise UserError("an answer could not be confined, so it was not run; is the machine out of memory?")
        output.seek(0)
        return Outcome(code, output.read().decode(errors="replace"))


def verified(verifier: str, asked: Sequence[tuple[Mapping[str, Any], str]], seconds: float) -> list[float]:
    """Let a library's verifier score answers, several at once; 0 for one that takes too long.

    Args:
        verifier: name in `_confined/verifiers.py`.
        asked: what the verifier must know of the task, and the answer.
        seconds: time for one answer.

    Raises:
        UserError: the verifier cannot be loaded, or refuses a task.
    """
    servers = _servers(verifier, os.getpid())
    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(lambda pair: servers.ask(pair[0], pair[1], seconds), asked))


@cache
def guarantees() -> frozenset[str]:
    """Return which of `files`, `network` and `processes` the kernel guarantees here, see `_confined/isolation.py`."""
    if sys.platform != "linux":
        raise UserError("answers can be run and checked on Linux only, which alone can confine them")
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        command = _command(_order("probe", Limits(10), folder), packages=False)
        found = subprocess.run(command, capture_output=True, env=_environment(folder), timeout=30, check=False)
    if found.returncode != 0:
        last = found.stderr.decode().strip().splitlines()[-1:]
        raise UserError(f"answers cannot be confined on this machine: {last[0] if last else found.returncode}")
    return frozenset(json.loads(found.stdout))


@cache
def _say_what_is_missing() -> None:
    if missing := {"files", "network", "processes"} - guarantees():
        _log.warning(
            "this machine forbids namespaces, so answers that are run as code are not kept apart in full: %s",
            ", ".join(sorted(missing)),
        )


class _Servers:
    """The running processes of one verifier, as many as were ever asked at one time."""

    def __init__(self, verifier: str) -> None:
        self.verifier = verifier
        self.idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()

    def ask(self, task: Mapping[str, Any], answer: str, seconds: float) -> float:
        try:
            server = self.idle.get_nowait()
        except queue.Empty:
            server = _Server(self.verifier)
        score = server.ask(task, answer, seconds)
        self.idle.put(server)
        return score


@cache
def _servers(verifier: str, _process: int) -> _Servers:
    """Return the servers of a verifier; a forked process must not share its parent's pipes."""
    return _Servers(verifier)


class _Server:
    """A process that has loaded a verifier."""

    def __init__(self, verifier: str) -> None:
        _say_what_is_missing()
        self.verifier = verifier
        folder = tempfile.mkdtemp(prefix="posttrain-")  # the process removes it when it ends
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        limits = Limits(None, memory_mb=8192, processes=16)
        self.process = subprocess.Popen(
            _command(_order("verify", limits, folder, verifier=verifier), packages=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=_environment(folder),
            start_new_session=True,
        )
        self._read_line(_START_SECONDS, "loading")

    def ask(self, task: Mapping[str, Any], answer: str, seconds: float) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([task, answer, seconds]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        reply = json.loads(self._read_line(seconds + _GRACE_SECONDS, "reading a task"))
        if isinstance(reply, str):
            raise UserError(f"the verifier {self.verifier} cannot read a task: {reply}")
        return reply

    def _read_line(self, seconds: float, doing: str) -> bytes:
        assert self.process.stdout is not None
        stream, line, until = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stream], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise self._failure(f"took more than {seconds:g} s {doing}")
            if not (more := os.read(stream, 4096)):
                raise self._failure(f"ended {doing}")
            line += more
        return line

    def _failure(self, what: str) -> UserError:
        _end(self.process)
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return UserError(f"the verifier {self.verifier} {what}{': ' + last[0] if last else ''}")


def _order(job: str, limits: Limits, folder: str, **more: Any) -> str:
    trusted = bool(more.get("command"))
    return json.dumps({"job": job, "directory": folder, "trusted_program": trusted, **asdict(limits), **more})


def _command(order: str, *, packages: bool) -> list[str]:
    """Return the command line; without `packages` only the standard library can be imported.

    Raises:
        UserError: the program is no longer what the step's key speaks of.
    """
    check_unedited(_confined.__name__)
    return [sys.executable, "-s", *([] if packages else ["-S"]), _PROGRAM, order]


def _environment(folder: str, *, trusted: bool = False) -> dict[str, str]:
    own = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder}
    if trusted:
        own = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    # Equal answers get equal rewards: the order of sets must not differ between runs.
    fixed = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return {**own, **fixed, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process and its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
