"""Duplicates: exact ones by their normalised text, near ones by MinHash and locality-sensitive hashing."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from steps.data._conversations import Conversation

_PERMUTATIONS = 128
_SHINGLE = 3
_MOST_MISSED = 0.01


class Row(Protocol):
    """What has a normalised text."""

    @property
    def text(self) -> str:
        """What duplicates are compared by."""
        ...


R = TypeVar("R", bound=Row)


def without_exact(rows: Iterable[R]) -> tuple[list[R], int]:
    """Keep the first row of every normalised text; return the rows and how many were dropped."""
    kept: dict[str, R] = {}
    count = 0
    for row in rows:
        count += 1
        kept.setdefault(row.text, row)
    return list(kept.values()), count - len(kept)


def without_near(rows: Sequence[Conversation], threshold: float) -> tuple[list[Conversation], int]:
    """Keep the first of rows whose sets of word triples are alike.

    Args:
        rows: in the order in which the first is kept.
        threshold: Jaccard similarity (shared triples over all triples) from which two rows count as the same; it is
            estimated from 128 hash functions, with a standard error below 0.045.

    Returns:
        The rows kept and how many were dropped.

    Source: Broder 1997, On the resemblance and containment of documents; Lee et al. 2022, arXiv:2107.06499.
    """
    from rensa import RMinHashDeduplicator  # pyright: ignore[reportAttributeAccessIssue]

    index = RMinHashDeduplicator(threshold, _PERMUTATIONS, True, bands(threshold))
    keep: list[bool] = index.add_pairs((str(number), shingles(row.text)) for number, row in enumerate(rows))
    kept = [row for row, is_first in zip(rows, keep, strict=True) if is_first]
    return kept, len(rows) - len(kept)


def bands(threshold: float) -> int:
    """Return the fewest bands by which at most 1 % of the pairs at the threshold are never compared.

    A pair of similarity s agrees in all r rows of one of b bands with the chance 1 - (1 - s^r)^b, b r = 128. The
    library's own choice of 8 bands misses four of five pairs at 0.8.
    """
    counts = [2**exponent for exponent in range(_PERMUTATIONS.bit_length())]
    enough = (count for count in counts if (1 - threshold ** (_PERMUTATIONS // count)) ** count <= _MOST_MISSED)
    return next(enough, _PERMUTATIONS)


def shingles(text: str) -> list[str]:
    """Return the word triples of a normalised text; a shorter text is its own only shingle."""
    words = text.split(" ")
    return [" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))]
