"""Which run of this machine holds which GPU: a locked file for each, which a dead holder releases."""

import fcntl
import os
import tempfile
from pathlib import Path

from steps.runtime.gpus import physical_name

_FOLDER = "posttrain-gpus"


def claim(gpus: list[str], count: int) -> dict[str, int] | None:
    """Claim GPUs that no run of this machine holds, whoever's it is and whatever its home.

    Args:
        gpus: names to choose from, as `CUDA_VISIBLE_DEVICES` gives them.
        count: how many are needed.

    Returns:
        A file descriptor for each claimed GPU, to be given to `release`; None where too few are free.
    """
    claimed: dict[str, int] = {}
    for name in gpus:
        if len(claimed) == count:
            break
        descriptor = os.open(_file(name), os.O_RDWR | os.O_CREAT, 0o666)
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


def _file(name: str) -> Path:
    """Return the lock file of a GPU, in a folder that all users of the machine share."""
    folder = Path(tempfile.gettempdir()) / _FOLDER
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    file = folder / "".join(letter if letter.isalnum() else "_" for letter in physical_name(name))
    if not file.exists():
        # Whoever makes it leaves it to all.
        before = os.umask(0)
        try:
            file.touch(0o666)
        finally:
            os.umask(before)
    return file
