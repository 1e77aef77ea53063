"""Where a process computes. Imports torch: use within a step only."""

import os

import torch


def own_device() -> str:
    """Return this process's own GPU among those granted to its step (`cuda:1`), or `cpu` where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
