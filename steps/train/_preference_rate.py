"""How often a model prefers the chosen answer: by its own probabilities, whatever it was trained with."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steps.frame.errors import ProofFailed
from steps.train._preference_tokens import Pair

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def preference_rate(model: "PreTrainedModel", pairs: Sequence[Pair], batch_size: int = 8) -> float:
    """Return the share of pairs, at least one, whose chosen answer has the higher probability.

    Raises:
        ProofFailed: the model gives no numbers.
    """
    margins = log_probability_margins(model, pairs, batch_size)
    if broken := sum(not math.isfinite(margin) for margin in margins):
        raise ProofFailed(f"the model's probabilities of {broken} of {len(pairs)} held-out pairs are no numbers")
    return sum(margin > 0 for margin in margins) / len(margins)


def log_probability_margins(model: "PreTrainedModel", pairs: Sequence[Pair], batch_size: int = 8) -> list[float]:
    """Return log p(chosen) − log p(rejected) of each pair, in nats over the whole answers."""
    import torch

    training = model.training
    model.eval()
    margins: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            chosen = _log_probabilities(model, [(pair.prompt, pair.chosen) for pair in batch])
            rejected = _log_probabilities(model, [(pair.prompt, pair.rejected) for pair in batch])
            margins += (chosen - rejected).tolist()
    model.train(training)
    return margins


def _log_probabilities(model: "PreTrainedModel", rows: Sequence[tuple[list[int], list[int]]]) -> "Tensor":
    """Return the log-probability of each answer after its prompt, shape (rows,)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from trl.trainer.utils import selective_log_softmax

    def padded(sequences: list[list[int]]) -> "Tensor":
        return pad_sequence([torch.tensor(each) for each in sequences], batch_first=True).to(model.device)

    ids = padded([prompt + answer for prompt, answer in rows])
    mask = padded([[1] * len(prompt + answer) for prompt, answer in rows])
    of_answer = padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # Row by row in float32: the difference of two long answers is smaller than what bfloat16 rounds.
    found = [selective_log_softmax(each.float(), own) for each, own in zip(logits[:, :-1], ids[:, 1:], strict=True)]
    return (torch.stack(found) * of_answer[:, 1:]).sum(1)
