"""YAML with line numbers: what a recipe's errors point at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from steps.frame import UserError

Place = tuple[str | int, ...]
_LARGEST = 1 << 20
"""Bytes of a file."""
_MOST_VALUES = 20_000
"""Keys and values of a file with its aliases written out."""
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """Reads YAML; a value that is none of its kind is an error with a line, whatever PyYAML makes of it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value.

        Raises:
            YAMLError: it has none. PyYAML's own functions take the text for one of its kind, which an explicit tag
                (`!!int ''`) or a day that no month has (`2026-02-31`) is not.
        """
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            kind = node.tag.rpartition(":")[2]
            why = f" ({error})" if isinstance(error, ValueError) else ""
            said = f"{str(node.value)[:60]!r} is no {kind}{why}; in quotes, without a tag, it is a text"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from None


@dataclass(frozen=True)
class YamlFile:
    """A parsed YAML mapping and the line on which each of its keys stands."""

    path: Path
    content: dict[str, Any]
    lines: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "YamlFile":
        """Read a file whose top level is a mapping.

        Raises:
            UserError: it is missing, is no YAML in UTF-8, repeats a key, grows beyond measure, or is not a mapping.
        """
        text = _text(path)
        lines: dict[Place, int] = {}
        try:
            tree = yaml.compose(text, Loader=_Loader)
            if tree is not None:
                _expanded(tree, path, {})
                _note_lines(tree, (), lines, path)
            content = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            raise UserError(f"{path}: not valid YAML: {error.reason}, character {error.position}") from None
        except RecursionError:
            raise UserError(f"{path}: its values are nested too deep") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: a recipe is a mapping with `name:` and `steps:` at its top")
        return cls(path, content, lines)

    def with_lines_of(self, place: Place) -> "YamlFile":
        """Return the file with what stands below `place` laid over its top, so that errors point there."""
        depth = len(place)
        below = {spot[depth:]: line for spot, line in self.lines.items() if spot[:depth] == place and spot != place}
        return replace(self, lines={**self.lines, **below})

    def where(self, place: Sequence[str | int]) -> str:
        """Return `FILE:LINE` of a key, or of the nearest key above it that stands in this file."""
        for length in range(len(place), 0, -1):
            if line := self.lines.get(tuple(place[:length])):
                return f"{self.path}:{line}"
        return str(self.path)


def read_value(text: str, place: Path) -> Any:
    """Read one value that stands by itself.

    Args:
        text: its YAML.
        place: where it stands, for errors.

    Raises:
        UserError: it grows beyond measure.
        YAMLError, RecursionError: it is no YAML.
    """
    if node := yaml.compose(text, Loader=_Loader):
        _expanded(node, place, {})
    return yaml.load(text, Loader=_Loader)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if len(content) > _LARGEST:
        raise UserError(f"{path}: {len(content)} bytes are no recipe; {_LARGEST} are the most that is read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 ({error.reason}); save the file in that encoding") from None


def _expanded(node: yaml.Node, path: Path, sizes: dict[int, int]) -> int:
    """Return how many values a node stands for, its aliases written out.

    Args:
        node: where to count.
        path: of the file, for errors.
        sizes: of the nodes that were counted, by identity; 0 for one within which this one lies.

    Raises:
        UserError: it holds itself, or is too large.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise UserError(f"{path}:{node.start_mark.line + 1}: this holds an alias to itself")
    if known is None:
        sizes[id(node)] = 0
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known = 1 + sum(_expanded(part, path, sizes) for part in parts)
        sizes[id(node)] = known
    if known > _MOST_VALUES:
        line = node.start_mark.line + 1
        raise UserError(f"{path}:{line}: with its aliases written out this is more than {_MOST_VALUES} values")
    return known


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path}:{key.start_mark.line + 1}: a key is a word, not a list or a mapping")
            below = (*place, key.value)
            line = key.start_mark.line + 1
            if below in lines:
                dotted = ".".join(map(str, below))
                raise UserError(f"{path}:{line}: `{dotted}` is given twice, first on line {lines[below]}")
            lines[below] = line
            _note_lines(value, below, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _note_lines(value, (*place, index), lines, path)
