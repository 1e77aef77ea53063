"""A training whose numbers are none any more has failed: it never ends as an artifact.

Imports transformers: use within a step only.
"""

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.frame import Job
from steps.frame.errors import ProofFailed

_WATCHED = ("loss", "grad_norm")


class FailOnDivergence(TrainerCallback):
    """Ends a training at the first loss or gradient that is no number."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Look at what is logged.

        Raises:
            ProofFailed: it is no number.
        """
        for name in _WATCHED:
            value = (logs or {}).get(name)
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise diverged(self.job, f"{name} is {value} at step {state.global_step}")


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
