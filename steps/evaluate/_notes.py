"""What a reader of a report must know beside its figures."""

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

from steps.artifacts import Adapter, Dataset, Documents, Model, Quantized

_FEW = 4
"""Answers of which it is no accident that none ends."""
_SURE = 0.05


def chosen_on(candidates: Mapping[str, Model | Adapter | Quantized], data: Dataset | Documents) -> list[str]:
    """Say which candidates were chosen by the rows on which they are measured, or by rows from which these were made.

    The best of twenty looks at 64 tasks reads .62 where the truth is .50: such a figure ranks, it is not to be quoted.
    """
    by = {name: set(artifact.facts.chosen_on) for name, artifact in candidates.items()}
    very = [name for name, rows in by.items() if data.rows_sha256 in rows]
    some = [name for name, rows in by.items() if name not in very and data.all_rows & rows]
    kin = "rows that have an origin in common with these and may be among them"
    return [
        f"{_and(names)} {'was' if len(names) == 1 else 'were'} chosen by {which} (as `eval` of a training, or by a "
        f"report on them) and {look} better here than elsewhere; measure on rows that no choice saw, e.g. `test` of "
        "data.prepare (`test_fraction`)"
        for names, which, look in ((very, "these very rows", "look"), (some, kin, "may look"))
        if names
    ]


def endless(rows: Mapping[str, Sequence[Mapping[str, Any]]], most: int) -> list[str]:
    """Say which models' answers do not end by themselves, where those of the reference, or in the data, do.

    Who did not learn the token that ends a turn, or lost it in a conversion, goes on until the runtime's limit.

    Args:
        rows: of each model, the reference first, those of the report.
        most: tokens at which an answer is cut.
    """
    (reference, own), *others = ((name, _answered(each)) for name, each in rows.items())
    found = []
    short = [row for row in own.values() if row["tokens"] < most]
    if len(short) >= _FEW and not any(row["stopped"] for row in short):
        found.append(
            f"`{reference}`: none of {len(short)} answers ended by itself within {most} tokens, as those in the data "
            "do; was the token learned that ends a turn?"
        )
    for name, theirs in others:
        lost = sum(own[at]["stopped"] > theirs[at]["stopped"] for at in theirs)
        won = sum(own[at]["stopped"] < theirs[at]["stopped"] for at in theirs)
        if _sign_test(lost, won) < _SURE:
            ended, before = (sum(row["stopped"] for row in each.values()) for each in (theirs, own))
            found.append(
                f"`{name}`: {ended} of {len(theirs)} answers ended by themselves within {most} tokens, of those of "
                f"`{reference}` {before}"
            )
    return found


def _answered(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["sample"]: row for row in rows if row["stopped"] is not None}


def _sign_test(more: int, less: int) -> float:
    """Return how likely at least `more` of all would be, were both as likely (one-sided, exact)."""
    count = more + less
    return sum(comb(count, each) for each in range(more, count + 1)) / 2**count


def more_stops(extra: Mapping[str, Sequence[int]]) -> list[str]:
    """Say which runtimes would stop at more tokens than those at which all were stopped here.

    Args:
        extra: candidate -> ids of the tokens.
    """
    return [
        f"`{name}`: its runtime by itself would stop at {_tokens(ids)} too; here all stop at the same"
        for name, ids in extra.items()
        if ids
    ]


def _and(names: Sequence[str]) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def _tokens(ids: Sequence[int]) -> str:
    return f"token{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"
