"""Weights that processes divide among themselves (FSDP2), and how they come together again to be given out."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

M = TypeVar("M")


def is_divided() -> bool:
    """Whether each process of this step holds only a part of the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def whole_state(trainer: "Trainer") -> "dict[str, torch.Tensor]":
    """Return every weight by name, whole and on the processor; empty on all processes but the main one.

    All processes must call this, because each sends its parts.
    """
    return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))  # pyright: ignore[reportReturnType]


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
    complete: Any = fresh()
    learned = {name: state[name] for name, parameter in complete.named_parameters() if parameter.requires_grad}
    complete.load_state_dict(learned, strict=False)
    return complete
