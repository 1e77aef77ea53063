"""Artifact locations: where MLflow keeps the files of one run or one model, on this machine or behind a server."""

import shutil
import tempfile
import uuid
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from registry.errors import Lost, RegistryError
from registry.importing import importing
from steps.artifacts import MANIFEST_NAME, Artifact, Manifest, Store, digest_file, link_or_copy

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from requests import Response

_CHUNK = 1 << 20
_ABSENT = (404, 410)
"""Answers of a server that does not have a file."""


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

    def holds(self, name: str) -> bool:
        """Whether a file is there; true where only fetching it would tell."""
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
            kind = Lost if isinstance(error, FileNotFoundError) else RegistryError
            raise kind(f"{self.root / name} cannot be read ({error.strerror})") from error

    def holds(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.root / name).is_file()

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
        if not self.holds(name):
            raise Lost(f"{self.root / name} is missing")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)


class RemoteLocation:
    """A location behind MLflow's artifact repositories: the proxying server, S3, and so on."""

    def __init__(self, uri: str, tracking_uri: str) -> None:
        with importing():
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._uri = uri
        self._tracking_uri = tracking_uri
        self._repository: ArtifactRepository = get_artifact_repository(uri, tracking_uri=tracking_uri)

    def below(self, folder: str) -> "RemoteLocation":
        """Return the location of a folder inside this one."""
        return RemoteLocation(f"{self._uri.rstrip('/')}/{folder}", self._tracking_uri)

    def share(self, source: Path, name: str) -> None:
        """Upload the file under its own name."""
        folder = PurePosixPath(name).parent.as_posix()
        self._repository.log_artifact(str(source), None if folder == "." else folder)

    def write(self, content: bytes, name: str) -> None:
        """Upload a small file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, PurePosixPath(name).name)
            path.write_bytes(content)
            self.share(path, name)

    def read(self, name: str) -> bytes:
        """Download a small file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "content")
            self.copy(name, path)
            return path.read_bytes()

    def holds(self, name: str) -> bool:
        """Whether a file is there, asked for by its first byte; true of other stores than MLflow's own server's."""
        with importing():
            from mlflow.exceptions import MlflowException
            from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from requests import RequestException

        if not isinstance(self._repository, HttpArtifactRepository):
            return True
        try:
            with _asked(self._repository.artifact_uri, name, "bytes=0-0") as response:
                return response.status_code not in _ABSENT
        except (MlflowException, RequestException):
            return True

    def take(self, name: str, target: Path) -> int:
        """Download the file."""
        return self.copy(name, target)

    def copy(self, name: str, target: Path) -> int:
        """Download the file, from where a broken download stopped if the server answers ranges."""
        with importing():
            from mlflow.exceptions import MlflowException
            from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from requests import RequestException

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(self._repository, HttpArtifactRepository):
                return _download(self._repository.artifact_uri, name, target)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                Path(self._repository.download_artifacts(name, folder)).replace(target)
            return 0
        except (MlflowException, RequestException) as error:
            kind = Lost if getattr(getattr(error, "response", None), "status_code", 0) in _ABSENT else RegistryError
            where = self._repository.artifact_uri
            raise kind(f"`{name}` cannot be fetched from {where} ({_why(error)})") from error


def _download(artifact_uri: str, name: str, target: Path) -> int:
    """Stream one file from MLflow's server, appending to what `target` already holds; return how much that was."""
    held = target.stat().st_size if target.exists() else 0
    with _asked(artifact_uri, name, f"bytes={held}-" if held else "") as response:
        response.raise_for_status()
        partial = response.status_code == 206
        with target.open("ab" if partial else "wb") as stream:
            for chunk in response.iter_content(_CHUNK):
                stream.write(chunk)
    return held if partial else 0


def _asked(artifact_uri: str, name: str, span: str) -> "Response":
    """Ask MLflow's server for a file, or for a span of its bytes."""
    with importing():
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

    wish = {"Accept-Encoding": "identity", **({"Range": span} if span else {})}
    response = http_request(get_default_host_creds(artifact_uri), f"/{name}", "GET", extra_headers=wish, stream=True)
    if response is None:
        raise RegistryError(f"the server gave no answer for `{name}`")
    return response


def _why(error: Exception) -> str:
    """Return in a few words why a file was not given: servers send whole documents along."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def location_at(uri: str, tracking_uri: str) -> Location:
    """Return the location that MLflow names by a URI."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return LocalLocation(Path(unquote(parts.path)))
    return RemoteLocation(uri, tracking_uri) if parts.scheme else LocalLocation(Path(uri))


def read_manifest(location: Location, digest: str) -> Manifest:
    """Read and check the manifest of the artifact that lies at a location.

    Raises:
        RegistryError: it is missing, is not the one with this digest, or names files outside the artifact.
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


def bring(location: Location, manifest: Manifest, names: list[str], staging: Path, *, own: bool) -> int:
    """Complete a staging directory with files of an artifact; return how many bytes were there already.

    Args:
        location: where the files come from.
        manifest: what they must be.
        names: the files wanted.
        staging: directory that may hold what an interrupted call left.
        own: whether the bytes must be the directory's own, or may be shared with the location.

    Raises:
        RegistryError: a file at the location is missing or damaged.
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
        if continued and digest_file(target) != wanted:
            # What was left from before was no prefix of the file: once more from the start.
            target.unlink()
            continued = fetch(name, target)
        if digest_file(target) != wanted:
            target.unlink()
            raise RegistryError(f"`{name}` of artifact {manifest.digest[:12]} is damaged in MLflow's store")
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
