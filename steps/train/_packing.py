"""Several rows in one sequence, without any seeing another."""

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset as Table
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from steps.frame import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed(table: Table, max_tokens: int) -> Table:
    """Put rows together into sequences of at most `max_tokens`, best fit first, none of them cut.

    Gives `input_ids`, `labels` and `seq_lengths`: how long each row in the sequence is.
    """
    return pack_dataset(table, max_tokens, "bfd")


class PackedCollator(DataCollatorForLanguageModeling):
    """Make a batch whose sequences hold several rows each: batch × longest sequence.

    Where positions begin anew transformers masks attention between what comes before and after, provided that it gets
    no padding mask (`masking_utils.find_packed_sequence_indices`). TRL's own packing joins the whole batch into one
    sequence, made for kernels that skip what is masked; with dense masks its attention costs batch² instead of batch.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad sequences; those without `seq_lengths` are single rows with an ordinary padding mask."""
        batch = super().torch_call(examples)
        if "seq_lengths" in examples[0]:
            del batch["attention_mask"]
            # The first token of a row would be predicted from the last of the row before it.
            batch["labels"][batch["position_ids"] == 0] = -100
        else:
            del batch["position_ids"]
        return batch


def check_isolation(model: "PreTrainedModel") -> None:
    """Prove on the model itself that packed rows do not see each other.

    Attention can be masked; a recurrent layer (Mamba, linear attention) carries its state into the next row.

    Raises:
        UserError: what one row says changes the logits of the row behind it.
    """
    positions = torch.arange(8, device=model.device).remainder(4)[None]
    left = torch.arange(1, 9, device=model.device)[None]
    right = left.clone()
    right[:, :4] += 8
    training = model.training
    model.eval()
    with torch.no_grad():
        one, other = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float() for ids in (left, right)
        )
    model.train(training)
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise UserError(
            f"packing: rows in one sequence see each other in {type(model).__name__} (it is not attention alone); set "
            "packing: false"
        )
