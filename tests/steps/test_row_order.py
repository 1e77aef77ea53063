"""In which order supervised fine-tuning takes its rows."""

import random
from itertools import pairwise

import pytest
import torch
from scipy.stats import binomtest

from steps.train._supervised import grouped_order


def test_batches_hold_rows_of_like_length_and_come_in_any_order() -> None:
    """Neither long to short, which is a saw-tooth in the loss, nor the other way round."""
    chance = random.Random(1)
    lengths = [chance.randint(5, 500) for _ in range(1603)]
    order = grouped_order(lengths, 8, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(1603))
    batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, 1603, 8)]
    assert max(batches[0]) == max(lengths) and len(batches[-1]) == 3
    # Rows in any order would have to be padded by a third, these by a few tokens.
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.08 * sum(lengths)
    means = [sum(batch) / len(batch) for batch in batches[1:-1]]
    shorter = sum(now < before for before, now in pairwise(means))
    assert binomtest(shorter, len(means) - 1).pvalue > 0.01


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 40])
def test_few_rows_are_all_there(rows: int) -> None:
    order = grouped_order([3] * rows, 8, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(rows))
