"""Code as it was at one moment: what is imported later is imported as it was then, whatever was edited meanwhile.

A step's key speaks of its code, and of a user's reward, as they were before it began. Much is imported only as the step
works, hours later perhaps: from the file as it is then, it would be other code under the same key, or half of each.
"""

import linecache
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from steps.frame.code import changed_at
from steps.frame.errors import UserError


@dataclass(frozen=True)
class _Source:
    """A module's file as it was."""

    path: Path
    changed: int
    content: bytes

    @property
    def is_edited(self) -> bool:
        """Whether the file is another now; one that was only touched is the same."""
        if changed_at(self.path) == self.changed:
            return False
        try:
            return self.path.read_bytes() != self.content
        except OSError:
            return True


_sources: dict[str, _Source] = {}


def pin(modules: Mapping[str, Path]) -> None:
    """Import these modules, whenever it may be in this process, as their files are now.

    Args:
        modules: files by the modules' full names.

    Raises:
        UserError: a file is gone, or its module was imported as it was before an edit.
    """
    for name, path in modules.items():
        try:
            now = _Source(path, changed_at(path), path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        known = _sources.setdefault(name, now)
        if name not in sys.modules:
            _sources[name] = now
        elif known.content != now.content:
            raise UserError(f"{path} was changed after it was imported; run again")
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def pinned_spec(module: str) -> ModuleSpec:
    """Return how to import a pinned module from what it was."""
    path = _sources[module].path
    places = [str(path.parent)] if path.name == "__init__.py" else None
    loader = _AsItWas(module, str(path))
    spec = spec_from_file_location(module, path, loader=loader, submodule_search_locations=places)
    assert spec is not None
    return spec


def check_unedited(*rooms: str) -> None:
    """Check that a new interpreter, which imports from the files, gets the code that was pinned.

    Args:
        rooms: packages or modules that it imports; those below them count, too.

    Raises:
        UserError: one of the files was edited.
    """
    for name, source in _sources.items():
        if any(name == room or name.startswith(f"{room}.") for room in rooms) and source.is_edited:
            raise UserError(f"{source.path} was changed while the step ran; run again")


class _AsItWas(SourceFileLoader):
    """Loads a module from what its file held; no bytecode, which would be that of the edited file."""

    def path_stats(self, path: str) -> Mapping[str, float]:
        raise OSError(path)

    def get_data(self, path: str) -> bytes:
        content = _sources[self.name].content
        # Where Python looks for the source of a class or of a line in a traceback.
        lines = content.decode(errors="replace").splitlines(keepends=True)
        linecache.cache[path] = (len(content), None, lines, path)
        return content


class _Finder(MetaPathFinder):
    """Finds pinned modules whose files were edited; the others are found, and their bytecode used, as ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = _sources.get(fullname)
        return pinned_spec(fullname) if source and source.is_edited else None


_FINDER = _Finder()
