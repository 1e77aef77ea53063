"""Which run of this machine holds which GPU: a locked file for each, which a dead holder releases."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from steps.runtime.gpus import physical_name

_FOLDERS = tuple(Path(place) / "posttrain-gpus" for place in ("/tmp", "/dev/shm", "/var/lock"))
"""Where the locks may lie, in this order and whatever TMPDIR says: two runs that looked in two places would both have
the same GPU."""


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
                f"{error.filename}: the lock of GPU {name} cannot be opened ({error.strerror}); make it, or one of "
                f"{', '.join(str(folder) for folder in _FOLDERS)}, and what is in it writable for all users"
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

    Without O_CREAT: in such a folder Linux refuses it for another user's file (fs.protected_regular).
    """
    file = _folder() / "".join(letter if letter.isalnum() else "_" for letter in physical_name(name))
    if not file.exists():
        _make_file(file)
    return os.open(file, os.O_RDWR)


def _folder() -> Path:
    """Return the first folder that is there already, else the first that can be made.

    One that is there, but is not for this user to write, is no reason to look further: its owner's runs would not see
    what is claimed elsewhere. A file system that nobody can write is.
    """
    for folder in _FOLDERS:
        if folder.is_dir() and not os.statvfs(folder).f_flag & os.ST_RDONLY:
            return folder
    first: OSError | None = None
    for folder in _FOLDERS:
        try:
            _make_folder(folder)
        except OSError as error:
            first = first or OSError(error.errno, error.strerror, str(folder))
        else:
            return folder
    assert first is not None
    raise first


def _make_folder(folder: Path) -> None:
    """Make a folder that appears open to all at once, whatever the umask, which is the whole process's."""
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made.chmod(0o1777)
        made.rename(folder)
    except OSError:
        made.rmdir()
        # Another run was faster.
        if not folder.is_dir():
            raise


def _make_file(file: Path) -> None:
    """Make a file as `_make_folder` makes a folder."""
    descriptor, made = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        os.fchmod(descriptor, 0o666)
        with suppress(FileExistsError):
            os.link(made, file)
    finally:
        os.close(descriptor)
        Path(made).unlink()
