"""One model, one process: its memory can be measured, and all of it returns."""

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from steps.frame import UserError
from steps.frame.scale import die_with_parent
from steps.runtime.death import how_it_ended

T = TypeVar("T")
Report = Callable[[float], None]
"""Takes the share of the work that is done, 0..1."""


def run_in_child(name: str, work: Callable[[Report], T], on_progress: Report) -> tuple[T, int]:
    """Call `work` in a forked process; return what it returned and the memory it needed.

    Must be called before this process computes anything with torch: the threads of a forked pool do not exist.

    Returns:
        The result, and the child's peak memory in bytes beyond what it was born with (the libraries).

    Raises:
        UserError: the child raised it.
        RuntimeError: the child failed or died; the message begins with `name`.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work), name=name)
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    sender.close()
    try:
        while True:
            what, content = receiver.recv()
            if what == "progress":
                on_progress(content)
            elif what == "done":
                return content
            else:
                raise UserError(content) if what == "refused" else RuntimeError(f"{name}: {content}")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        raise RuntimeError(f"{name}: its process {how_it_ended(code)}" + ("" if code else " and no result")) from None
    finally:
        process.join()
        receiver.close()


def _child(sender: Connection, work: Callable[[Report], Any]) -> NoReturn:
    """Work, send the outcome and leave at once: a library's idle threads must not hold the process up."""
    die_with_parent()
    _renew_thread_pool()
    born = _peak_memory()
    try:
        result = work(lambda share: sender.send(("progress", share)))
        message = ("done", (result, _peak_memory() - born))
    except UserError as error:
        message = ("refused", str(error))
    except Exception as error:
        traceback.print_exc()
        message = ("failed", "".join(traceback.format_exception_only(error)).strip().splitlines()[-1])
    sender.send(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _renew_thread_pool() -> None:
    """Make torch replace the pool whose threads did not survive the fork, while there is only one thread to ask for it.

    It does so at the first use, which is not safe for two threads at once: transformers, which loads weights in
    several, then fails now and then with "Invalid thread pool" (`caffe2::pthreadpool`).
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
