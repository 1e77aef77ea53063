"""What every model is asked: the same rows, the same token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steps.artifacts import Dataset, Documents
from steps.frame import UserError
from steps.lm.chat import conversation
from steps.lm.plain_text import PlainTexts
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Sample:
    """One row as tokens: `ids[:start]` prompts the model, `ids[start:end]` is the answer that is scored."""

    id: str
    prompt: Sequence[Mapping[str, str]]
    """The messages before the answer."""
    expected: str
    """The answer in the data."""
    text: str
    """The whole conversation in the chat template."""
    ids: list[int]
    """Its token ids by the reference's tokenizer."""
    start: int
    end: int
    skipped: int = 0
    """Tokens at the beginning that are not in `text`: with which the tokenizer begins plain texts."""

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens up to where the assistant begins."""
        return self.ids[: self.start]

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the answer, its stop token included where it fits."""
        return self.ids[self.start : self.end]


def choose_samples(
    data: Dataset | Documents,
    tokenizer: "PreTrainedTokenizerFast",
    stop_token_ids: Sequence[int],
    *,
    rows: int,
    max_tokens: int,
) -> list[Sample]:
    """Take `rows` rows by the hash of their id, so that the choice hardly changes when the data grow.

    Answers are cut at `max_tokens`, prompt included; a row whose prompt alone is that long is passed over.

    Raises:
        UserError: none fits.
    """
    plain = PlainTexts(tokenizer, stop_token_ids, max_tokens)
    candidates = sorted(read_jsonl(data.rows_file), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    samples: list[Sample] = []
    for row in candidates:
        if len(samples) == rows:
            break
        if isinstance(data, Documents):
            sample = _plain_sample(row, plain, max_tokens)
            samples += [sample] if sample.start < sample.end else []
            continue
        talk = conversation(tokenizer, row["messages"], stop_token_ids, only_last=True)
        start = talk.prompt_length
        end = max((index + 1 for index, own in enumerate(talk.assistant) if own), default=0)
        if start < min(end, max_tokens):
            *prompt, answer = row["messages"]
            expected = answer["content"]
            samples.append(Sample(row["id"], prompt, expected, talk.text, talk.ids, start, min(end, max_tokens)))
    if not samples:
        raise UserError(
            f"evaluate.compare: no row of `data` has a prompt under {max_tokens} tokens; raise `max_tokens`"
        )
    return samples


def _plain_sample(row: Mapping[str, str], plain: PlainTexts, max_tokens: int) -> Sample:
    ids, start = plain.tokens(row["prompt"], row["text"])
    # Nothing tells a model what a text begins with.
    start, end = max(1, start), min(len(ids), max_tokens)
    prompt = [{"role": "user", "content": row["prompt"]}] if row["prompt"] else []
    return Sample(row["id"], prompt, row["text"], row["prompt"] + row["text"], ids, start, end, plain.skipped)
