"""A training whose numbers are none any more has failed: it never ends as an artifact.

Imports transformers: use within a step only.
"""

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.frame import Job
from steps.frame.errors import ProofFailed

_WATCHED = ("loss", "grad_norm")
_MOST_SKIPPED = 20
"""Steps in a row that may be skipped. The loss is scaled by 65536 at first and by half as much after each skipped step:
after twenty it is scaled down, and gradients that still do not fit are no matter of scale."""


class FailOnDivergence(TrainerCallback):
    """Ends a training at the first loss or gradient that is no number.

    Except in float16, whose gradients are scaled up: one that no longer fits is how the scaler learns that it went too
    far. It skips the step and lowers the scale, so that only skipping without end is a failure.
    """

    def __init__(self, job: Job, trainer: Trainer) -> None:
        self.job = job
        self.trainer = trainer
        self.skipped = self.skipped_in_a_row = self.steps = 0
        self._scale = 0.0
        self._is_skipped = False
        """Whether the last step changed no weight, as its gradients overflowed."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember by what the loss is scaled."""
        self._scale = self._scale_now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the steps that the scaler skipped.

        Raises:
            ProofFailed: it skips them all.
        """
        # A fused optimizer skips a step itself, which accelerate then does not notice: only the lower scale tells.
        accelerator = self.trainer.accelerator
        self._is_skipped = accelerator.optimizer_step_was_skipped or self._scale_now() < self._scale
        self.steps += 1
        self.skipped += self._is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self._is_skipped else 0
        if self.skipped_in_a_row == _MOST_SKIPPED:
            what = f"the gradients of {_MOST_SKIPPED} steps in a row do not fit float16, at step {state.global_step}"
            raise diverged(self.job, what)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Look at what is logged; what a skipped step's gradients were is no figure, and kept from other callbacks.

        Raises:
            ProofFailed: it is no number.
        """
        if logs is None:
            return
        if self._is_skipped and not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
        for name in _WATCHED:
            value = logs.get(name)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise diverged(self.job, f"{name} is {value} at step {state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say how many steps taught nothing."""
        if self.skipped:
            say = self.job.log.warning if self.skipped == self.steps else self.job.log.info
            say("%d of %d steps were skipped: their gradients did not fit float16", self.skipped, self.steps)

    def _scale_now(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return 0.0 if scaler is None else float(scaler.get_scale())


def check_finite(job: Job, model: torch.nn.Module) -> None:
    """Check the trained weights before they are given out.

    Raises:
        ProofFailed: one of them is no number.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise diverged(job, f"the weights of {name} are no numbers")


def diverged(job: Job, what: str) -> ProofFailed:
    """Return the failure, with what would help."""
    return ProofFailed(
        f"step `{job.name}`: the training diverged ({what}); lower `learning_rate`, raise `warmup`, or lower "
        "`max_grad_norm`"
    )
