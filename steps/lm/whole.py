"""Weights that are loaded whole, whatever divides those that are trained."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def by_deepspeed() -> bool:
    """Whether DeepSpeed divides something among the processes of this step, if only the optimizer's state."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Let each process that loads a model within get all of its weights.

    From when a trainer is configured for ZeRO-3 transformers divides whatever is loaded. What is only asked, a reward
    model or a judge, could then not answer, because nothing would gather its weights.
    """
    if not by_deepspeed():
        yield
        return
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    standing = reference() if reference else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if standing is not None:
            deepspeed.set_hf_deepspeed_config(standing)
