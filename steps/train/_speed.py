"""How fast a training goes: tokens per second, and what share of the GPUs' arithmetic that is (MFU).

Imports transformers: use within a step only.
"""

import re
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steps.frame import Job

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Products and sums per second of dense bfloat16 matrices, by what NVIDIA calls the GPU (its data sheets)."""


def peak(name: str) -> float | None:
    """Return the peak of a GPU in FLOP/s by the name that CUDA gives it, None for one that is not in the list."""
    found = [known for known in PEAKS if re.search(rf"\b{re.escape(known)}\b", name)]
    return PEAKS[max(found, key=len)] if found else None


def cost_of(model: Any, length: float, forwards: int = 0, passes: int = 1) -> float | None:
    """Count the floating-point operations for one token as PaLM did (https://arxiv.org/abs/2204.02311, appendix B).

    Each weight of a matrix takes two of them forward, two for the gradient of its input, and two for its own where it
    is trained. Attention takes 4 · layers · heads · head size · length forward, twice that backward, as if no token
    were masked. Nothing that gradient checkpointing computes anew counts.

    Args:
        model: a transformer, whole (not yet divided among processes), with its adapter where it has one.
        length: tokens of a row, the mean.
        forwards: passes over each token that nothing is learned from: sampling, a reference.
        passes: times that each token is learned from.

    Returns:
        None for a mixture of experts, whose tokens meet only some of its weights.
    """
    config = model.config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding else embedding.numel()
    weights = model.num_parameters() - looked_up
    trained = model.num_parameters(only_trainable=True) - (looked_up if embedding.requires_grad else 0)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_size * length
    return forwards * (2 * weights + attention) + passes * (4 * weights + 2 * trained + 3 * attention)


class Speed(TrainerCallback):
    """Records `tokens_per_second` and, on GPUs whose peak is known, `mfu`: between log lines, and the mean at the end.

    It is what a user waits for: evaluations and checkpoints between two lines count. What comes before the first line,
    which warms up, does not.
    """

    def __init__(self, job: Job, flops: float | None = None, epoch_tokens: float = 0.0) -> None:
        """Prepare to count.

        Args:
            job: hears of it.
            flops: what a token costs, see `cost_of`; None leaves `mfu` out.
            epoch_tokens: tokens of an epoch, where the trainer's own count (`num_tokens`) is not to be trusted.
        """
        self.job = job
        self.epoch_tokens = epoch_tokens
        limit = peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.mfu_of_rate = flops / (limit * job.resources.world) if flops and limit else 0.0
        """MFU of one token per second."""
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Record the speed since the last line."""
        tokens = self.epoch_tokens * (state.epoch or 0) if self.epoch_tokens else (logs or {}).get("num_tokens")
        if tokens is None or not {"loss", "reward"} & set(logs or {}):
            return
        now = (time.perf_counter(), float(tokens))
        if self._first is None:
            self._first = self._last = now
        elif now[1] > self._last[1]:
            self.job.log_metrics(self._speed(self._last, now), step=state.global_step)
            self._last = now

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the mean."""
        if self._first and self._last != self._first:
            mean = self._speed(self._first, self._last)
            self.job.log_metrics({f"{name}/mean": value for name, value in mean.items()})

    def _speed(self, start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
        rate = (end[1] - start[1]) / (end[0] - start[0])
        return {"tokens_per_second": rate, **({"mfu": rate * self.mfu_of_rate} if self.mfu_of_rate else {})}
