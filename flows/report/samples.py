"""Samples side by side: a few typical ones, each candidate's answer beside the reference answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from flows.report.comparison import Candidate, Comparison, Row

SHOWN = 8
LONGEST = 4000
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Answer:
    """One candidate's answer to one sample."""

    candidate: Candidate
    shared: str
    """How it begins as the reference's answer does, up to a word's end; empty for base and reference."""
    rest: str
    """What follows."""
    cut: int
    """Characters left out at its end."""
    score: float
    same: bool
    """It is the reference's answer, word for word."""


@dataclass(frozen=True)
class Sample:
    """One question with all answers."""

    turns: Sequence[tuple[str, str]]
    """Role and text of each message of the prompt."""
    wanted: str
    """The answer of the data set."""
    answers: Sequence[Answer]


def typical_samples(comparison: Comparison, count: int = SHOWN) -> list[Sample]:
    """Return samples spread evenly over the quantiles of the reference's score, the best first.

    Only samples that every candidate answered; equal input gives an equal choice.
    """
    complete = comparison.answered
    reference = comparison.reference.name
    ranked = sorted(complete, key=lambda key: (-complete[key][reference]["score"], key))
    count = min(count, len(ranked))
    chosen = [ranked[int((place + 0.5) * len(ranked) / count)] for place in range(count)]
    return [_sample(complete[key], comparison) for key in chosen]


def _sample(own: Mapping[str, Row], comparison: Comparison) -> Sample:
    reference = own[comparison.reference.name]
    turns = [(turn["role"], _cut(turn["content"])[0]) for turn in reference["prompt"]]
    answers = [_answer(own[each.name], each, reference["answer"]) for each in comparison.candidates]
    return Sample(turns, _cut(reference["reference_answer"])[0], answers)


def _answer(row: Row, candidate: Candidate, reference: str) -> Answer:
    text, cut = _cut(row["answer"].strip())
    words, others = re.findall(r"\s*\S+", text), re.findall(r"\s*\S+", reference.strip())
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False)))
    shared = "".join(words[:common]) if candidate.role == "member" else ""
    same = candidate.role == "member" and words == others
    return Answer(candidate, shared, text[len(shared) :], cut, row["score"], same)


def _cut(text: str) -> tuple[str, int]:
    """Return the text and how many characters of it were left out."""
    return text[:LONGEST], max(0, len(text) - LONGEST)
