"""TRL's supervised trainer, with an order of rows that a resumed training finds again."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl.trainer.sft_trainer import SFTTrainer


class LikeLengths(LengthGroupedSampler):
    """Rows of like length share a batch; an epoch's order depends on the seed and the epoch's number alone.

    transformers draws it from torch's global random numbers when the epoch begins: evaluations change it, and a
    training that is resumed after the first epoch goes on in another order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of the epoch that begins."""
        generator = torch.Generator().manual_seed(self._seed * 2**16 + self._epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class SupervisedTrainer(SFTTrainer):
    """`SFTTrainer` that orders rows of like length by `LikeLengths`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> "Sampler[int] | None":
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        # All processes' rows together, so that the order does not depend on how many share the work.
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # The epoch in progress; a checkpoint in its midst says 1.5 for the second.
        return LikeLengths(lengths, rows, self.args.seed, lambda: int((self.state.epoch or 0) + 1e-6))
