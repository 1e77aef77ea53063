"""Checkpoints of an interrupted training, and training on from the last one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame import Job
from steps.train._settings import MUON

if TYPE_CHECKING:
    from transformers import Trainer


def checkpoints(job: Job) -> Path:
    """Return the directory of a step's checkpoints; it survives a restart.

    What divides the weights or the optimizer's state writes checkpoints that nothing else reads.
    """
    shared = job.resources.launcher if job.resources.world > 1 else "ddp"
    return job.scratch / ("checkpoints" if shared in ("ddp", "ddp-cpu") else f"checkpoints-{shared}")


def train(trainer: "Trainer", job: Job) -> None:
    """Train to the end, resuming from the last complete checkpoint where an earlier attempt left one.

    Raises:
        ProofFailed: the training diverged.
    """
    if getattr(trainer.model, "is_loaded_in_4bit", False):
        _widen(trainer.model)
    if trainer.args.optim_args == MUON:
        from steps.train._muon import muon_for

        trainer.optimizer = muon_for(trainer.model, trainer.args.learning_rate, trainer.args.weight_decay)
    from steps.train._divergence import FailOnDivergence

    # Before those that report: a skipped step's gradients are no figure of theirs.
    trainer.callback_handler.callbacks.insert(0, FailOnDivergence(job, trainer))
    last = last_checkpoint(checkpoints(job))
    if last:
        job.log.info("resuming from %s", last.name)
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def _widen(model: Any) -> None:
    """Make the trained weights float32, as they are over a base that is not quantized.

    TRL makes them bfloat16 over a 4-bit base, PEFT makes them float32 when it loads a checkpoint: a resumed training
    would go on in another precision than it began in.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; the trainer writes `trainer_state.json` last."""
    numbered = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for number in sorted(numbered, reverse=True):
        if _is_complete(numbered[number] / "trainer_state.json"):
            return numbered[number]
    return None


def resume_step(job: Job) -> int:
    """Return the optimizer step after which a training would go on now; 0 where it would begin anew."""
    last = last_checkpoint(checkpoints(job))
    return int(last.name.rpartition("-")[2]) if last else 0


def _is_complete(state: Path) -> bool:
    # The state ends with a closing brace; a kill while it was written leaves it without.
    return state.exists() and state.read_text(encoding="utf-8").rstrip().endswith("}")
