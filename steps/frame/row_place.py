"""Which row a step is at: whoever reads rows says so, and an error that nobody foresaw is told with it."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_at: list[list[str]] = []
"""A cell for each walk over rows that has not ended, the latest last."""


def placed(rows: Iterable[tuple[T, str]]) -> Iterator[T]:
    """Yield rows, each known as the one the step is at while whoever asked for it works on it.

    Args:
        rows: each with where it stands, `data.jsonl line 7`.
    """
    own = [""]
    _at.append(own)
    try:
        for row, where in rows:
            own[0] = where
            yield row
    finally:
        _at[:] = [each for each in _at if each is not own]


def row_place() -> str:
    """Return where the row stands that the step is at; empty where it reads none."""
    return _at[-1][0] if _at else ""
