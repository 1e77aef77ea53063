"""Texts that spell a control token of the model: read as what they say, they would end a turn in its midst."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from steps.artifacts import Model
from steps.data._conversations import Conversation
from steps.data._documents import Document
from steps.frame import Job, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Way = Literal["refuse", "escape", "keep"]
_EXAMPLES = 3


class Spelled:
    """Looks for them in rows, and does with them what the recipe says."""

    def __init__(self, model: Model | None, tokenizer: "PreTrainedTokenizerFast | None", way: Way) -> None:
        """Take the tokens of a model; without one there are none to look for."""
        from steps.lm.chat import control_tokens
        from steps.lm.turn_end import turn_tokens

        turns = turn_tokens(tokenizer, model.facts.stop_token_ids) if model and tokenizer else frozenset[str]()
        special = control_tokens(tokenizer) if tokenizer else {}
        rows = model.facts.vocabulary if model else 0
        self._rowless = {text for number, text in special.items() if number >= rows}
        """Tokens that the model has no embedding for."""
        self._tokens = turns | self._rowless
        self._tokenizer = tokenizer
        self._way = way
        self._places: list[str] = []

    def checked(self, row: Conversation | Document) -> Conversation | Document:
        """Return a row as it is kept.

        Raises:
            UserError: it spells a token, and that is to be refused.
        """
        found = next((token for text in _texts(row) for token in self._tokens if token in text), None)
        if found is None:
            return row
        if self._way == "refuse" or (self._way == "keep" and found in self._rowless):
            why = "that the model has no embedding for" if found in self._rowless else "by which turns begin or end"
            raise UserError(
                f"{row.where}: it spells the control token {found}, {why}; set control_tokens: escape (an invisible "
                f"space is put into it){'' if found in self._rowless else ' or keep'}"
            )
        self._places.append(row.where)
        if self._way == "keep":
            return row
        if isinstance(row, Document):
            return replace(row, text=self._escaped(row.text), prompt=self._escaped(row.prompt))
        return replace(row, messages=tuple((turn[0], *map(self._escaped, turn[1:])) for turn in row.messages))

    def note(self, job: Job) -> None:
        """Say how many there were."""
        if self._places:
            some = ", ".join(self._places[:_EXAMPLES]) + (", ..." if len(self._places) > _EXAMPLES else "")
            what = "an invisible space was put into it" if self._way == "escape" else "it is read as the token"
            job.note(f"{len(self._places)} rows spell a control token; {what}: {some}")

    def _escaped(self, text: str) -> str:
        from steps.lm.chat import without_control_tokens

        return without_control_tokens(self._tokenizer, text, self._tokens) if self._tokenizer else text


def _texts(row: Conversation | Document) -> list[str]:
    if isinstance(row, Document):
        return [row.prompt, row.text]
    return [text for turn in row.messages for text in turn[1:]]
