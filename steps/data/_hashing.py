"""Stable hashes: the same text lands in the same place on every machine and beside any other rows."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain, count


def hexdigest(content: bytes) -> str:
    """Return the sha256 as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def uniform(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the parts alone; as good as drawn at random for different parts."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def different_ids(wanted: Iterable[Sequence[str]]) -> list[str]:
    """Return for each row the first of the ids it might have that no row before has, else the last one, numbered.

    >>> different_ids([["a"], ["a"], ["a", "b"]])
    ['a', 'a-2', 'b']
    """
    taken: set[str] = set()
    found = []
    for names in wanted:
        numbered = (f"{names[-1]}-{number}" for number in count(2))
        found.append(next(name for name in chain(names, numbered) if name not in taken))
        taken.add(found[-1])
    return found
