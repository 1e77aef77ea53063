"""Which run of this machine holds which GPU: a locked file for each, which a dead holder releases."""

import fcntl
import os
from pathlib import Path

from steps.runtime.gpus import physical_name

_FOLDER = Path("/tmp/posttrain-gpus")
"""Where the locks lie, whatever TMPDIR says: two runs that looked in two places would both have the same GPU."""


def claim(gpus: list[str], count: int) -> dict[str, int] | None:
    """Claim GPUs that no run of this machine holds, whoever's it is and whatever its home.

    Args:
        gpus: names to choose from, as `CUDA_VISIBLE_DEVICES` gives them.
        count: how many are needed.

    Returns:
        A file descriptor for each claimed GPU, to be given to `release`; None where too few are free.

    Raises:
        OSError: the lock of a GPU cannot be opened.
    """
    claimed: dict[str, int] = {}
    for name in gpus:
        if len(claimed) == count:
            break
        try:
            descriptor = _opened(name)
        except OSError as error:
            release(claimed)
            raise OSError(
                f"{error.filename}: the lock of GPU {name} cannot be opened ({error.strerror}); make {_FOLDER} and "
                "what is in it writable for all users"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            claimed[name] = descriptor
    if len(claimed) == count:
        return claimed
    release(claimed)
    return None


def release(claimed: dict[str, int]) -> None:
    """Give GPUs back."""
    for descriptor in claimed.values():
        os.close(descriptor)


def _opened(name: str) -> int:
    """Open the lock file of a GPU, in a folder that all users of the machine share.

    With O_CREAT only where it is missing: in such a folder Linux refuses it for another user's file
    (fs.protected_regular).
    """
    file = _FOLDER / "".join(letter if letter.isalnum() else "_" for letter in physical_name(name))
    # Whoever makes them leaves them to all.
    before = os.umask(0)
    try:
        _FOLDER.mkdir(0o1777, exist_ok=True)
        return os.open(file, os.O_RDWR | (0 if file.exists() else os.O_CREAT | os.O_EXCL), 0o666)
    except FileExistsError:
        if not file.is_file():
            raise
    finally:
        os.umask(before)
    return os.open(file, os.O_RDWR)
