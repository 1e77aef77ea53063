"""Stages of set-up: a line each with the time it took; what the tools print goes to logs."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TAIL = 15
"""Lines of a log that are shown where a stage failed."""


class StageFailed(Exception):
    """A command of a stage failed; the message ends with what it printed last."""


class Stages:
    """Shows which stages run and how long each took; several may run at once, each with a log of its own."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._live = sys.stdout.isatty()
        if self._live:
            threading.Thread(target=self._refresh, daemon=True, name="set-up-progress").start()

    @contextmanager
    def stage(self, name: str) -> Iterator["Log"]:
        """Time a stage; yields where its commands print."""
        log = Log(self._logs / f"{name.replace(' ', '-')}.log")
        began = self._running[name] = time.monotonic()
        try:
            yield log
        except (StageFailed, OSError) as error:
            self.say(f"{name:<52} failed after {time.monotonic() - began:.0f} s")
            raise StageFailed(f"{name}: {error}") from None
        else:
            self.say(f"{name:<52} {time.monotonic() - began:6.1f} s")
        finally:
            del self._running[name]

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


class Log:
    """Runs commands, their output appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"")

    def run(self, command: Sequence[str | Path], **environment: str) -> None:
        """Run a command, with more variables in its environment.

        Raises:
            StageFailed: it ended with another code than 0.
        """
        words = [str(word) for word in command]
        with self.path.open("ab") as stream:
            stream.write(f"$ {' '.join(words)}\n".encode())
            stream.flush()
            surroundings = {**os.environ, **environment}
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream}
            code = subprocess.run(words, env=surroundings, **options).returncode
        if code:
            name = Path(words[0]).name
            raise StageFailed(f"`{name} ...` ended with code {code}; the end of {self.path}:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines, those of pip that only warn left out."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.strip() and not line.startswith("WARNING: Location")]
        return "\n".join(f"  {line}" for line in told[-_TAIL:])
