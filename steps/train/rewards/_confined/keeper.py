"""Confine, do the job that an order names, and end it in time.

Two processes: the keeper, who waits and kills, and its child, who is confined and does the job. The keeper's exit code
is the child's; 124 where time ran out, 125 where it could not be confined, and 128 and the signal's number where the
child died of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

import isolation
import jobs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TIMED_OUT, NOT_CONFINED = 124, 125


def main() -> int:
    """Run the order in `sys.argv[1]`; return the exit code."""
    order = json.loads(sys.argv[1])
    serves = order["job"] == "verify"
    outside = os.open(os.path.dirname(order["directory"]), os.O_RDONLY | os.O_DIRECTORY)
    try:
        ground = isolation.separate(order)
    except OSError as error:
        print(error, file=sys.stderr)
        return NOT_CONFINED
    order["guarantees"] = sorted(ground.guarantees)
    confined, confirm = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outside)
        os.close(confined)
        obey(order, ground, confirm)
    os.close(confirm)
    code = keep(child, order["seconds"], serves=serves)
    if serves:
        isolation.leave(order, ground, outside)
    return code if os.read(confined, 1) else NOT_CONFINED


def obey(order: dict[str, Any], ground: isolation.Ground, confirm: int) -> None:
    """Be the child: confine, confirm it to the keeper, do the job. Does not return."""
    code = 1
    try:
        isolation.confine(order, ground)
        os.write(confirm, b".")
        os.close(confirm)
        code = jobs.JOBS[order["job"]](order)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code & 255)


def keep(child: int, seconds: float | None, *, serves: bool) -> int:
    """Wait for the child, at most `seconds`; one that `serves` may live until nobody can ask it any more."""
    waiting = select.poll()
    waiting.register(os.pidfd_open(child), select.POLLIN)
    if serves:
        waiting.register(0, 0)  # a hang-up is reported without asking for it
    ended = waiting.poll(None if seconds is None else seconds * 1000)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    end_descendants()
    if not ended:
        return TIMED_OUT
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return 128 - code
    return 1 if code in (TIMED_OUT, NOT_CONFINED) else code  # an answer may say what it likes, but not that


def end_descendants() -> None:
    """Kill what the child left behind.

    In a process namespace the kernel has done it already. Elsewhere orphans become the keeper's own children, see
    `isolation.separate`, and are killed until there is none.
    """
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                orphans = [int(pid) for pid in file.read().split()]
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
        except (ChildProcessError, FileNotFoundError):
            return
        except ProcessLookupError:
            continue
