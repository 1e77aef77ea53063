"""`hf://ORG/NAME@REVISION` and `hf://datasets/ORG/NAME@REVISION`: repositories of the Hugging Face Hub.

Spoken over plain HTTP (https://huggingface.co/docs/hub/api) so that the hub that `HF_ENDPOINT` names is the one that
is asked, whenever it is set, with `HF_TOKEN` where the hub wants one. Only data is ever taken: no code, no pickle.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from steps.artifacts import digest_file
from steps.frame.errors import UserError
from steps.sources.cache import cached, download
from steps.sources.checkpoint import checkpoint_files
from steps.sources.rows import is_about, is_data_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

_FORM = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/@]+))?(?:/(?P<pattern>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
_TRAIN = re.compile(r"(^|[/_.-])train([/_.-]|$)")


class Repository(NamedTuple):
    """The parts of an `hf://` URI."""

    uri: str
    datasets: bool
    name: str
    """`ORG/NAME`."""
    revision: str
    pattern: str
    """Files to take, with wildcards; empty takes what the repository's kind needs."""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    def place(self, cache: Path) -> Path:
        """Directory of the cache that holds the files of the commit `revision`."""
        kind = "datasets" if self.datasets else "models"
        chosen = "-" + hashlib.sha256(self.pattern.encode()).hexdigest()[:8] if self.pattern else ""
        return cache / "hub" / kind / self.name.replace("/", "--") / f"{self.revision}{chosen}"


class Listing(NamedTuple):
    """What the hub says of a repository at a revision."""

    commit: str
    files: Mapping[str, Mapping[str, Any]]
    """`size`, `blobId` and `lfs` by path."""


def parse(uri: str) -> Repository:
    """Read a URI; without a revision it means `main`.

    Raises:
        UserError: it is not of the form.
    """
    match = _FORM.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri}: write hf://ORG/NAME@REVISION or hf://datasets/ORG/NAME@REVISION")
    parts = match.groupdict(default="")
    return Repository(uri, bool(parts["datasets"]), parts["name"], parts["revision"] or "main", parts["pattern"])


def fingerprint(uri: str, root: Path) -> str:
    """Return the URI with its commit; a branch or tag is looked up."""
    repository = parse(uri)
    if repository.pinned:
        return uri
    commit = _listing(repository).commit
    kind, pattern = "datasets/" * repository.datasets, f"/{repository.pattern}" * bool(repository.pattern)
    return f"hf://{kind}{repository.name}@{commit}{pattern}"


def check(uri: str, root: Path, cache: Path) -> None:
    """Ask the hub for the repository and whether it holds what is needed, unless it is in the cache."""
    repository = parse(uri)
    if not (repository.pinned and repository.place(cache).is_dir()):
        _choose(repository, _listing(repository))


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Return the checkpoint directory (or the GGUF file that the URI names), downloaded unless in the cache."""
    repository = parse(uri)
    if repository.datasets:
        raise UserError(f"{uri}: this is a data set, where a model is needed")
    folder = _fetch(repository, cache)
    files = sorted(folder.rglob("*.gguf"))
    return files[0] if len(files) == 1 else folder


def model_at_hand(uri: str, cache: Path, root: Path) -> Path | None:
    """Return the checkpoint's directory, where the commit is in the cache."""
    repository = parse(uri)
    place = repository.place(cache)
    if not (repository.pinned and place.is_dir()):
        return None
    files = sorted(place.rglob("*.gguf"))
    return files[0] if len(files) == 1 else place


def fetch_template(uri: str, cache: Path, root: Path) -> Path:
    """Return a directory with the files of a model that hold its chat template, or the one that the URI names."""
    repository = parse(uri)
    if repository.datasets:
        raise UserError(f"{uri}: this is a data set, where a model with a chat template is needed")
    wanted = (repository.pattern,) if repository.pattern else _TEMPLATE_FILES
    if not repository.pinned:
        repository = repository._replace(revision=_listing(repository).commit)

    def make(partial: Path) -> None:
        found = _listing(repository)
        names = [name for name in wanted if name in found.files]
        if not names:
            raise UserError(f"{uri}: the repository holds no {' and no '.join(wanted)}")
        _take(repository, found, names, partial)

    folder = cached(repository._replace(pattern="|".join(wanted)).place(cache), make)
    return folder / repository.pattern if repository.pattern else folder


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Return the data files, downloaded unless in the cache."""
    repository = parse(uri)
    if not repository.datasets:
        raise UserError(f"{uri}: this is a model; a data set is hf://datasets/{repository.name}")
    folder = _fetch(repository, cache)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fetch(repository: Repository, cache: Path) -> Path:
    listing = None
    if not repository.pinned:
        listing = _listing(repository)
        repository = repository._replace(revision=listing.commit)

    def make(partial: Path) -> None:
        found = listing or _listing(repository)
        _take(repository, found, _choose(repository, found), partial)

    return cached(repository.place(cache), make)


def _take(repository: Repository, found: Listing, names: list[str], partial: Path) -> None:
    """Download files into a directory, but those that an interrupted attempt left there."""
    kind = "datasets/" * repository.datasets
    with _client() as client:
        for name in names:
            if not (partial / name).exists():
                url = f"{_endpoint()}/{kind}{repository.name}/resolve/{found.commit}/{quote(name)}"
                download(client, url, partial / name)
            _verify(partial / name, found.files[name], f"{repository.uri}: {name}")


def _choose(repository: Repository, listing: Listing) -> list[str]:
    """Choose the files to take.

    Raises:
        UserError: the repository holds nothing of use, or names a file outside itself.
    """
    names = sorted(listing.files)
    if odd := [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise UserError(f"{repository.uri}: the hub lists a file outside the repository, {odd[0]}")
    if repository.pattern:
        ending = is_data_file if repository.datasets else lambda name: name.endswith(".gguf")
        chosen = [name for name in fnmatch.filter(names, repository.pattern) if ending(name)]
        kind = "data file" if repository.datasets else ".gguf file"
        if not chosen or (len(chosen) > 1 and not repository.datasets):
            raise UserError(f"{repository.uri}: {len(chosen)} files match; name one {kind} of the repository")
        return chosen
    return _data_files(names, repository.uri) if repository.datasets else checkpoint_files(names, repository.uri)


def _data_files(names: list[str], label: str) -> list[str]:
    """Choose the files of one format, and of the training split where files are named by split."""
    for ending in (".parquet", ".jsonl", ".csv", ".json"):
        # What the `datasets` library writes beside the data is none.
        if found := [name for name in names if name.endswith(ending) and not is_about(name)]:
            return [name for name in found if _TRAIN.search(name)] or found
    raise UserError(f"{label}: the repository holds no .parquet, .jsonl, .csv or .json file")


def _verify(path: Path, stated: Mapping[str, Any], label: str) -> None:
    """Compare a download with the digest that the hub states: sha256 for large files, git's own for small ones."""
    if large := stated.get("lfs"):
        sound = digest_file(path).sha256 == large["sha256"]
    elif blob := stated.get("blobId"):
        content = path.read_bytes()
        sound = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob
    else:
        sound = True
    if not sound:
        path.unlink()
        raise UserError(f"{label}: the bytes are not those that the hub announces; run again to fetch it anew")


def _listing(repository: Repository) -> Listing:
    """Ask the hub for commit and files.

    Raises:
        UserError: the hub does not answer, or has no such repository or revision.
    """
    import httpx

    kind = "datasets" if repository.datasets else "models"
    url = f"{_endpoint()}/api/{kind}/{repository.name}/revision/{quote(repository.revision, safe='')}"
    try:
        with _client() as client:
            response = client.get(url, params={"blobs": "true"})
    except httpx.TransportError as error:
        raise UserError(f"{repository.uri}: the hub at {_endpoint()} does not answer ({error})") from None
    if response.status_code in (401, 403):
        raise UserError(f"{repository.uri}: the hub gives no access; is the name right, and is HF_TOKEN set?")
    if response.status_code == 404:
        raise UserError(f"{repository.uri}: the hub at {_endpoint()} has no such repository or revision")
    if response.status_code != 200:
        raise UserError(f"{repository.uri}: the hub at {_endpoint()} answers {response.status_code}")
    answer = response.json()
    return Listing(answer["sha"], {entry["rfilename"]: entry for entry in answer["siblings"]})


@contextmanager
def _client() -> "Iterator[httpx.Client]":
    import httpx

    token = os.environ.get("HF_TOKEN")
    # httpx drops the token when the hub redirects to another host's storage.
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(follow_redirects=True, timeout=30, headers=headers) as client:
        yield client


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
