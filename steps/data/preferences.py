"""`data.preferences`: from raw preference rows to a training and an evaluation set in one form, without duplicates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from steps.artifacts import Draft, Preferences
from steps.data._duplicates import without_exact
from steps.data._hashing import uniform
from steps.data._preference_rows import (
    Preference,
    PreferenceColumns,
    preference,
    preference_statistics,
    preferences_draft,
)
from steps.data._sides import check_shares, check_sides, given_sides, sides_by_id, sides_not_given
from steps.frame import Job, Resources, Source, StepConfig, UserError, step
from steps.sources import read_rows


class PreparePreferences(StepConfig):
    """Read which of two answers was preferred, or which single ones were liked, and split off an evaluation set."""

    source: Source | list[Source]
    """Files, wildcards, or `hf://datasets/ORG/NAME@REVISION`; several are read in order."""
    columns: PreferenceColumns = {}
    """Columns of another layout: `{chosen: better, rejected: worse}`."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for choices. All rows of one question are on one side, the same as in data.prepare
    with these fractions and this seed."""
    test_fraction: float = Field(default=0, ge=0, lt=1)
    """Share of prompts held out for the figures that are quoted, as the output `test`; 0 gives no such output."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to keep, chosen by hash."""
    system: str | None = None
    """System message for rows that have none."""
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_rows_to_learn(self) -> Self:
        check_shares(self.eval_fraction, self.test_fraction)
        return self

    @property
    def not_given(self) -> Mapping[str, str]:
        """The sides of which no share is asked."""
        return sides_not_given(self.shares)

    @property
    def shares(self) -> dict[str, float]:
        """Share of rows on each side that is held out."""
        return {"eval": self.eval_fraction, "test": self.test_fraction}


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
    unique, duplicates = without_exact(rows)
    kept = sorted(unique, key=lambda row: uniform(config.seed, "sample", row.id))[: config.limit]
    side_of = sides_by_id(kept, config.seed, config.eval_fraction, config.test_fraction, rows)
    sides = {side: [row for row in kept if side_of[row.id] == side] for side in given_sides(config.shares)}
    _check_sides(config, sides, len(rows))
    counts = {"rows_read": float(len(rows)), "exact_duplicates": float(duplicates)}
    numbers = {name: float(len(part)) for name, part in sides.items()}
    job.log_metrics({**counts, **numbers, **preference_statistics(kept)})
    return {
        name: preferences_draft(job.output(name), part, {**counts, **preference_statistics(part)})
        for name, part in sides.items()
    }


def _rows(config: PreparePreferences, job: Job) -> Iterator[Preference]:
    for source in [config.source] if isinstance(config.source, str) else config.source:
        for row in read_rows(source, job.cache, Path.cwd()):
            yield preference(row, source, config.columns, config.system)


def _check_sides(config: PreparePreferences, sides: dict[str, list[Preference]], read: int) -> None:
    """Refuse an empty result.

    Raises:
        UserError: a side that was asked for has no rows.
    """
    source = config.source if isinstance(config.source, str) else ", ".join(config.source)
    if not read:
        raise UserError(f"{source}: there are no rows")
    check_sides(source, sides, config.shares)
