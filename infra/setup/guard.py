"""`python -IS guard.py PIPE[,LOCK] COMMAND...` runs a command of set-up, which ends with set-up however that ends.

Who kills set-up (SIGKILL, as the kernel does where memory is short) leaves nobody who could end its compilers; but the
pipe closes, whose other end set-up alone held. Then this kills its process group: the command, and all that it started.
The kernel's signal at a parent's death would reach the command alone, not ninja's compilers. The lock of set-up, whose
descriptor this inherits, is free only when that is done.
"""

import _thread
import os
import signal
import sys


def main() -> int:
    """Run the command to its end; return its exit code, 128 and the signal's number where it died of one."""
    pipe, *others = map(int, sys.argv[1].split(","))
    for descriptor in (pipe, *others):
        os.set_inheritable(descriptor, False)
    command = os.fork()
    if command == 0:
        _become(sys.argv[2:])
    # What ends the group is for the command, which may take its time; this one guards it until then.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _thread.start_new_thread(_kill_all_at_the_end_of, (pipe,))
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    return code if code >= 0 else 128 - code


def _become(words: list[str]) -> None:
    """Execute the command; does not return."""
    try:
        # As Python found them: it ignores these two, and what ignores them goes on to write for nobody.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _kill_all_at_the_end_of(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    # At once: nothing is left to write, and the other thread reads.
    os._exit(main())
