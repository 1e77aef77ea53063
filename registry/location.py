"""Artifact locations: where MLflow keeps the files of one run or one model, on this machine or behind a server."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from registry.errors import Damaged, Lost, RegistryError
from registry.remote import RemoteLocation
from steps.artifacts import MANIFEST_NAME, Artifact, Manifest, Store, digest_file, link_or_copy


class Location(Protocol):
    """A directory of MLflow's. Names are POSIX paths below it."""

    def below(self, folder: str) -> "Location":
        """Return the location of a folder inside this one."""
        ...

    def share(self, source: Path, name: str) -> None:
        """Give the location a file that will never change: linked where it can be, uploaded where not."""
        ...

    def write(self, content: bytes, name: str) -> None:
        """Write a small file."""
        ...

    def read(self, name: str) -> bytes:
        """Return a small file.

        Raises:
            Lost: it is not there.
            RegistryError: it cannot be read.
        """
        ...

    def sizes(self, folder: str) -> Mapping[str, int | None]:
        """Return the files that lie directly in a folder (empty: the location's own), by name, with their bytes.

        Empty where there is no such folder; a size is None where the store does not tell it.

        Raises:
            RegistryError: there is no answer.
        """
        ...

    def take(self, name: str, target: Path) -> int:
        """Put a file at `target`, sharing its bytes where that is possible; else like `copy`."""
        ...

    def copy(self, name: str, target: Path) -> int:
        """Put a file at `target` as bytes of its own, going on from what a broken transfer left there if that can be.

        Returns:
            How many bytes were kept of what was there.
        """
        ...


class LocalLocation:
    """A directory on this machine. Files of the store are hard-linked into it: no byte is stored twice."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def below(self, folder: str) -> "LocalLocation":
        """Return the location of a folder inside this one."""
        return LocalLocation(self.root / folder)

    def share(self, source: Path, name: str) -> None:
        """Link `source`. A file that is there but is not `source` itself (damaged, re-made) is replaced."""
        target = self.root / name
        if target.exists() and target.samefile(source):
            return
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        link_or_copy(source, partial)
        partial.replace(target)

    def write(self, content: bytes, name: str) -> None:
        """Write a small file, replaced in one rename."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        partial.replace(target)

    def read(self, name: str) -> bytes:
        """Return a small file."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            kind = Lost if isinstance(error, FileNotFoundError | NotADirectoryError) else RegistryError
            raise kind(f"{self.root / name} cannot be read ({error.strerror})") from error

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Return the sizes of a folder's files."""
        place = self.root / folder
        found = place.iterdir() if place.is_dir() else ()
        return {path.name: path.stat().st_size for path in found if path.is_file()}

    def take(self, name: str, target: Path) -> int:
        """Link the file."""
        self._fresh(name, target)
        link_or_copy(self.root / name, target)
        return 0

    def copy(self, name: str, target: Path) -> int:
        """Copy the file; where the file system can (Btrfs, XFS), its blocks are shared until one side is changed."""
        self._fresh(name, target)
        shutil.copyfile(self.root / name, target)
        return 0

    def _fresh(self, name: str, target: Path) -> None:
        if not (self.root / name).is_file():
            raise Lost(f"{self.root / name} is missing")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)


def location_at(uri: str, tracking_uri: str) -> Location:
    """Return the location that MLflow names by a URI."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return LocalLocation(Path(unquote(parts.path)))
    return RemoteLocation(uri, tracking_uri) if parts.scheme else LocalLocation(Path(uri))


def read_manifest(location: Location, digest: str) -> Manifest:
    """Read and check the manifest of the artifact that lies at a location.

    Raises:
        Lost: it is missing, or is not the one with this digest.
        RegistryError: it cannot be read, or names files outside the artifact.
    """
    try:
        manifest = Manifest.model_validate_json(location.read(MANIFEST_NAME))
    except ValueError as error:
        raise Lost(f"{MANIFEST_NAME} of artifact {digest[:12]} is damaged") from error
    if manifest.digest != digest:
        raise Lost(f"artifact {digest[:12]} was changed in MLflow's store: its manifest is {manifest.digest[:12]}")
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name:
            raise RegistryError(f"artifact {digest[:12]} names a file outside itself: `{name}`")
    return manifest


def lacking(location: Location, manifest: Manifest) -> str:
    """Return which file of an artifact a location lacks, or holds cut off; empty where all are there.

    Each folder is listed once, and no file is fetched.

    Raises:
        RegistryError: there is no answer.
    """
    wanted = {MANIFEST_NAME: len(manifest.to_bytes()), **{name: each.size for name, each in manifest.files.items()}}
    sizes: dict[str, Mapping[str, int | None]] = {}
    for name, size in wanted.items():
        folder = _folder(name)
        if folder not in sizes:
            sizes[folder] = location.sizes(folder)
        held = sizes[folder].get(PurePosixPath(name).name, -1)
        if held == -1:
            return f"MLflow no longer holds `{name}` of artifact {manifest.digest[:12]}"
        if held not in (None, size):
            return f"`{name}` of artifact {manifest.digest[:12]} is damaged in MLflow's store: {held} of {size} bytes"
    return ""


def bring(location: Location, manifest: Manifest, names: list[str], staging: Path, *, own: bool) -> int:
    """Complete a staging directory with files of an artifact; return how many bytes were there already.

    Args:
        location: where the files come from.
        manifest: what they must be.
        names: the files wanted.
        staging: directory that may hold what an interrupted call left.
        own: whether the bytes must be the directory's own, or may be shared with the location.

    Raises:
        Lost: a file is missing at the location.
        Damaged: a file is not the one that was recorded.
        RegistryError: there is no answer.
    """
    kept = 0
    for name in names:
        target, wanted = staging / name, manifest.files[name]
        if target.is_file() and digest_file(target) == wanted:
            kept += wanted.size
            continue
        if target.is_file() and target.stat().st_size >= wanted.size:
            target.unlink()
        fetch = location.copy if own else location.take
        continued = fetch(name, target)
        if digest_file(target) != wanted:
            # What was left from before was no prefix of the file, or it came damaged: once more from the start.
            target.unlink()
            continued = fetch(name, target)
        if digest_file(target) != wanted:
            target.unlink()
            raise Damaged(f"`{name}` of artifact {manifest.digest[:12]} is damaged in MLflow's store")
        kept += continued
    return kept


def fetch(store: Store, location: Location, digest: str) -> Artifact:
    """Bring an artifact from a location into the store: verified, in one rename, continuing an interrupted fetch."""
    manifest = read_manifest(location, digest)
    staging = store.root / f".fetching-{digest}"
    staging.mkdir(parents=True, exist_ok=True)
    bring(location, manifest, sorted(manifest.files), staging, own=False)
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(staging).as_posix() not in manifest.files:
            path.unlink()
    return store.publish(staging, manifest)


def _folder(name: str) -> str:
    """Return the folder that holds a file, empty for the topmost."""
    folder = PurePosixPath(name).parent.as_posix()
    return "" if folder == "." else folder
