"""`data.preferences`: from raw preference rows to a training and an evaluation set in one form, without duplicates."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

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
from steps.frame import Job, Resources, Source, StepConfig, UserError, step
from steps.sources import read_rows


class PreparePreferences(StepConfig):
    """Read which of two answers was preferred, or which single ones were liked, and split off an evaluation set."""

    source: Source | list[Source]
    """Files, wildcards, or `hf://datasets/ORG/NAME@REVISION`; several are read in order."""
    columns: PreferenceColumns = {}
    """Columns of another layout: `{chosen: better, rejected: worse}`."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out. All rows of one prompt are on one side, which its text and the seed alone decide."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to keep, chosen by hash."""
    system: str | None = None
    """System message for rows that have none."""
    seed: int = 0


@step(
    "data.preferences",
    produces={"train": Preferences, "eval": Preferences},
    reference="https://arxiv.org/abs/2203.02155",
    libraries=("pyarrow",),
    resources=Resources(cpus=1),
)
def prepare_preferences(config: PreparePreferences, job: Job) -> dict[str, Draft]:
    """Read, deduplicate, limit, split, write."""
    rows = list(_rows(config, job))
    unique, duplicates = without_exact(rows)
    kept = sorted(unique, key=lambda row: uniform(config.seed, "sample", row.id))[: config.limit]
    sides: dict[str, list[Preference]] = {"train": [], "eval": []}
    for row in kept:
        held_out = uniform(config.seed, "side", row.prompt_id) < config.eval_fraction
        sides["eval" if held_out else "train"].append(row)
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
    if not sides["train"]:
        raise UserError(f"{source}: all {len(sides['eval'])} rows fell to the evaluation set; lower `eval_fraction`")
    if config.eval_fraction and not sides["eval"]:
        raise UserError(
            f"{source}: none of the {_prompts(sides['train'])} prompts fell to the evaluation set; raise "
            "`eval_fraction`, or set it to 0 to do without one"
        )


def _prompts(rows: Sequence[Preference]) -> int:
    return len({row.prompt_id for row in rows})
