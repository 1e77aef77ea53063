"""Digests of files and of whole directories, and the link that stores no byte twice."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_CHUNK = 1 << 20


class FileDigest(BaseModel):
    """Size in bytes and sha256 (64 hex digits) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Tree(BaseModel):
    """Digest of a directory: every file by its POSIX path below the root, and one sha256 for them all.

    The tree's digest is the sha256 of the lines `<sha256>  <path>` sorted by path, which is what
    `find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum` prints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    files: Mapping[str, FileDigest]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())


def digest_file(path: Path) -> FileDigest:
    """Return size and sha256 of one file, read in chunks of 1 MiB."""
    state = hashlib.sha256()
    size = 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            state.update(view[:count])
            size += count
    return FileDigest(size=size, sha256=state.hexdigest())


def digest_tree(root: Path, *, exclude: frozenset[str] = frozenset(), workers: int | None = None) -> Tree:
    """Digest every regular file under `root`, several at once (hashing releases the interpreter lock).

    Args:
        root: the directory.
        exclude: POSIX paths below `root` to leave out (the manifest itself).
        workers: threads; the number of cores when None.

    Raises:
        ValueError: `root` holds a symbolic link; its target could change under the digest.
    """
    paths = sorted(path for path in _files(root) if path not in exclude)
    # The largest first: one long file at the end would leave the other threads idle.
    order = sorted(paths, key=lambda path: -(root / path).stat().st_size)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        digests = dict(zip(order, pool.map(lambda path: digest_file(root / path), order), strict=True))
    files = {path: digests[path] for path in paths}
    return Tree(sha256=tree_sha256(files), files=files)


def tree_sha256(files: Mapping[str, FileDigest]) -> str:
    """Return the sha256 over the sorted `<sha256>  <path>` lines of a directory's files."""
    lines = "".join(f"{files[path].sha256}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`: a hard link where the file system allows it, a copy where not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link; an artifact holds its own bytes")
        for name in names:
            path = Path(folder, name)
            if not path.is_file():
                raise ValueError(f"{path} is neither a file nor a directory; an artifact holds nothing else")
            yield path.relative_to(root).as_posix()
