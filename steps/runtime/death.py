"""How a process died, from its exit code and its log: the signal, the library that it was in, its last words.

Every step process has `faulthandler` on: where a native library dies, it writes the Python frames that called it.
"""

import re
import signal
from collections.abc import Iterator

_NATIVE_SIGNALS = (signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGTRAP)
"""Signals by which native code dies of its own doing; by the others somebody else ends it: a person, the kernel."""

_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]+)", line \d+ in ', re.MULTILINE)
_PACKAGE = re.compile(r"/(?:site|dist)-packages/([^/]+)")
_LAST_LINES = 3
_LONGEST = 200
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f]")
_TRACE = re.compile(r'File ".*", line \d+ in |Extension modules: |(Current t|T)hread 0x')


def how_it_ended(code: int) -> str:
    """Say an exit code in words, negative for a signal: `died of SIGSEGV`, `ended with code 3`."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def died_by_itself(code: int) -> bool:
    """Whether an exit code, negative for a signal, says that a process's own native code ended it."""
    return -code in _NATIVE_SIGNALS


def is_native_death(text: str) -> bool:
    """Whether a text says, in the words of `how_it_ended`, that native code ended a process, or several of them."""
    return "several died" in text or any(f"died of {number.name}" in text for number in _NATIVE_SIGNALS)


def fatal_library(log: str) -> str:
    """Return the package whose native code a process was in when it died; empty where the log does not say.

    The frames of the thread that died come before those of the other threads; where it had none (a thread of OpenMP's),
    the next thread that waits in a package tells.
    """
    last = list(_FATAL.finditer(log))
    if not last:
        return ""
    return next(_packages(log[last[-1].start() :]), "")


def fatal_error(log: str) -> str:
    """Return what faulthandler called the last death in a log (`Aborted`); empty where nothing died."""
    last = list(_FATAL.finditer(log))
    return last[-1][1] if last else ""


def last_words(log: str, count: int = _LAST_LINES) -> list[str]:
    """Return the last lines that a process logged before it died, faulthandler's left out."""
    last = list(_FATAL.finditer(log))
    before = log[: last[-1].start()] if last else log
    lines = [" ".join(_UNPRINTABLE.sub(" ", line).split())[:_LONGEST] for line in before.splitlines()]
    return [line for line in lines if line and not _TRACE.match(line)][-count:]


def _packages(trace: str) -> Iterator[str]:
    """Yield the packages of the frames, innermost first; Python's own library and our code have none."""
    # The current thread is printed last by some versions and first by others: it goes first here.
    threads = re.split(r"^(?=(?:Current thread|Thread) )", trace, flags=re.MULTILINE)
    threads.sort(key=lambda text: not text.startswith("Current thread"))
    for thread in threads:
        for path in _FRAME.findall(thread):
            if found := _PACKAGE.search(path):
                yield found[1]
