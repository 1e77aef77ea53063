"""Callbacks of an online training, and what happens when a reward fails.

Imports transformers: use within a step only.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.frame import Job, UserError
from steps.frame.errors import ProofFailed
from steps.train._audits import Audits
from steps.train._checkpoints import checkpoints, last_checkpoint, train
from steps.train._stopping import StopCondition


class AuditCallback(TrainerCallback):
    """Writes the audits down after each step, shows progress, and ends training where a condition is met."""

    def __init__(self, audits: Audits) -> None:
        self.audits = audits

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record a step's audits together with what the trainer logs."""
        # The last line of a run sums it up; it belongs to no step.
        if logs and "train_runtime" not in logs:
            end(self.audits.log(state.global_step, logs), self.audits.job, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress in optimizer steps."""
        self.audits.job.progress(state.global_step, state.max_steps, "steps")


class Guard(TrainerCallback):
    """Remembers the random state at each step's end, so that a checkpoint saved later is one of that moment."""

    def __init__(self) -> None:
        self._state = random_state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember."""
        self._state = random_state()

    def save(self, trainer: Trainer, job: Job) -> None:
        """Save a checkpoint of the last finished step, where there is one that can be gone on from.

        Within a batch of rollouts there is none: what is left of the batch would be sampled anew, by another model.
        """
        args: Any = trainer.args
        window = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
        if trainer.state.global_step and trainer.state.global_step % window == 0 and trainer.model is not None:
            set_random_state(self._state)
            trainer._save_checkpoint(trainer.model, trial=None)
            job.log.info("saved a checkpoint of step %d before stopping", trainer.state.global_step)


def run(trainer: Trainer, job: Job, audits: Audits) -> None:
    """Train to the end; where a reward fails, save a checkpoint of the last finished step first.

    Raises:
        UserError: a reward raised, or returned what is no reward; the sentence names it.
        ProofFailed: a condition is met under which the step has failed.
    """
    guard = Guard()
    # Before all others: who fails at a step's end, as a look at held-out tasks may, fails after it was remembered.
    trainer.callback_handler.callbacks.insert(0, guard)
    if last := last_checkpoint(checkpoints(job)):
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if condition := audits.resume(state.global_step):
            _take_over(trainer, last, state)
            end(condition, job, trainer.control)
            return
    try:
        train(trainer, job)
    except UserError:
        guard.save(trainer, job)
        raise


def _take_over(trainer: Trainer, checkpoint: Path, state: TrainerState) -> None:
    """Take a checkpoint's weights as the end of training: it was saved when a condition had just ended it."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)


def end(condition: StopCondition | None, job: Job, control: TrainerControl) -> None:
    """End training where a condition is met.

    Raises:
        ProofFailed: the condition says that the step has failed then.
    """
    if condition is None:
        return
    if condition.then == "fail":
        raise ProofFailed(f"step `{job.name}`: stopped because {condition.sentence}")
    job.log.info("training ends early: %s", condition.sentence)
    control.should_training_stop = True


def random_state() -> tuple[Any, ...]:
    """Return the state of every generator that a trainer's checkpoint holds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set every generator back to a state from `random_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
