"""Which row a step is at: whoever reads rows says so, and an error that nobody foresaw is told with it."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_at: list[str] = []


def placed(rows: Iterable[tuple[T, str]]) -> Iterator[T]:
    """Yield rows, each known as the one the step is at while whoever asked for it works on it.

    Args:
        rows: each with where it stands, `data.jsonl line 7`.
    """
    _at.append("")
    own = len(_at) - 1
    try:
        for row, where in rows:
            _at[own] = where
            yield row
    finally:
        del _at[own:]


def row_place() -> str:
    """Return where the row stands that the step is at; empty where it reads none."""
    return _at[-1] if _at else ""
