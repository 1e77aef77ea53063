"""The bridge from a trainer's callbacks to the job's metrics and progress."""

from collections.abc import Container
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.frame import Job


class ReportToJob(TrainerCallback):
    """Pass on what the trainer logs, by optimizer step, and how far it is."""

    def __init__(self, job: Job, omit: Container[str] = ()) -> None:
        self.job = job
        self.omit = omit
        """Names of numbers that are not passed on."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Record every number of a log line."""
        numbers = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and name not in self.omit
        }
        self.job.log_metrics(numbers, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress in optimizer steps."""
        self.job.progress(state.global_step, state.max_steps, "steps")
