"""YAML with line numbers: what a recipe's errors point at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from steps.frame import UserError

Place = tuple[str | int, ...]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
            UserError: it is missing, is no YAML, repeats a key, or is not a mapping.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        lines: dict[Place, int] = {}
        try:
            tree = yaml.compose(text, Loader=_Loader)
            if tree is not None:
                _note_lines(tree, (), lines, path)
            content = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
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


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
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
