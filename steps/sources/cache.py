"""The download cache: directories that are complete and unaltered, or absent; interrupted downloads go on."""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from steps.artifacts import Tree, digest_tree
from steps.frame.errors import UserError

if TYPE_CHECKING:
    import httpx

_ATTEMPTS = 4


def cached(place: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory `place`, filled by `make` unless it is there and every byte is as it was.

    Artifacts may share their files with the cache through hard links, so a file damaged in one is damaged in the
    other: what was downloaded is digested then and checked whenever it is used. `make` gets a partial directory that
    survives an interruption; one rename makes it complete. Of several processes one downloads and the others wait.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    digests = place.with_name(f"{place.name}.digests.json")
    with _locked(place.with_name(f"{place.name}.lock")):
        if place.is_dir():
            if _is_sound(place, digests):
                return place
            shutil.rmtree(place)
        partial = place.with_name(f"{place.name}.partial")
        partial.mkdir(exist_ok=True)
        make(partial)
        digests.write_text(digest_tree(partial).model_dump_json())
        partial.rename(place)
    return place


def download(client: "httpx.Client", url: str, target: Path) -> None:
    """Fetch `url` into `target`, going on where an earlier attempt stopped if the server can send the rest.

    Raises:
        UserError: the server refuses, or the connection broke several times in a row.
    """
    import httpx

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    for attempt in range(_ATTEMPTS):
        try:
            _receive(client, url, partial)
        except httpx.HTTPStatusError as error:
            raise UserError(f"{url}: the server answers {error.response.status_code}") from None
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS - 1:
                raise UserError(f"{url}: the download broke off ({error}); run again to go on from there") from None
            time.sleep(0.5 * 2**attempt)
        else:
            partial.replace(target)
            return


def _receive(client: "httpx.Client", url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    # Compressed, the bytes would not line up with the range.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:  # nothing is left to send, or the file became shorter: take it anew
            partial.unlink()
            return _receive(client, url, partial)
        response.raise_for_status()
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with partial.open("ab" if goes_on else "wb") as stream:
            for chunk in response.iter_bytes():
                stream.write(chunk)


def _is_sound(place: Path, digests: Path) -> bool:
    try:
        return digest_tree(place) == Tree.model_validate_json(digests.read_bytes())
    except (OSError, ValidationError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
