"""In which order supervised fine-tuning takes its rows, and what its held-out loss is the mean of."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from steps.artifacts import Dataset, DatasetFacts
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.rows import read_jsonl
from steps.train._supervised import grouped_order
from steps.train.sft import labelled
from tests.steps.conftest import curve, publish, sum_row
from tests.steps.untrained import untrained


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


def test_the_held_out_loss_is_the_mean_over_tokens_however_large_a_batch(bench: Any) -> None:
    """Long answers beside short ones: a mean of batches' means would be another for each size."""
    model = untrained(bench, 21)
    rows = [sum_row(number, number) for number in range(6)]
    long = [{**row, "messages": [row["messages"][0], {"role": "assistant", "content": "no " * 12}]} for row in rows]
    both = [*rows, *({**row, "id": f"{row['id']} long"} for row in long)]
    held = publish(bench, Dataset, "uneven", both, DatasetFacts(rows=12))
    data = publish(bench, Dataset, "even", rows, DatasetFacts(rows=6))
    losses = []
    for size in (1, 5, 12):
        tuned = bench.run(
            "train.sft",
            {"model": model, "data": data, "eval": held},
            batch_size=size,
            max_steps=1,
            learning_rate=1e-12,
            dtype="float32",
            adapter={"kind": "full"},
        )[""]
        losses.append(curve(bench, tuned, "eval_loss")[1])
    tokenizer, net = load_tokenizer(model.path), load_model(model.path, "float32").eval()
    nll = tokens = 0.0
    for row in read_jsonl(held.rows_file):
        ids, labels = labelled(row["messages"], tokenizer, model.facts.stop_token_ids, "all")[0]
        count = sum(label != -100 for label in labels)
        with torch.inference_mode():
            nll += count * float(net(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        tokens += count
    assert losses == pytest.approx([nll / tokens] * 3, abs=1e-4)
