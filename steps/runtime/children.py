"""The children in which runtimes are proven, so that all can be ended together."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO


class Children:
    """Child processes that several threads wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
    ) -> "subprocess.Popen[bytes]":
        """Start a child in a session of its own, so that what interrupts us is not taken for its fault.

        Raises:
            KeyboardInterrupt: all were ended.
        """
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            self._running.add(child)
            return child

    def end(self, child: "subprocess.Popen[bytes]") -> None:
        """End a child, with whatever it started."""
        _kill(child)
        child.wait()
        with self._lock:
            self._running.discard(child)

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all children, and let none begin, where the context is left by an error: Ctrl-C reaches one thread."""
        self._stopped = False
        try:
            yield
        except BaseException:
            with self._lock:
                self._stopped = True
                for child in self._running:
                    _kill(child)
            raise


def _kill(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


children = Children()
"""Those of this process."""
