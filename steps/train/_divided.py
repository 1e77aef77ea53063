"""Weights that processes divide among themselves (FSDP2, ZeRO-3), and how they come together to be given out."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from steps.lm.whole import by_deepspeed, loaded_whole

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

M = TypeVar("M")


def is_divided() -> bool:
    """Whether each process of this step holds only a part of the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or (
        by_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )


def whole_state(trainer: "Trainer") -> "dict[str, torch.Tensor]":
    """Return every weight by name, whole and on the processor; empty on all processes but the main one.

    All processes must call this, because each sends its parts.
    """
    state: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return dict(state or {})


def whole_model(trainer: "Trainer", model: M, fresh: Callable[[], M]) -> M:
    """Return the trained model with all of its weights on the main process.

    All processes must call this, and before `job.output()`. Where the weights are divided the main process gets a
    model from `fresh` (as it was before training) with what was learned in it, so that saving, merging and measuring
    it is what it is for one process.
    """
    if not is_divided():
        return model
    state = whole_state(trainer)
    if not trainer.accelerator.is_main_process:
        return model
    with loaded_whole():
        complete: Any = fresh()
    learned = {name: state[name] for name, parameter in complete.named_parameters() if parameter.requires_grad}
    complete.load_state_dict(learned, strict=False)
    return complete
