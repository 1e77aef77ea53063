"""A digest of a step's code: of its own module and of the modules of `steps` that it imports, at any depth.

It is part of the step's key, so that a result that other code gave is never taken for this code's. Comments,
docstrings and blank lines do not count, nor does what is imported for type checkers alone. The frame and the proofs of
runtimes are left out: they run every step and compute nothing, and what they decide (a precision, a number of
processes) stands in the config or in the key by itself.
"""

import ast
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import steps as rooms

_AROUND = ("steps.__main__", "steps.frame", "steps.runtime")

_FORMATTED: tuple[type[ast.expr], ...] = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))
"""Strings with values in them; those with `t` are there from Python 3.14 on."""

_Range = tuple[int, int]
_Ranges = dict[int, list[_Range]]
"""By the number of a line, where in its UTF-8 bytes something begins and ends; `sys.maxsize` where it goes on."""

Find = Callable[[str], Path | None]
"""Returns the file of a module by its full name, None where the module does not count."""


def code_digest(module: str) -> str:
    """Return the sha256 over the code of a module of `steps` and of all that it imports of `steps`.

    Args:
        module: full name, `steps.train.sft`.

    Raises:
        SyntaxError: one of them is no Python.
    """
    return digest_modules(code_modules(module))


def code_modules(module: str) -> dict[str, Path]:
    """Return the modules whose code a step of this module runs, its own among them, by name."""
    return modules_behind(module, _own_file)


@dataclass(frozen=True)
class StepCode:
    """A step's code as it was at one moment."""

    digest: str
    files: Mapping[Path, int]
    """Those behind the digest, each with when it was changed last (nanoseconds)."""

    @classmethod
    def of(cls, module: str) -> "StepCode":
        """Look at a module of `steps` and all that it imports of `steps`."""
        modules = code_modules(module)
        files = {path: changed_at(path) for path in modules.values()}
        return cls(digest_modules(modules), files)


def changed_at(path: Path) -> int:
    """Return when a file was changed last, in nanoseconds; 0 where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def digest_modules(modules: Mapping[str, Path]) -> str:
    """Return the sha256 over the code of modules, given with their files."""
    told = "".join(f"{name} {_code(name, path).digest}\n" for name, path in sorted(modules.items()))
    return hashlib.sha256(told.encode()).hexdigest()


def modules_behind(module: str, find: Find) -> dict[str, Path]:
    """Return a module and all that it imports, at any depth, as far as `find` knows them.

    Raises:
        SyntaxError: one of them is no Python in UTF-8.
    """
    found: dict[str, Path] = {}
    to_read = [module]
    while to_read:
        name = to_read.pop()
        if name not in found and (path := find(name)):
            found[name] = path
            to_read += _code(name, path).names
    return found


def file_of(module: str) -> Path | None:
    """Return the file of a module of `steps` by its full name, None where there is no such module."""
    room, *rest = module.split(".")
    if room != rooms.__name__:
        return None
    place = Path(rooms.__path__[0], *rest)
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class _Code:
    """What one module holds."""

    digest: str
    names: tuple[str, ...]
    """All that its imports may mean: modules, and names in them."""


def _code(module: str, path: Path) -> _Code:
    return _read(module, path, path.stat().st_mtime_ns)


@cache
def _read(module: str, path: Path, _changed: int) -> _Code:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SyntaxError(f"it is not in UTF-8 ({error.reason})", (str(path), None, None, None)) from None
    tree = ast.parse(text, str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes = list(_running(tree))
    named = {name for node in nodes for name in _imported(node, package)}
    if package == module:
        # A package that is a program is run by its folder.
        named.add(f"{module}.__main__")
    # With a module its packages are imported, too.
    named |= {parent for name in (*named, module) for parent in _parents(name)}
    return _Code(hashlib.sha256(_essence(text, nodes).encode()).hexdigest(), tuple(sorted(named - {module})))


def _own_file(module: str) -> Path | None:
    """Find a module of `steps`, those around a step excepted."""
    if any(module == name or module.startswith(f"{name}.") for name in _AROUND):
        return None
    return file_of(module)


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that only type checkers read."""
    to_visit = [tree]
    while to_visit:
        node = to_visit.pop()
        yield node
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        to_visit += node.orelse if isinstance(node, ast.If) and is_for_types else ast.iter_child_nodes(node)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Yield what an import may mean: a module or a name in one; in a program, a neighbour by its short name."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from (alias.name, f"{package}.{alias.name}")
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        for start in (base, f"{package}.{base}"):
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def _essence(text: str, nodes: Iterable[ast.AST]) -> str:
    """Return a module's text without comments, docstrings and blank lines: the same for every version of Python."""
    known = list(nodes)
    docstrings = [node.value for node in known if isinstance(node, ast.Expr) and _is_text(node.value)]
    formatted = [node for node in known if isinstance(node, _FORMATTED)]
    # Before Python 3.12 what stands within a formatted string is said to be in odd places; the whole covers it.
    within = {id(part) for node in formatted for part in ast.walk(node) if part is not node}
    others = within | {id(node) for node in docstrings}
    constants = [node for node in known if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)]
    explaining = _places(docstrings)
    literal = _places(node for node in (*formatted, *constants) if id(node) not in others)
    lines = enumerate(text.split("\n"), 1)
    kept = (_code_of(line, literal.get(number, ()), explaining.get(number, ())) for number, line in lines)
    return "\n".join(line for line in kept if line is not None)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _places(nodes: Iterable[ast.expr]) -> _Ranges:
    """Return the parts of lines over which nodes extend."""
    ranges: _Ranges = {}
    for node in nodes:
        last = node.end_lineno or node.lineno
        for line in range(node.lineno, last + 1):
            start = node.col_offset if line == node.lineno else 0
            ranges.setdefault(line, []).append((start, (node.end_col_offset or 0) if line == last else sys.maxsize))
    return ranges


def _code_of(line: str, literal: Sequence[_Range], explaining: Sequence[_Range]) -> str | None:
    """Return a line without docstrings, up to the first `#` that stands in no string; None where nothing is left.

    Args:
        line: as it stands in the file.
        literal: the parts of it that belong to strings, as ranges of its UTF-8 bytes.
        explaining: those that belong to docstrings.
    """
    if not explaining and "#" not in line and not literal:
        return line.rstrip() or None
    content = line.encode()
    # Masked, so that what is found there is neither a comment nor in the way of one.
    masked = bytearray(content)
    for start, end in (*literal, *explaining):
        end = min(end, len(masked))
        masked[start:end] = b"_" * (end - start)
    comment = masked.find(b"#")
    end = len(content) if comment < 0 else comment
    code = b"".join(content[begin:stop] for begin, stop in _between(explaining, end)).decode()
    if any(stop == sys.maxsize for _, stop in literal):
        # The string goes on in the next line: all to the end is its own.
        return code
    return code.rstrip() or None


def _between(cut: Iterable[_Range], end: int) -> Iterator[_Range]:
    """Yield the ranges up to an end that are left where some are cut out."""
    begin = 0
    for start, stop in sorted(cut):
        yield (begin, start)
        begin = min(stop, end)
    yield (begin, end)
