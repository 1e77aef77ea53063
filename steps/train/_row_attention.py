"""Attention over packed sequences row by row: it costs what the rows cost, not the square of the sequence."""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "posttrain_rows"
_NARROWEST = 16
"""Rows shorter than this share one call: a call costs more than their padding."""


def attend_by_rows(model: "PreTrainedModel") -> bool:
    """Let a model attend row by row if that gives what its own attention gives with a mask; say whether it does.

    A mask over the whole sequence is computed in full, what it hides included, and keeps torch from its fastest
    kernels. Some models need their mask all the same: those with sliding windows, and those whose attention has terms
    of its own, which the comparison of logits finds.
    """
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windows or config._attn_implementation != "sdpa":
        return False
    lengths = (3, 2 * _NARROWEST, 5, _NARROWEST + 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
    ids = torch.arange(1, positions.shape[1] + 1, device=model.device)[None] % config.vocab_size
    training = model.training
    model.eval()
    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, _mask)
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        model.set_attn_implementation(NAME)
        by_rows = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    agree = bool((own - by_rows).abs().max() <= 0.01 * own.abs().max())
    if not agree:
        model.set_attn_implementation("sdpa")
    model.train(training)
    return agree


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each row; a row begins where the position is 0.

    Args:
        module: the attention layer.
        query: batch × heads × tokens × head size.
        key: batch × key heads × tokens × head size.
        value: as `key`.
        attention_mask: given where a batch is not packed; then this is torch's attention with that mask.
        position_ids: 1 or batch × tokens.
        options: what transformers hands to every attention function (`scaling`, `dropout`).

    Returns:
        batch × tokens × heads × head size, and no weights.
    """
    if attention_mask is not None or position_ids is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, tokens = query.shape[0], query.shape[2]
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    places, outputs = [], []
    for index, inside in _groups(position_ids, batch):
        queries, keys, values = (
            each.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2) for each in flat
        )
        output, _ = sdpa_attention_forward(module, queries, keys, values, None, **options)
        outputs.append(output[inside])
        places.append(index[inside])
    order = torch.cat(places).argsort()
    return torch.cat(outputs).index_select(0, order).unflatten(0, (batch, tokens)), None


Groups = list[tuple[torch.Tensor, torch.Tensor]]
_last: tuple[weakref.ref[torch.Tensor], int, Groups] | None = None


def _groups(position_ids: torch.Tensor, batch: int) -> Groups:
    """Group the rows of a batch; found once for all layers, because a GPU must be waited for to tell how long rows are.

    Every layer of a forward pass, and of what a checkpoint computes again, is handed the same tensor of positions.
    """
    global _last
    if _last is None or _last[0]() is not position_ids or _last[1] != batch:
        positions = position_ids.expand(batch, -1).flatten()
        _last = (weakref.ref(position_ids), batch, list(_groups_of(positions)))
    return _last[2]


def _groups_of(positions: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Group rows of like length: for each group the tokens, rows × width, and which of them are the rows' own.

    What a shorter row's line holds behind its end stands after all its tokens, so that causal attention hides it.
    """
    starts = (positions == 0).nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([len(positions)]))
    exponents = torch.clamp(lengths, min=_NARROWEST).log2().ceil()
    for exponent in exponents.unique():
        members = exponents == exponent
        width = torch.arange(int(lengths[members].max()), device=positions.device)
        inside = width < lengths[members, None]
        yield torch.clamp(starts[members, None] + width, max=len(positions) - 1), inside


def _mask(*sizes: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """Need no mask for packed sequences; other batches have the padding mask of torch's attention."""
    if attention_mask is None and options.get("q_length") == options.get("kv_length"):
        return None
    return sdpa_mask(*sizes, attention_mask=attention_mask, **options)
