"""The token that ends the assistant's turn: found from the chat template by rendering, made a stop token at the door.

A base model often comes with a chat template whose turns end in another token than its documents: Qwen2.5's base models
have ChatML's `<|im_end|>` and stop at `<|endoftext|>` alone. Whoever fine-tunes such a model and stops at what its
checkpoint names, trains one that never stops.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.artifacts import write_atomic
from steps.lm.checkpoint import chat_template, load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ANSWER = "Yes."
_TURNS = (
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "Why?"},
)
_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def turn_end(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """Return the id of the token that the chat template puts behind what the assistant says.

    It is the first of the tokenizer's added tokens after the answer. Where the template writes none there, the next
    turn's opening ends this one, as with GLM-4's `<|user|>`. None where there is neither, or no template at all.
    """
    if not tokenizer.chat_template:
        return None
    for turns in (_TURNS[:2], _TURNS):
        if (found := _first_added(tokenizer, turns)) is not None:
            return found
    return None


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
    end = turn_end(tokenizer)
    if end is None:
        return None
    own, stops = tokenizer.eos_token_id, stop_token_ids(directory)
    # In this order, each once: trainers and servers stop at the tokenizer's end token, whatever the file says.
    wanted = list(dict.fromkeys(each for each in (end, *stops, own) if isinstance(each, int)))
    if set(wanted) != set(stops):
        _set_stops(directory, wanted)
    if own != end and "eos_token" not in template:
        _set_end_token(directory, str(tokenizer.convert_ids_to_tokens(end)))
    return end


def _first_added(tokenizer: "PreTrainedTokenizerFast", turns: tuple[dict[str, str], ...]) -> int | None:
    """Return the first added token behind the answer that is no white space (Gemma has line breaks among them)."""
    import jinja2

    try:
        text = str(tokenizer.apply_chat_template(list(turns), tokenize=False))
    # A template that fails at these turns shows no end here; it will say why when it meets the user's own.
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    at = text.rfind(_ANSWER)
    if at < 0:
        return None
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    added = tokenizer.added_tokens_decoder
    behind = (
        token
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if start >= at + len(_ANSWER) and token in added and added[token].content.strip()
    )
    return next(behind, None)


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
