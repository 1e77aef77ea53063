"""`data.preferences`: from raw preference rows to a training and an evaluation set in one form, without duplicates."""

from collections.abc import Iterator
from pathlib import Path

from steps.artifacts import Draft, Preferences
from steps.data._duplicates import without_exact
from steps.data._hashing import uniform
from steps.data._left_out import note_as_read, note_left_out
from steps.data._preference_rows import (
    Preference,
    PreferenceColumns,
    preference,
    preference_statistics,
    preferences_draft,
)
from steps.data._settings import ReadRows
from steps.data._sides import check_sides, given_sides, sides_by_id
from steps.frame import Job, Resources, UserError, step
from steps.sources import read_rows


class PreparePreferences(ReadRows):
    """Read which of two answers was preferred, or which single ones were liked, and split off an evaluation set."""

    columns: PreferenceColumns = {}
    """Columns of another layout: `{chosen: better, rejected: worse}`."""


@step(
    "data.preferences",
    produces={"train": Preferences, "eval": Preferences, "test": Preferences},
    reference="https://arxiv.org/abs/2203.02155",
    libraries=("pyarrow",),
    resources=Resources(cpus=1),
)
def prepare_preferences(config: PreparePreferences, job: Job) -> dict[str, Draft]:
    """Read, deduplicate, limit, split, write."""
    rows = list(_rows(config, job))
    unique, duplicates = without_exact(rows) if config.exact_dedup else (rows, [])
    kept = sorted(unique, key=lambda row: uniform(config.seed, "sample", row.id))[: config.limit]
    side_of = sides_by_id(kept, config.seed, config.eval_fraction, config.test_fraction, config.question)
    sides = {side: [row for row in kept if side_of[row.id] == side] for side in given_sides(config.shares)}
    _check_sides(config, sides, len(rows))
    note_as_read(job, rows)
    note_left_out(job, len(rows), {"exact duplicates": [each.row.where for each in duplicates]})
    counts = {"rows_read": float(len(rows)), "exact_duplicates": float(len(duplicates))}
    numbers = {name: float(len(part)) for name, part in sides.items()}
    job.log_metrics({**counts, **numbers, **preference_statistics(kept)})
    return {
        name: preferences_draft(job.output(name), part, {**counts, **preference_statistics(part)})
        for name, part in sides.items()
    }


def _rows(config: PreparePreferences, job: Job) -> Iterator[Preference]:
    for source in config.sources:
        for row in read_rows(source, job.cache, Path.cwd()):
            yield preference(row, source, config.columns, config.system)


def _check_sides(config: PreparePreferences, sides: dict[str, list[Preference]], read: int) -> None:
    """Refuse an empty result.

    Raises:
        UserError: a side that was asked for has no rows.
    """
    source = ", ".join(config.sources)
    if not read:
        raise UserError(f"{source}: there are no rows")
    check_sides(source, sides, config.shares)
