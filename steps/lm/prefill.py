"""Reading a prompt once for all the answers that are sampled to it. Imports transformers: use within a step only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@contextmanager
def prefill_once(model: torch.nn.Module) -> Iterator[None]:
    """Let `generate` read a prompt once where rows one after the other hold the same one, as those of a group do.

    transformers reads it for every answer; with long prompts and large groups that is most of sampling. What is kept
    of the prompt, keys and values, is then copied for each answer. Caches that keep anything else (recurrent states)
    are filled as ever.
    """
    generating: Any = next(part for part in model.modules() if isinstance(part, GenerationMixin))
    prefill = generating._prefill

    def once(ids: torch.Tensor, config: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        rows, firsts = _shared(ids, inputs.get("attention_mask"))
        if len(firsts) == len(ids) or not _repeatable(inputs.get("past_key_values")):
            return prefill(ids, config, inputs, *args, **options)
        of_firsts = {
            name: value[firsts] if isinstance(value, torch.Tensor) and len(value) == len(ids) else value
            for name, value in inputs.items()
        }
        found = prefill(ids[firsts], config, of_firsts, *args, **options)
        found.past_key_values.batch_select_indices(rows)
        found.logits = found.logits[rows]
        return found

    generating._prefill = once
    try:
        yield
    finally:
        del generating._prefill


def _shared(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row the number of its prompt, and for each prompt its first row."""
    new = (ids[1:] != ids[:-1]).any(1)
    if mask is not None:
        new |= (mask[1:] != mask[:-1]).any(1)
    new = torch.cat([new.new_ones(1), new])
    return new.cumsum(0) - 1, new.nonzero().flatten()


def _repeatable(cache: Any) -> bool:
    """Whether a cache holds keys and values by row, and nothing yet."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and not cache.get_seq_length() and all(type(x) in kinds for x in cache.layers)
