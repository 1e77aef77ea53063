"""Texts as tokens without a chat template: as the tokenizer begins and ends documents."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steps.lm.turn_end import turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def document_end(tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int]) -> int | None:
    """Return the token that ends documents: where a chat template has an end of turns beside it, not that one.

    Of several the tokenizer's, else the first of the vocabulary, where the one of pretraining stands (Llama 3's
    `<|end_of_text|>`).
    """
    end: Any = turn_end(tokenizer, stops)
    others = [stop for stop in sorted(stops) if stop != end and stop < len(tokenizer)]
    own: Any = tokenizer.eos_token_id
    return own if own in others or not others else others[0]


class PlainTexts:
    """Turns texts into tokens, each with what is learned there."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int], longest: int) -> None:
        """Take what every text needs.

        Args:
            tokenizer: the model's.
            stops: where the model stops by itself.
            longest: the most tokens of a sequence.
        """
        self._tokenizer = tokenizer
        self._longest = longest
        end = document_end(tokenizer, stops)
        self._end = [] if end is None else [end]
        first: Any = tokenizer("a")["input_ids"]
        self.skipped = int(tokenizer.bos_token_id is not None and first[:1] == [tokenizer.bos_token_id])
        """Tokens with which the tokenizer begins every text: one, or none."""

    def tokens(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Return the tokens of a prompt and what follows it, without an end, and where those of the latter begin."""
        whole: Any = self._tokenizer(prompt + text, return_offsets_mapping=True)
        pairs = list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
        # Behind the text a tokenizer may put an end of its own, as it puts a beginning before it.
        while len(pairs) > self.skipped and pairs[-1][1][0] == pairs[-1][1][1]:
            pairs.pop()
        # A token that joins both is learned: without it the text would not begin.
        start = next((at for at, (_, (_, end)) in enumerate(pairs) if end > len(prompt)), len(pairs))
        return [token for token, _ in pairs], max(start, self.skipped)

    def learned(self, row: Mapping[str, str], *, whole: bool) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of a row of Documents and, for each, what is learned there: itself, or -100 for nothing.

        A document longer than a sequence goes on in others, none of which sees another.

        Args:
            row: with `prompt` and `text`.
            whole: whether it is a document, which may be divided.
        """
        ids, start = self.tokens(row["prompt"], row["text"])
        ids += self._end
        labels = [-100] * start + ids[start:]
        if not whole:
            return [(ids, labels)]
        cuts = [slice(at, at + self._longest) for at in range(0, len(ids), self._longest)]
        # The first token of a sequence is predicted from nothing: one alone teaches nothing.
        return [(ids[cut], labels[cut]) for cut in cuts if len(ids[cut]) > 1]
