"""Artifact locations that are not on this machine, and what their answers mean."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from registry.errors import Lost, RegistryError
from registry.importing import importing

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from requests import Response

_CHUNK = 1 << 20
_LIST = "/mlflow-artifacts/artifacts"
"""Where an MLflow server lists what it keeps, and below which it gives it out."""
_ABSENT = (404, 410)
"""Answers of a server that does not have a file."""
_BROKEN = 500
_NO_SUCH_SPAN = 416
_BUSY = frozenset({408, 429, 502, 503, 504})
"""Answers of a server that may well answer later."""
_QUESTIONS = 2
"""How often a question is repeated where there is no answer."""


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
        self._repository.log_artifact(str(source), _folder(name) or None)

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

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Return the sizes of a folder's files, asked for in one request.

        A server tells what is missing by its list only: asked for a file that its store lacks, it may answer 500.
        """
        with _in_words(f"the files below {self._where(folder)} cannot be listed"):
            if self._is_http:
                return self._listed(folder)
            found = self._repository.list_artifacts(folder or None)
            return {PurePosixPath(each.path).name: each.file_size for each in found if not each.is_dir}

    def take(self, name: str, target: Path) -> int:
        """Download the file."""
        return self.copy(name, target)

    def copy(self, name: str, target: Path) -> int:
        """Download the file, from where a broken download stopped if the server answers ranges."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _in_words(f"`{name}` cannot be fetched from {self._where()}"):
            if self._is_http:
                return self._download(name, target)
            self._expect(name)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                Path(self._repository.download_artifacts(name, folder)).replace(target)
            return 0

    @property
    def _is_http(self) -> bool:
        """Whether an MLflow server gives the files out."""
        with importing():
            from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

        return isinstance(self._repository, HttpArtifactRepository) and _LIST in self._repository.artifact_uri

    def _where(self, folder: str = "") -> str:
        return f"{self._repository.artifact_uri.rstrip('/')}/{folder}".rstrip("/")

    def _expect(self, name: str) -> None:
        if PurePosixPath(name).name not in self.sizes(_folder(name)):
            raise Lost(f"`{name}` is not in {self._where()}")

    def _listed(self, folder: str) -> dict[str, int | None]:
        server, _, root = self._repository.artifact_uri.partition(_LIST)
        path = f"{root.strip('/')}/{folder}".strip("/")
        # A question is repeated for seconds, not for minutes as a transfer is.
        with _ask(server, _LIST, params={"path": path}, max_retries=_QUESTIONS, raise_on_status=False) as response:
            if response.status_code in _ABSENT:
                return {}
            response.raise_for_status()
            files = [each for each in response.json().get("files", ()) if not each.get("is_dir")]
        # MLflow leaves out a size of 0.
        untold = 0 if any("file_size" in each for each in files) else None
        sizes = [int(each["file_size"]) if "file_size" in each else untold for each in files]
        return {PurePosixPath(each["path"]).name: size for each, size in zip(files, sizes, strict=True)}

    def _download(self, name: str, target: Path) -> int:
        """Stream one file from MLflow's server, appending to what `target` already holds; return how much that was."""
        held = target.stat().st_size if target.exists() else 0
        with self._asked(name, f"bytes={held}-" if held else "") as response:
            if response.status_code == _NO_SUCH_SPAN and held:
                # What is here is longer than what is there.
                target.unlink()
                return self._download(name, target)
            response.raise_for_status()
            partial = response.status_code == 206
            with target.open("ab" if partial else "wb") as stream:
                for chunk in response.iter_content(_CHUNK):
                    stream.write(chunk)
        return held if partial else 0

    def _asked(self, name: str, span: str) -> "Response":
        """Ask MLflow's server for a file, or for a span of its bytes."""
        wish = {"Accept-Encoding": "identity", **({"Range": span} if span else {})}
        uri = self._repository.artifact_uri
        response = _ask(uri, f"/{name}", extra_headers=wish, stream=True, retry_codes=_BUSY)
        if response.status_code != _BROKEN:
            return response
        # So it answers for a file that is gone where its store is not a local one, and for all else that fails.
        response.close()
        self._expect(name)
        return _ask(uri, f"/{name}", extra_headers=wish, stream=True)


def _ask(host: str, endpoint: str, **more: Any) -> "Response":
    """Ask a server, with the credentials that MLflow has for it."""
    with importing():
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

    response = http_request(get_default_host_creds(host), endpoint, "GET", **more)
    if response is None:
        raise RegistryError(f"{host}{endpoint} gave no answer")
    return response


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Say in one sentence what an error of a store means, whatever library it comes from."""
    from requests import RequestException

    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, RequestException):
            # This machine's own: the disk is full.
            raise
        status = getattr(getattr(error, "response", None), "status_code", 0)
        raise (Lost if status in _ABSENT else RegistryError)(f"{what} ({_why(error)})") from error


def _why(error: Exception) -> str:
    """Return in a few words why a file was not given: servers send whole documents along."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _folder(name: str) -> str:
    """Return the folder that holds a file, empty for the topmost."""
    folder = PurePosixPath(name).parent.as_posix()
    return "" if folder == "." else folder
