"""`data.filter_difficulty`: keep the prompts that a model solves sometimes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from steps.artifacts import Dataset, DatasetFacts, Draft, Samples
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.lm.tasks import PASSED, pass_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FilterDifficulty(StepConfig):
    """Keep the prompts whose pass rate lies in a window: neither hopeless nor learned already."""

    samples: Input[Samples]
    """Verified answers to the prompts, of the model that is to learn."""
    min_pass_rate: float = Field(default=0.01, ge=0, le=1)
    """Least share of right answers; above 0 drops what is never solved."""
    max_pass_rate: float = Field(default=0.99, ge=0, le=1)
    """Largest share of right answers; below 1 drops what is always solved, which gives a group no advantage (DAPO)."""
    passed: float = PASSED
    """Score from which an answer counts as right."""

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate: {self.min_pass_rate} is above max_pass_rate: {self.max_pass_rate}; swap them"
            )
        return self


@step(
    "data.filter_difficulty",
    produces=Dataset,
    reference="https://arxiv.org/abs/2503.14476",
    resources=Resources(cpus=1),
)
def filter_difficulty(config: FilterDifficulty, job: Job) -> Draft:
    """Write the original rows whose pass rate lies in the window.

    Raises:
        UserError: answers were not verified, or no row lies in the window.
    """
    from steps.lm.rows import read_jsonl, write_jsonl

    rows = list(read_jsonl(config.samples.rows_file))
    rates = []
    for row in rows:
        rate = pass_rate([each["score"] for each in row["samples"]], config.passed)
        if rate is None:
            raise UserError(
                f"step `{job.name}`: the answers of {config.samples.manifest.step} were not verified; give "
                "`data.sample` `rewards`"
            )
        rates.append(rate)
    inside = [config.min_pass_rate <= rate <= config.max_pass_rate for rate in rates]
    statistics = {
        "too_hard": sum(rate < config.min_pass_rate for rate in rates),
        "too_easy": sum(rate > config.max_pass_rate for rate in rates),
        "pass_rate": round(sum(rates) / len(rates), 6),
    }
    if not any(inside):
        raise UserError(
            f"step `{job.name}`: no prompt has a pass rate between {config.min_pass_rate} and {config.max_pass_rate}: "
            f"{statistics['too_hard']} are harder, {statistics['too_easy']} easier; widen the window"
        )
    out = job.output()
    plain = ({name: value for name, value in row.items() if name != "samples"} for row in rows)
    count = write_jsonl(out / "rows.jsonl", (row for row, kept in zip(plain, inside, strict=True) if kept))
    job.log_metrics({"kept": count, **statistics})
    job.log_figure("pass_rate", _histogram(rates, config))
    return Dataset.draft(out, DatasetFacts(rows=count, statistics=statistics))


def _histogram(rates: Sequence[float], config: FilterDifficulty) -> "Figure":
    """Draw how many prompts have which pass rate, the window shaded."""
    from matplotlib.figure import Figure

    levels = sorted(set(rates))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(config.min_pass_rate, config.max_pass_rate, color="#4878a8", alpha=0.12, label="kept")
    axes.bar(levels, [rates.count(level) for level in levels], width=0.8 / max(8, len(levels)), color="#4878a8")
    axes.set(xlabel="pass rate of a prompt", ylabel="prompts", xlim=(-0.08, 1.08))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
