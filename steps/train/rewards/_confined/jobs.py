"""The jobs: run an answer's code against tests, run a program, run a checker, or serve a library's verifier."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import sys

import isolation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Order = dict[str, Any]


def run_tests(order: Order) -> int:
    """Run code, then each test in what it defined; write the token and the number of each test that held.

    Args:
        order: of no use here; standard input holds `{code, tests, token}`.
    """
    job = json.load(sys.stdin)
    results = os.dup(1)
    _silence(1)
    namespace: dict[str, Any] = {"__name__": "answer"}
    if not _runs(job["code"], namespace):
        return 1
    for number, test in enumerate(job["tests"]):
        if _runs(test, namespace):
            os.write(results, f"{job['token']} {number}\n".encode())
    return 0


def run_program(order: Order) -> int:
    """Run code as a program on an input; its output is this process's.

    Args:
        order: of no use here; standard input holds `{code, input}`.
    """
    job = json.load(sys.stdin)
    _stand_in(job["input"])
    exec(compile(job["code"], "answer", "exec"), {"__name__": "__main__"})
    return 0


def run_command(order: Order) -> int:
    """Become a checker: the answer on standard input, the task in `task.json`.

    Args:
        order: `command`; standard input holds `{answer, task}`.
    """
    job = json.load(sys.stdin)
    with open("task.json", "w", encoding="utf-8") as file:
        json.dump(job["task"], file, ensure_ascii=False)
    _stand_in(job["answer"])
    with contextlib.suppress(OSError):
        os.execvp(order["command"][0], order["command"])
    return 127


def serve_verifier(order: Order) -> int:
    """Answer requests, one JSON line each, until standard input ends: `[task, answer, seconds]` gives a score.

    The task is prepared here and kept. Each answer is judged in a fork, because verifiers evaluate answers as code
    (sympy's parser and some of reasoning-gym's do) and may loop for ever: a fork can be killed and spoils nothing.
    """
    import verifiers

    replies = os.dup(1)
    _silence(1)
    prepare = verifiers.LOADERS[order["verifier"]]()
    if order["hook"]:
        isolation.forbid_network()
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        task, answer, seconds = json.loads(line)
        try:
            reply: Any = _in_fork(prepare(task), answer, seconds)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        os.write(replies, json.dumps(reply).encode() + b"\n")
    return 0


def say_guarantees(order: Order) -> int:
    """Print what the kernel guarantees here.

    Args:
        order: `guarantees`.
    """
    print(json.dumps(order["guarantees"]))
    return 0


JOBS: dict[str, Callable[[Order], int]] = {
    "probe": say_guarantees,
    "tests": run_tests,
    "program": run_program,
    "command": run_command,
    "verify": serve_verifier,
}


def _runs(code: str, namespace: dict[str, Any]) -> bool:
    """Whether code runs to its end; leaving by `sys.exit` does not count as that."""
    try:
        exec(compile(code, "answer", "exec"), namespace)
    except BaseException:
        return False
    return True


def _in_fork(judge: Callable[[str], float], answer: str, seconds: float) -> float:
    """Judge an answer in a child; 0 where it raises, dies or takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.write(writing, repr(float(judge(answer))).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], seconds)
    said = os.read(reading, 64) if ready else b""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return float(said or 0)


def _stand_in(text: str) -> None:
    """Make a text this process's standard input."""
    with open("input", "w+b") as file:
        file.write(text.encode())
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    os.unlink("input")
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")


def _silence(number: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, number)
    os.close(nothing)
