"""Preferences as tokens: the same tokens as fine-tuning learns, in the columns that TRL's trainers take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from steps.artifacts import Model, Preferences
from steps.frame import Job, UserError
from steps.lm.chat import conversation, without_control_tokens
from steps.lm.rows import read_jsonl
from steps.train._rows import longest_row, note_rows, note_spelled, stop_texts

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as tokens."""

    prompt: list[int]
    chosen: list[int]
    """Ends with the stop token, where it was not cut."""
    rejected: list[int]


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, as tokens, and whether it was liked."""

    prompt: list[int]
    answer: list[int]
    liked: bool


class Encoder:
    """Turns preferences into tokens by the model's chat template."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        model: Model,
        max_tokens: int,
        job: Job,
        *,
        letters: bool = False,
    ) -> None:
        """Take what every row needs.

        Args:
            tokenizer: the model's.
            model: what is trained.
            max_tokens: the most tokens of prompt and answer.
            job: the running step.
            letters: read a control token that an answer spells as letters, as whoever scores answers does.
        """
        self.letters = letters
        self.tokenizer = tokenizer
        self.longest = longest_row(model.path, max_tokens)
        self.job = job
        self._stops = model.facts.stop_token_ids
        self._ends = stop_texts(tokenizer, self._stops)
        self._spelled = 0

    def pairs(self, data: Preferences, field: str) -> list[Pair]:
        """Return the pairs cut to `max_tokens`; those whose sides are then empty or equal are left out.

        Args:
            data: the rows.
            field: name of the config's key, for messages and metrics.

        Raises:
            UserError: a row has one side only or two equal ones, or no pair is left.
        """
        pairs, cut = [], 0
        for row in read_jsonl(data.rows_file):
            self._check_pair(row, field)
            chosen, begin = self.encoded(row["prompt"], row["chosen"])
            rejected, other_begin = self.encoded(row["prompt"], row["rejected"])
            # A token may join the prompt's end with the beginning of one answer and not with that of the other.
            start = min(begin, other_begin, _common_length(chosen, rejected))
            cut += max(len(chosen), len(rejected)) > self.longest.tokens
            pair = Pair(chosen[:start], chosen[start : self.longest.tokens], rejected[start : self.longest.tokens])
            if pair.chosen and pair.rejected and pair.chosen != pair.rejected:
                pairs.append(pair)
        self._report(field, data.facts.rows, len(pairs), cut)
        return pairs

    def rated(self, data: Preferences, field: str) -> list[Rated]:
        """Return every answer with its rating, cut to `max_tokens`; a pair becomes two of them.

        Raises:
            UserError: no answer is left.
        """
        answers, cut, found = [], 0, 0
        for row in read_jsonl(data.rows_file):
            for side in ("chosen", "rejected"):
                if row[side] is None:
                    continue
                ids, start = self.encoded(row["prompt"], row[side])
                found += 1
                cut += len(ids) > self.longest.tokens
                if start < self.longest.tokens:
                    answers.append(Rated(ids[:start], ids[start : self.longest.tokens], side == "chosen"))
        self._report(field, found, len(answers), cut)
        return answers

    def encoded(self, prompt: Sequence[Mapping[str, str]], answer: str) -> tuple[list[int], int]:
        """Return prompt and answer up to the answer's stop token, and where the answer begins."""
        written = without_control_tokens(self.tokenizer, answer) if self.letters else answer
        self._spelled += any(end in written for end in self._ends)
        messages = [*prompt, {"role": "assistant", "content": written}]
        rendered = conversation(self.tokenizer, messages, self._stops, only_last=True)
        turn = rendered.turns[-1]
        return rendered.ids[: turn.stop], turn.start

    def _check_pair(self, row: Mapping[str, Any], field: str) -> None:
        where = f"step `{self.job.name}`: row {row['id']} of `{field}`"
        for side in ("chosen", "rejected"):
            if row[side] is None:
                raise UserError(f"{where} has no {side} answer, this method needs both; `train.kto` takes one alone")
        if row["chosen"].strip() == row["rejected"].strip():
            raise UserError(f"{where} has the same answer on both sides; a preference needs two different ones")

    def _report(self, field: str, found: int, kept: int, cut: int) -> None:
        if not kept:
            raise UserError(
                f"step `{self.job.name}`: no row of `{field}` has an answer within {self.longest.reason}; raise it"
            )
        note_rows(self.job, field, found, left_out=found - kept, cut=cut, longest=self.longest)
        note_spelled(self.job, field, found, min(self._spelled, found))
        self._spelled = 0
        prefix = "" if field == "data" else f"{field}/"
        self.job.log_metrics({f"{prefix}rows": kept, f"{prefix}rows_cut": cut, f"{prefix}rows_dropped": found - kept})


def pair_table(pairs: Sequence[Pair]) -> "Table":
    """Return the columns that TRL's DPO takes: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    from datasets import Dataset as Table

    return Table.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
    )


def labelled_table(pairs: Sequence[Pair]) -> "Table":
    """Return the columns that TRL's CPO and ORPO take: ids, mask and labels (-100 in the prompt) of each side."""
    from datasets import Dataset as Table

    columns: dict[str, list[list[int]]] = {}
    for side in ("chosen", "rejected"):
        rows: list[tuple[list[int], list[int]]] = [(pair.prompt, getattr(pair, side)) for pair in pairs]
        columns[f"{side}_input_ids"] = [prompt + answer for prompt, answer in rows]
        columns[f"{side}_attention_mask"] = [[1] * len(prompt + answer) for prompt, answer in rows]
        columns[f"{side}_labels"] = [[-100] * len(prompt) + answer for prompt, answer in rows]
    return Table.from_dict(columns)


def _common_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ours, theirs, strict=False)))
