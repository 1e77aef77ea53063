"""Calibration: a spread of the run's own rows, as the model will meet them."""

from typing import TYPE_CHECKING

from steps.artifacts import Dataset
from steps.frame.errors import UserError
from steps.lm.chat import render, token_ids
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def calibration_texts(data: Dataset, tokenizer: "PreTrainedTokenizerFast", rows: int) -> list[str]:
    """Render at most `rows` rows, evenly spread over the data set, in the chat template.

    Raises:
        UserError: the data set holds no conversations.
    """
    if data.facts.format != "messages" or data.facts.rows == 0:
        raise UserError(
            f"calibration: {data.facts.rows} rows of format {data.facts.format}; "
            "quantization calibrates on conversations, give the output of a data.prepare step"
        )
    count = min(rows, data.facts.rows)
    chosen = {index * data.facts.rows // count for index in range(count)}
    return [
        render(tokenizer, row["messages"]) for index, row in enumerate(read_jsonl(data.rows_file)) if index in chosen
    ]


def calibration_ids(texts: list[str], tokenizer: "PreTrainedTokenizerFast", tokens: int) -> list[list[int]]:
    """Tokenise templated rows and cut each after `tokens` tokens."""
    return [ids for text in texts if (ids := token_ids(tokenizer, text)[:tokens])]
