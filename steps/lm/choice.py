"""Questions whose answer is one of a few words: a language model's probability of each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steps.frame.errors import UserError
from steps.lm.chat import Message, render, token_ids, without_control_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def choice_probabilities(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Sequence[Message]],
    choices: Sequence[str],
    batch_size: int = 8,
) -> list[list[float]]:
    """Return for each prompt the probability that the assistant begins with each choice, the choices' sum being 1.

    Args:
        model: a causal language model; asked without gradients.
        tokenizer: its own, with a chat template.
        prompts: conversations that end with the user's turn. Control tokens in their contents are read as text: what a
            model wrote, and is asked about here, does not speak for the judge.
        choices: words that begin with different tokens.
        batch_size: prompts at once; prompts of like length share a batch.

    Raises:
        UserError: two choices begin with the same token.
    """
    import torch

    first = [token_ids(tokenizer, choice)[0] for choice in choices]
    if len(set(first)) < len(first):
        raise UserError(
            f"{tokenizer.name_or_path}: {', '.join(choices)} begin with one token; they cannot be told apart"
        )
    shown = [
        [{**message, "content": without_control_tokens(tokenizer, message["content"])} for message in prompt]
        for prompt in prompts
    ]
    ids = [token_ids(tokenizer, render(tokenizer, prompt, prompt=True)) for prompt in shown]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found: dict[int, list[float]] = {}
    training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, row in zip(batch, _next_logits(model, [ids[index] for index in batch], first), strict=True):
                found[index] = row.softmax(-1).tolist()
    model.train(training)
    return [found[index] for index in range(len(ids))]


def _next_logits(model: "PreTrainedModel", rows: Sequence[list[int]], wanted: Sequence[int]) -> "list[Tensor]":
    """Return the float32 logits of the wanted tokens after each row, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    # Logits of a whole prompt over a large vocabulary need gigabytes; only those after some row's end are made.
    ends = sorted({len(row) - 1 for row in rows})
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_to_keep=torch.tensor(ends, device=model.device),
        use_cache=False,
    ).logits
    return [logits[index, ends.index(len(row) - 1), list(wanted)].float() for index, row in enumerate(rows)]
