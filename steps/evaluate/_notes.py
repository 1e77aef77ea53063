"""What a reader of a report must know beside its figures."""

from collections.abc import Mapping, Sequence

from steps.artifacts import Adapter, Dataset, Documents, Model, Quantized


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
