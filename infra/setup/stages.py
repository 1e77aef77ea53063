"""Stages of set-up: a line each with the time it took; what the tools print goes to logs."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_GUARD = Path(__file__).with_name("guard.py")
_TAIL = 15
"""Lines of a log that are shown where a stage failed."""


class StageFailed(Exception):
    """A command of a stage failed; the message ends with what it printed last."""


class Stages:
    """Shows which stages run and how long each took; several may run at once, each with a log of its own.

    Args:
        logs: directory of the logs.
        lock: descriptor of a lock that is held on as long as a command runs, even where this process is killed.
    """

    def __init__(self, logs: Path, lock: int | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        # What a tool printed may hold what this terminal cannot show.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._logs = logs
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self.commands = Running(lock)
        self._live = sys.stdout.isatty()
        if self._live:
            threading.Thread(target=self._refresh, daemon=True, name="set-up-progress").start()

    @contextmanager
    def stage(self, name: str) -> Iterator["Log"]:
        """Time a stage; yields where its commands print."""
        began = self._running[name] = time.monotonic()
        try:
            yield Log(self._logs / f"{name.replace(' ', '-')}.log", self.commands)
        except (StageFailed, OSError, ValueError) as error:
            self.say(f"{name:<52} failed after {time.monotonic() - began:.0f} s")
            raise StageFailed(f"{name}: {error}") from None
        else:
            self.say(f"{name:<52} {time.monotonic() - began:6.1f} s")
        finally:
            del self._running[name]

    def stop(self) -> None:
        """End every command that still runs, and let none begin: what they make is of no use any more."""
        self.commands.stop()

    def say(self, line: str) -> None:
        """Print a line above the one that says what runs."""
        with self._lock:
            print(("\r\033[K" if self._live else "") + line, flush=True)

    def _refresh(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            with self._lock:
                shown = ", ".join(f"{name} {now - began:.0f} s" for name, began in list(self._running.items()))
                print(f"\r\033[K{shown}", end="", flush=True)


class Interruption:
    """Ctrl-C, or a signal by which somebody ends set-up: it waits where a command has begun and nobody knows of it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._held = 0
        self._came = False

    def __call__(self, *_: object) -> None:
        """Handle the signal.

        Raises:
            KeyboardInterrupt: at once, unless it is held.
        """
        if not self._held:
            raise KeyboardInterrupt
        self._came = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for the length of the context, at whose end it comes."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._came and not self._held:
                self._came = False
                raise KeyboardInterrupt


interruption = Interruption()
"""Handles the signals of this process while it sets up."""


class Running:
    """The commands that run now, so that they can be ended together; each ends with this process (`guard.py`)."""

    def __init__(self, lock: int | None = None) -> None:
        self.stopped = False
        self._held = () if lock is None else (lock,)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def call(
        self, words: Sequence[str], environment: Mapping[str, str], output: IO[bytes], errors: IO[bytes] | None = None
    ) -> int:
        """Run a command to its end, its children in a group of its own; return its exit code, as a shell has it.

        Raises:
            StageFailed: everything was stopped.
        """
        process, pipe = None, os.pipe()
        inherited = (pipe[0], *self._held)
        try:
            with self._lock, interruption.held():
                if self.stopped:
                    raise StageFailed("stopped")
                process = subprocess.Popen(
                    [sys.executable, "-IS", str(_GUARD), ",".join(map(str, inherited)), *words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors or output,
                    start_new_session=True,
                    pass_fds=inherited,
                )
                self._processes.add(process)
            return process.wait()
        except BaseException:
            if process is not None:
                _end(process)
                process.wait()
            raise
        finally:
            for end in pipe:
                os.close(end)
            if process is not None:
                with self._lock:
                    self._processes.discard(process)

    def stop(self) -> None:
        """End every command with its children, and let none begin."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


class Log:
    """Runs commands, their output appended to a file."""

    def __init__(self, path: Path, running: "Running") -> None:
        self.path = path
        self._running = running
        path.write_bytes(b"")

    def run(self, command: Sequence[str | Path], **environment: str) -> None:
        """Run a command, with more variables in its environment.

        Raises:
            StageFailed: it ended with another code than 0.
        """
        words = [str(word) for word in command]
        with self._begun(words) as stream:
            code = self._running.call(words, {**os.environ, **environment}, stream)
        if code:
            name = Path(words[0]).name
            raise StageFailed(f"`{name} ...` ended with code {code}; the end of {self.path}:\n{self.tail()}")

    def ask(
        self, command: Sequence[str | Path], *, without: Sequence[str] = (), **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command, some variables left out of its environment; return its code, and what it printed for us."""
        words = [str(word) for word in command]
        surroundings = {name: value for name, value in os.environ.items() if name not in without}
        with self._begun(words) as stream, tempfile.TemporaryFile() as answer:
            code = self._running.call(words, {**surroundings, **environment}, answer, stream)
            answer.seek(0)
            return subprocess.CompletedProcess(words, code, answer.read().decode(errors="replace"), "")

    @contextmanager
    def _begun(self, words: Sequence[str]) -> Iterator[IO[bytes]]:
        with self.path.open("ab") as stream:
            stream.write(f"$ {' '.join(words)}\n".encode())
            stream.flush()
            yield stream

    def tail(self, count: int = _TAIL) -> str:
        """Return the last lines, those of pip that only warn left out."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.strip() and not line.startswith("WARNING: Location")]
        return "\n".join(f"  {line}" for line in told[-count:])
