"""`file://` URIs and plain paths, also with wildcards: files and model directories of this machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from steps.artifacts import digest_file
from steps.artifacts.tree import tree_sha256
from steps.frame.errors import UserError
from steps.sources.checkpoint import checkpoint_in
from steps.sources.rows import ENDINGS, TEXTS, is_about, is_data_file

_WILDCARDS = "*?["


def fingerprint(uri: str, root: Path) -> str:
    """Return the sha256 over the files and their names below the deepest directory that holds them all."""
    files = [file for path in _find(uri, root) for file in ([path] if path.is_file() else _files_in(path))]
    base = Path(os.path.commonpath(file.parent for file in files))
    return f"sha256:{tree_sha256({file.relative_to(base).as_posix(): digest_file(file) for file in files})}"


def check(uri: str, root: Path, cache: Path) -> None:
    """Refuse a path where nothing is, and a directory that holds neither a checkpoint nor data; nothing is cached."""
    for path in _find(uri, root):
        if path.is_dir():
            _files_in(path)


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Return the checkpoint directory, or the GGUF file, where it is."""
    found = _find(uri, root)
    if len(found) != 1:
        raise UserError(f"{uri}: {len(found)} files match, where a model is one directory or one .gguf file")
    if found[0].is_file() and found[0].suffix != ".gguf":
        raise UserError(f"{uri}: a model is a Hugging Face checkpoint directory or one .gguf file")
    return found[0]


def model_at_hand(uri: str, cache: Path, root: Path) -> Path | None:
    """Return the one checkpoint directory or file, where there is one."""
    try:
        return fetch_model(uri, cache, root)
    except UserError:
        return None


def fetch_template(uri: str, cache: Path, root: Path) -> Path:
    """Return the one file, or model's directory, where it is."""
    found = _find(uri, root)
    if len(found) != 1:
        raise UserError(f"{uri}: {len(found)} files match, where a chat template is one")
    return found[0]


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Return the data files, sorted; a directory stands for all that are below it.

    Raises:
        UserError: a directory holds none.
    """
    found: list[Path] = []
    for path in _find(uri, root):
        files = _data_below(path) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{uri}: {path} is a directory without data files ({', '.join(ENDINGS)})")
        found += files
    return sorted(found)


def _files_in(directory: Path) -> list[Path]:
    """Return the files that a directory stands for, as a model or as data.

    Raises:
        UserError: it is no checkpoint, and holds no data either.
    """
    data = _data_below(directory)
    tables = [path for path in data if path.suffix.lower() not in (*TEXTS, ".json")]
    try:
        return sorted({*checkpoint_in(directory), *tables})
    except UserError:
        # With settings of a model beside it, it was meant as one.
        if not data or (directory / "config.json").exists():
            raise
        return data


def passed_over(uri: str, root: Path) -> list[Path]:
    """Return the plain texts that a directory holds beside tables: they are taken only where they are named."""
    return sorted(
        path for place in _find(uri, root) if place.is_dir() for path in {*_every(place)} - {*_data_below(place)}
    )


def _data_below(directory: Path) -> list[Path]:
    """Return the data files in a directory and those within it.

    Where there are tables, plain text beside them is left out; else it is what the directory holds.
    """
    found = _every(directory)
    return [path for path in found if path.suffix.lower() not in TEXTS] or found


def _every(directory: Path) -> list[Path]:
    """Return all data files below a directory, sorted; what is hidden, or only tells of the others, is left out."""
    every = (path for path in directory.rglob("*") if is_data_file(path.name) and path.is_file())
    shown = (path for path in every if not any(part[0] == "." for part in path.relative_to(directory).parts))
    return sorted(path for path in shown if not is_about(path.name))


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
        if found := sorted(_matching(path)):
            return found
        raise UserError(f"{uri}: no file matches in {root}")
    raise UserError(f"{uri}: no such file or directory in {root}")


def _matching(path: Path) -> Iterator[Path]:
    """Yield what a path with wildcards matches; folders that are really called so are no wildcards."""
    base, parts = Path(path.anchor), path.parts[1:]
    for number, part in enumerate(parts):
        if not (base / part).is_dir():
            yield from base.glob("/".join(parts[number:]))
            return
        base /= part
