"""Where a process computes. Imports torch: use within a step only."""

import os

import torch

from steps.frame import Resources


def own_device() -> str:
    """Return this process's own GPU among those granted to its step (`cuda:1`), or `cpu` where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def granted_device(resources: Resources) -> str:
    """Return where work is done that may as well be done without a GPU: on one only if the step asked for it."""
    return own_device() if resources.gpus else "cpu"
