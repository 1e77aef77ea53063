"""Duplicates: exact ones, and near ones by MinHash and locality-sensitive hashing of what tells rows apart."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_PERMUTATIONS = 128
_SEED = 42
_SHINGLE = 3
_MOST_MISSED = 0.01
_SHARED_BY = 10
"""Rows from which a common beginning or end is a template's, and no sign of likeness..."""
_SHARED_PART = 0.01
"""... and the part of all rows: fewer than this are many copies of one text rather than an instruction."""

Words = list[str]


class Row(Protocol):
    """What can be told from others."""

    @property
    def said(self) -> Hashable:
        """What it says, to the letter."""
        ...


class Worded(Row, Protocol):
    """What can be compared by its words."""

    def words_of(self, *, assistant: bool) -> Words:
        """Return the words of what is learned, or of what stands before it, lower case."""
        ...


R = TypeVar("R", bound=Row)
W = TypeVar("W", bound=Worded)


@dataclass(frozen=True)
class Dropped(Generic[R]):
    """A row that is left out for one like it that stays."""

    row: R
    like: R


def without_exact(rows: Iterable[R]) -> tuple[list[R], list[Dropped[R]]]:
    """Keep the first of rows that say the same to the letter; return those kept and those dropped."""
    kept: dict[Hashable, R] = {}
    dropped = []
    for row in rows:
        first = kept.setdefault(row.said, row)
        if first is not row:
            dropped.append(Dropped(row, first))
    return list(kept.values()), dropped


def without_near(rows: Sequence[W], threshold: float) -> tuple[list[W], list[Dropped[W]]]:
    """Keep the first of rows that ask alike and are answered alike, in words; letters' case does not count.

    Two rows are alike where all three are: what is said to the assistant, that without the words it begins or ends
    with in many rows (an instruction, a system message: `template_words`), and what the assistant says. So one
    instruction over many short texts makes no duplicates of them, and another label makes another row.

    Args:
        rows: in the order in which the first is kept.
        threshold: Jaccard similarity (shared word triples over all triples) from which two texts are alike; it is
            estimated from 128 hash functions, with a standard error below 0.045.

    Source: Broder 1997, On the resemblance and containment of documents; Lee et al. 2022, arXiv:2107.06499.
    """
    from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]

    asked = [row.words_of(assistant=False) for row in rows]
    answered = [word_triples(row.words_of(assistant=True)) for row in rows]
    own = [word_triples(words[begin:end]) for words, (begin, end) in zip(asked, template_words(asked), strict=True)]
    # Those alike have both parts alike, so one finds them: the question's, or the answer's where many ask the same.
    telling = [
        [f"? {each}" for each in asks] if any(asks) else [f"! {each}" for each in answers]
        for asks, answers in zip(own, answered, strict=True)
    ]
    texts = [[word_triples(words) for words in asked], own, answered]
    parts = list(zip(*(RMinHash.from_token_sets(each, _PERMUTATIONS, _SEED) for each in texts), strict=True))
    index = RMinHashLSH(threshold, _PERMUTATIONS, bands(threshold))
    kept, dropped = [], []
    for number, told in enumerate(RMinHash.from_token_sets(telling, _PERMUTATIONS, _SEED)):
        like = next(
            (
                other
                for other in sorted(index.query(told))
                if all(mine.jaccard(its) >= threshold for mine, its in zip(parts[number], parts[other], strict=True))
            ),
            None,
        )
        if like is None:
            index.insert(number, told)
            kept.append(rows[number])
        else:
            dropped.append(Dropped(rows[number], rows[like]))
    return kept, dropped


def template_words(texts: Sequence[Words]) -> list[tuple[int, int]]:
    """Return where in each text begin and end the words of its own, between those that many texts begin or end with.

    Many are 10, or 1 % of the texts where that is more: of fewer with a long common beginning it cannot be said that
    they are not copies of one text.
    """
    many = max(_SHARED_BY, round(_SHARED_PART * len(texts)))
    begins = _common_beginnings(texts, many)
    rests = [text[begin:][::-1] for text, begin in zip(texts, begins, strict=True)]
    ends = _common_beginnings(rests, many)
    return [(begin, len(text) - end) for text, begin, end in zip(texts, begins, ends, strict=True)]


def _common_beginnings(texts: Sequence[Words], many: int) -> list[int]:
    """Return for each text with how many words of its beginning at least `many` texts begin, itself among them."""
    import numpy as np

    if len(texts) < many:
        return [0] * len(texts)
    order = sorted(range(len(texts)), key=texts.__getitem__)
    neighbours = list(itertools.pairwise(order))
    common = np.array([_common(texts[first], texts[second]) for first, second in neighbours], dtype=np.int64)
    # Texts with one beginning stand together: the least that neighbours in a window of `many` share, all of it share.
    windows = np.lib.stride_tricks.sliding_window_view(common, many - 1).min(axis=1)
    padded = np.pad(windows, many - 1)
    best = np.lib.stride_tricks.sliding_window_view(padded, many).max(axis=1)
    found = dict(zip(order, best.tolist(), strict=True))
    return [found[index] for index in range(len(texts))]


def _common(first: Words, second: Words) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(first), len(second)))


def bands(threshold: float) -> int:
    """Return the fewest bands by which at most 1 % of the pairs at the threshold are never compared.

    A pair of similarity s agrees in all r rows of one of b bands with the chance 1 - (1 - s^r)^b, b r = 128. The
    library's own choice of 8 bands misses four of five pairs at 0.8.
    """
    counts = [2**exponent for exponent in range(_PERMUTATIONS.bit_length())]
    enough = (count for count in counts if (1 - threshold ** (_PERMUTATIONS // count)) ** count <= _MOST_MISSED)
    return next(enough, _PERMUTATIONS)


def word_triples(words: Words) -> list[str]:
    """Return the word triples of a text; a shorter text is its own only one."""
    return [" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))]
