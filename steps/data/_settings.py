"""What every step asks that reads rows from sources, drops duplicates and holds some out."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from steps.data._sides import Question, check_shares, sides_not_given
from steps.frame import Seed, Source, StepConfig


class ReadRows(StepConfig):
    """Which rows to read, which to keep, and how many of them to hold out."""

    source: Source | list[Source]
    """Files, wildcards, `hf://datasets/ORG/NAME@REVISION`, `reasoning-gym://NAME?KEY=VALUE`, or `python-stdlib-docs`;
    several are read in order."""
    exact_dedup: bool = True
    """Keep one of rows that say the same to the letter; false keeps all, as where rows are repeated on purpose."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of rows held out for choices (checkpoints, candidates), by hash and seed. Rows that answer one `question`
    are on the same side: of one data set, and of all that are split with one seed, the same fractions and no `group`.
    """
    test_fraction: float = Field(default=0, ge=0, lt=1)
    """Share of rows held out for the figures that are quoted, as the output `test`: nothing is chosen by them; 0 gives
    no such output."""
    question: Question = "user"
    """What a row asks: what the user says up to the assistant's first turn (`user`), or that and the row's own system
    message, where that holds what is asked about, a document or a person (`system+user`)."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to keep, chosen by hash."""
    system: str | None = None
    """System message for rows that have none."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _leaves_rows_to_learn(self) -> Self:
        check_shares(self.eval_fraction, self.test_fraction)
        return self

    @property
    def sources(self) -> list[str]:
        """What is read, in order."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def not_given(self) -> Mapping[str, str]:
        """The sides of which no share is asked."""
        return sides_not_given(self.shares)

    @property
    def shares(self) -> dict[str, float]:
        """Share of rows on each side that is held out."""
        return {"eval": self.eval_fraction, "test": self.test_fraction}
