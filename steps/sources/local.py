"""`file://` URIs and plain paths, also with wildcards: files and model directories of this machine."""

import os
from pathlib import Path
from urllib.parse import unquote

from steps.artifacts import digest_file
from steps.artifacts.tree import tree_sha256
from steps.frame.errors import UserError
from steps.sources.checkpoint import checkpoint_in

_WILDCARDS = "*?["


def fingerprint(uri: str, root: Path) -> str:
    """Return the sha256 over the files and their names below the deepest directory that holds them all."""
    found = _find(uri, root)
    files = [file for path in found for file in ([path] if path.is_file() else checkpoint_in(path))]
    base = Path(os.path.commonpath(file.parent for file in files))
    return f"sha256:{tree_sha256({file.relative_to(base).as_posix(): digest_file(file) for file in files})}"


def check(uri: str, root: Path, cache: Path) -> None:
    """Refuse a path where nothing is, and a directory that is not a checkpoint; nothing of it is cached."""
    for path in _find(uri, root):
        if path.is_dir():
            checkpoint_in(path)


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Return the checkpoint directory, or the GGUF file, where it is."""
    found = _find(uri, root)
    if len(found) != 1:
        raise UserError(f"{uri}: {len(found)} files match, where a model is one directory or one .gguf file")
    if found[0].is_file() and found[0].suffix != ".gguf":
        raise UserError(f"{uri}: a model is a Hugging Face checkpoint directory or one .gguf file")
    return found[0]


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Return the data files, sorted."""
    found = _find(uri, root)
    if folders := [path for path in found if path.is_dir()]:
        raise UserError(f"{uri}: {folders[0]} is a directory; name its files, for example {uri.rstrip('/')}/*.jsonl")
    return found


def _find(uri: str, root: Path) -> list[Path]:
    """Return the files or directories that a URI means, sorted.

    Raises:
        UserError: there are none.
    """
    text = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    path = root / Path(text).expanduser()
    if path.exists():
        return [path]
    if any(character in text for character in _WILDCARDS):
        if found := sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
            return found
        raise UserError(f"{uri}: no file matches in {root}")
    raise UserError(f"{uri}: no such file or directory in {root}")
