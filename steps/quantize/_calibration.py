"""Calibration: a spread of the run's own rows, as the model will meet them."""

from typing import TYPE_CHECKING

from steps.artifacts import Dataset, Documents
from steps.frame.errors import UserError
from steps.lm.chat import token_ids, whole_text
from steps.lm.plain_text import PlainTexts
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def calibration_texts(data: Dataset | Documents, tokenizer: "PreTrainedTokenizerFast", rows: int) -> list[str]:
    """Return at most `rows` rows, evenly spread over the data set: conversations in the chat template, texts as such.

    Raises:
        UserError: there are no rows.
    """
    if data.facts.rows == 0:
        raise UserError("calibration: there are no rows in it; give the output of a data.prepare step")
    count = min(rows, data.facts.rows)
    chosen = {index * data.facts.rows // count for index in range(count)}
    taken = [row for index, row in enumerate(read_jsonl(data.rows_file)) if index in chosen]
    if isinstance(data, Documents):
        begins = str(tokenizer.bos_token) if PlainTexts(tokenizer, (), 1).skipped else ""
        return [begins + row["prompt"] + row["text"] for row in taken]
    return [whole_text(tokenizer, row["messages"]) for row in taken]


def calibration_ids(texts: list[str], tokenizer: "PreTrainedTokenizerFast", tokens: int) -> list[list[int]]:
    """Tokenise templated rows and cut each after `tokens` tokens."""
    return [ids for text in texts if (ids := token_ids(tokenizer, text)[:tokens])]
