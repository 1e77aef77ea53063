"""The token that ends the assistant's turn: found from the chat template by rendering, made a stop token at the door.

A base model often comes with a chat template whose turns end in another token than its documents: Qwen2.5's base models
have ChatML's `<|im_end|>` and stop at `<|endoftext|>` alone. Whoever fine-tunes such a model and stops at what its
checkpoint names, trains one that never stops.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.artifacts import write_atomic
from steps.lm.chat import control_tokens
from steps.lm.checkpoint import chat_template, load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUESTION, _ANSWER, _NEXT = "Is it so?", "Yes.", "Why?"
_TURNS = (
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
)
_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def turn_end(tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int] = ()) -> int | None:
    """Return the id of the token that the chat template puts behind what the assistant says.

    Several of the tokenizer's added tokens may stand there: Command R7B's template writes `<|END_RESPONSE|>` and then
    `<|END_OF_TURN_TOKEN|>`, others close a tag around the answer first. Where one of them is a stop of the model's own,
    that is the end; else it is the last special one. What ends a whole conversation, as Phi-3's end token does, is not
    among them: only what stands there also when another turn follows.

    Where the template writes none there, the next turn's opening ends this one, as with GLM-4's `<|user|>`. None where
    there is neither, or no template at all.

    Args:
        tokenizer: with or without a template.
        stops: where the model stops by itself, besides the tokenizer's end token.
    """
    if not tokenizer.chat_template:
        return None
    last, between = _tokens_behind(tokenizer, _TURNS[:2]), _tokens_behind(tokenizer, _TURNS)
    both = [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, between, strict=False))]
    end: Any = tokenizer.eos_token_id
    own = {*stops, end}
    if (found := next((token for token in both if token in own), None)) is not None:
        return found
    if not both:
        return next(iter(last or between), None)
    if _rendered(tokenizer, _TURNS[:2]) == _rendered(tokenizer, _TURNS[:2], prompt=True):
        both = _without_opening(tokenizer, both)
    special = [token for token in both if tokenizer.added_tokens_decoder[token].special]
    return (special or both)[-1]


def turn_tokens(tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int] = ()) -> frozenset[str]:
    """Return the texts of the special tokens by which turns begin and end: what a template writes, and every stop."""
    text = _rendered(tokenizer, _TURNS) if tokenizer.chat_template else ""
    special = control_tokens(tokenizer)
    end: Any = tokenizer.eos_token_id
    written = {*_added_tokens(tokenizer, text, 0, len(text)), *stops, *([] if text else [end])}
    return frozenset(special[token] for token in written if token in special)


def stop_at_turn_end(directory: Path) -> int | None:
    """Make the turn's end a stop token of a checkpoint, beside those that it has; return its id.

    `generation_config.json` gets it in front, and the tokenizer takes it as its end token, as the makers of instruct
    models have it. Not where the template itself writes `eos_token`: it would then write another text. Files are
    replaced, never written through: they may be links into a cache.
    """
    template = chat_template(directory)
    if template is None:
        return None
    tokenizer = load_tokenizer(directory)
    own, stops = tokenizer.eos_token_id, stop_token_ids(directory)
    end = turn_end(tokenizer, stops)
    if end is None:
        return None
    # In this order, each once: trainers and servers stop at the tokenizer's end token, whatever the file says.
    wanted = list(dict.fromkeys(each for each in (end, *stops, own) if isinstance(each, int)))
    if set(wanted) != set(stops):
        _set_stops(directory, wanted)
    if own != end and "eos_token" not in template:
        _set_end_token(directory, str(tokenizer.convert_ids_to_tokens(end)))
    return end


def _tokens_behind(tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the added tokens between the answer and the next question that are no white space, as Gemma's breaks."""
    text = _rendered(tokenizer, turns)
    at = text.rfind(_ANSWER)
    if at < 0:
        return []
    end = text.find(_NEXT, at)
    found = _added_tokens(tokenizer, text, at + len(_ANSWER), len(text) if end < 0 else end)
    # What a vocabulary has no token for, a line break in some of SentencePiece, ends nothing.
    return [token for token in found if token != tokenizer.unk_token_id or token == tokenizer.eos_token_id]


def _without_opening(tokenizer: "PreTrainedTokenizerFast", behind: list[int]) -> list[int]:
    """Return the tokens behind an answer without those at their end that open a turn, as they open the first one.

    Old templates open the assistant's next turn whether asked to or not. Others, which do not heed that either, open
    none.
    """
    text = _rendered(tokenizer, _TURNS[:2])
    opening = _added_tokens(tokenizer, text, 0, max(text.find(_QUESTION), 0))
    for cut in range(1, len(behind)):
        rest = behind[cut:]
        if any(opening[start : start + len(rest)] == rest for start in range(len(opening))):
            return behind[:cut]
    return behind


def _added_tokens(tokenizer: "PreTrainedTokenizerFast", text: str, begin: int, end: int) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = tokenizer.added_tokens_decoder
    return [
        token
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if begin <= start < end and token in added and added[token].content.strip()
    ]


def _rendered(tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Mapping[str, str]], *, prompt: bool = False) -> str:
    import jinja2

    try:
        shown = [dict(turn) for turn in turns]
        return str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt))
    # A template that fails at these turns shows no end here; it will say why when it meets the user's own.
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ""


def _set_stops(directory: Path, stops: list[int]) -> None:
    file = directory / "generation_config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:
        # What transformers would derive from `config.json`, were there no such file.
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        settings = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    _replace(file, settings | {"eos_token_id": stops})


def _set_end_token(directory: Path, token: str) -> None:
    for name in _TOKEN_FILES:
        file = directory / name
        if file.exists():
            settings = json.loads(file.read_text(encoding="utf-8"))
            if name == _TOKEN_FILES[0] or "eos_token" in settings:
                _replace(file, settings | {"eos_token": token})


def _replace(file: Path, settings: dict[str, Any]) -> None:
    write_atomic(file, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
