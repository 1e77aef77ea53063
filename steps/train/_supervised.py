"""TRL's supervised trainer, with an order of rows that a resumed training finds again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

_BLOCK = 50
"""Most batches among whose rows like lengths are sought: more would pad less, and mix less."""


class LikeLengths(Sampler[int]):
    """Rows of like length share a batch, batches come in any order; it depends on the seed and the epoch alone.

    transformers' own sampler leaves the batches of a block from long to short, a saw-tooth in every curve of the loss,
    and draws from torch's global random numbers when the epoch begins: evaluations change it, and a training that is
    resumed after the first epoch goes on in another order. Shuffled batches are fairseq's way
    (https://fairseq.readthedocs.io/en/latest/data.html).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of the epoch that begins."""
        generator = torch.Generator().manual_seed(self._seed * 2**16 + self._epoch())
        return iter(grouped_order(self._lengths, self._batch_size, generator))


def grouped_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Return the places of all rows, those of like length within `batch_size` of each other.

    The batch with the longest row comes first, so that memory which does not suffice is known at once; a batch that is
    not full comes last, because batches are what stands side by side.
    """
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    # Four blocks at least: within one, every epoch would put the same rows together.
    block = batch_size * max(1, min(len(lengths) // (4 * batch_size), _BLOCK))
    batches = []
    for start in range(0, len(rows), block):
        alike = sorted(rows[start : start + block], key=lambda row: -lengths[row])
        batches += [alike[at : at + batch_size] for at in range(0, len(alike), batch_size)]
    last = [batches.pop()] if len(rows) % batch_size else []
    shuffled = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    longest = max(range(len(shuffled)), key=lambda place: lengths[shuffled[place][0]], default=0)
    first = [shuffled.pop(longest)] if shuffled else []
    return [row for batch in (*first, *shuffled, *last) for row in batch]


class SupervisedTrainer(SFTTrainer):
    """`SFTTrainer` that orders rows of like length by `LikeLengths` and weighs a held-out loss by its tokens.

    transformers takes the mean of the batches' means: a short answer alone in its batch counts as much as a batch of
    long ones, so that the loss, and with it the checkpoint that is chosen, depends on the size of a batch.
    """

    _losses: list[tuple[float, int]]
    """Mean loss and number of learned tokens of each held-out batch that was seen."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return what transformers does, its loss replaced by the mean over all tokens, of all processes."""
        self._losses = []
        output = super().evaluation_loop(*args, **kwargs)
        sums = torch.tensor(
            [sum(loss * count for loss, count in self._losses), sum(count for _, count in self._losses)],
            dtype=torch.float32 if self.args.device.type == "mps" else torch.float64,
            device=self.args.device,
        )
        reduced: Any = self.accelerator.reduce(sums)
        total, tokens = reduced.tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        if tokens and output.metrics and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = total / tokens
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the loss of a held-out batch beside its tokens."""
        # The first token of a row is predicted from nothing.
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if found[0] is not None and tokens:
            self._losses.append((found[0].item(), tokens))
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> "Sampler[int] | None":
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        # All processes' rows together, so that the order does not depend on how many share the work.
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # The epoch in progress; a checkpoint in its midst says 1.5 for the second.
        return LikeLengths(lengths, rows, self.args.seed, lambda: int((self.state.epoch or 0) + 1e-6))
