"""The fork server: imports the heavy libraries once, then starts each step's process in about 0.1 s.

`python -m steps.frame.forkserver FD MODULE...` speaks JSON lines over the socket FD: `{"id", "spec", "command"}` starts
a step (by a command of its own where that is not empty), `{"id", "signal"}` signals its process group; back come
`{"ready"}`, `{"id", "pid"}` and `{"id", "code", "peak_memory"}`. When the socket closes, every step is killed and the
server ends: no orphan outlives its flow.

CUDA must not be initialised before the fork, so nothing here touches a device; should a preloaded module have done so,
each step gets a fresh interpreter. So does one whose code was touched since the plan: what was imported before the fork
may be of another moment.
"""

import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from steps.frame.code import changed_at, code_modules
from steps.frame.runner import run_step
from steps.frame.scale import die_with_parent, launcher_environment, use_devices
from steps.frame.spec import LOG_NAME, StepSpec
from steps.runtime.verdicts import hide_broken


class ForkServer:
    """State of the server process: its socket, and the running children by process id."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.children: dict[int, int] = {}
        self.buffer = b""
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)

    def serve(self) -> None:
        """Start and reap steps until the other side closes the socket."""
        signal.set_wakeup_fd(self.wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.send({"ready": True})
        while True:
            ready, _, _ = select.select([self.link, self.wake_read], [], [])
            if self.wake_read in ready:
                os.read(self.wake_read, 4096)
                self.reap()
            if self.link in ready:
                data = self.link.recv(65536)
                if not data:
                    return self.kill_all()
                self.buffer += data
                *lines, self.buffer = self.buffer.split(b"\n")
                for line in lines:
                    self.handle(json.loads(line))

    def handle(self, message: dict[str, Any]) -> None:
        """Start a step, or pass on a signal."""
        if "spec" in message:
            pid = os.fork()
            if pid == 0:
                self.child(Path(message["spec"]), message["command"])
            self.children[pid] = message["id"]
            self.send({"id": message["id"], "pid": pid})
            return
        for pid, job in self.children.items():
            if job == message["id"]:
                _signal_group(pid, message["signal"])

    def child(self, spec_path: Path, command: list[str]) -> None:
        """Become the step's process: own group, own log, dies with the server. Does not return."""
        code = 1
        try:
            os.setsid()
            die_with_parent()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.link.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            spec = StepSpec.model_validate_json(spec_path.read_bytes())
            redirect_output(spec.work / LOG_NAME)
            use_devices(spec)
            if command or _has_touched_cuda() or _is_touched(spec):
                command = command or [sys.executable]
                os.environ.update(launcher_environment(spec.resources))
                os.execv(command[0], [*command, "-m", "steps", str(spec_path)])
            result = run_step(spec)
            code = {"finished": 0, "refused": 2, "failed": 1}[result.status]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reap(self) -> None:
        """Report every child that has ended."""
        while self.children:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = self.children.pop(pid, None)
            # What a step leaves behind in its group (data loader workers, a compiler) goes with it.
            _signal_group(pid, signal.SIGKILL)
            if job is not None:
                code = os.waitstatus_to_exitcode(status)
                self.send({"id": job, "code": code, "peak_memory": usage.ru_maxrss * 1024})

    def kill_all(self) -> None:
        """Kill every step's process group."""
        for pid in self.children:
            _signal_group(pid, signal.SIGKILL)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; a vanished flow is noticed by the next read."""
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.kill_all()


def redirect_output(log: Path) -> None:
    """Append standard output and error to `log` and read from nothing."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.dup2(nothing, 0)
    os.close(handle)
    os.close(nothing)


def _has_touched_cuda() -> bool:
    """Whether CUDA is lost to this process, because its parent has used it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def _is_touched(spec: StepSpec) -> bool:
    """Whether a file behind the step's key was written since the plan."""
    return any(changed_at(path) != moment for path, moment in spec.code_files.items())


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def main() -> None:
    """Preload the named modules, then serve."""
    faulthandler.enable()
    hide_broken()
    link = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
        # Read once for all steps, each of which looks whether its code is that of its key.
        code_modules(name)
    # Objects that are alive now will be alive in every child: keep the collector from touching (and copying) them.
    gc.collect()
    gc.freeze()
    ForkServer(link).serve()


if __name__ == "__main__":
    main()
