"""Conditions on what training logs, under which it ends early."""

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steps.frame.errors import did_you_mean

RATIOS = ("ratio/mean", "ratio/p99", "ratio/max")
"""Importance ratios of a batch's tokens."""
LOGGED = (
    "entropy",
    "kl",
    "loss",
    "grad_norm",
    "learning_rate",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "num_tokens",
)
"""What of the trainer's own log goes into the audits."""
MEASURED = (
    "reward/total",
    "reward/std_in_group",
    "accuracy",
    "length/mean",
    "length/right",
    "length/wrong",
    "length/reward_correlation",
    "truncated",
    "repetition",
    "groups/zero_variance",
    "groups/distinct",
    "hacking/rewarded_wrong",
    *RATIOS,
)
"""What the audits measure themselves, beside `reward/NAME` for each reward."""
HELD_OUT = ("held_out", "held_out/tokens")
"""What is measured on held-out tasks."""


class StopCondition(BaseModel):
    """End training once a metric has been beyond a bound for some steps in a row.

    `{metric: entropy, below: 0.02, steps: 10}`, `{metric: groups/zero_variance, above: 0.95, steps: 20}`,
    `{metric: ratio/p99, above: 5}`, `{metric: held_out, above: 0.9}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """One of the audits' metrics, as the report and MLflow name them."""
    above: float | None = None
    below: float | None = None
    steps: int = Field(default=1, ge=1)
    """Times in a row that the metric is logged beyond the bound."""
    then: Literal["finish", "fail"] = "finish"
    """Give out what has been learned so far, or end the step as failed (its checkpoint stays)."""

    @model_validator(mode="after")
    def _one_bound(self) -> "StopCondition":
        if (self.above is None) == (self.below is None):
            raise ValueError("a condition has either `above` or `below`")
        return self

    @property
    def sentence(self) -> str:
        """What it says, for logs and messages."""
        bound = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.metric} {bound} {self.steps} times in a row" if self.steps > 1 else f"{self.metric} {bound}"

    def holds(self, value: float) -> bool:
        """Whether one value is beyond the bound."""
        return value > self.above if self.above is not None else value < (self.below or 0.0)


def check_conditions(
    conditions: Iterable[StopCondition], rewards: Iterable[str], never_logged: Mapping[str, str]
) -> None:
    """Check that what conditions look at is logged; for the validators of step configs.

    Args:
        conditions: of the training.
        rewards: names of its rewards.
        never_logged: metrics that its settings never give, each with the reason.

    Raises:
        ValueError: a metric is unknown, or never logged, so that its condition would never be met.
    """
    known = {*LOGGED, *MEASURED, *HELD_OUT, *(f"reward/{name}" for name in rewards)}
    for metric in (condition.metric for condition in conditions):
        if metric not in known:
            raise ValueError(f"stop_when: no metric is called `{metric}`{did_you_mean(metric, known)}")
        if metric in never_logged:
            raise ValueError(f"stop_when: `{metric}` is never logged here: {never_logged[metric]}")


class Stopping:
    """Counts for each condition how often in a row it held."""

    def __init__(self, conditions: list[StopCondition]) -> None:
        self._conditions = conditions
        self._counts = [0] * len(conditions)

    def check(self, metrics: Mapping[str, float]) -> StopCondition | None:
        """Look at newly logged metrics; return the condition that is met, if one is."""
        for index, condition in enumerate(self._conditions):
            if condition.metric in metrics:
                holds = condition.holds(metrics[condition.metric])
                self._counts[index] = self._counts[index] + 1 if holds else 0
                if self._counts[index] >= condition.steps:
                    return condition
        return None
