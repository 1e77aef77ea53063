"""Which of llama.cpp's built-in pre-tokenizers a `tokenizer.json` means.

llama.cpp splits text by rules compiled into it and chosen by a name in the file. Its converter finds that name by the
hash of one tokenised text, which depends on the vocabulary too, so it knows published tokenizers only. The rules
themselves are few: here they are recognised by the definition. That the name is right is proven afterwards, by
comparing the tokens.

Source: `llm_tokenizer_bpe` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import json
from pathlib import Path
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_GPT2 = "gpt2"
_BYTES = "bytes"
_DIGIT = "digit"

# (parts in order, whether the model ignores merges for whole words) -> llama.cpp's name.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_WORDS + r"|\p{N}" + _REST, _BYTES), False): "qwen2",
    ((_WORDS + r"|\p{N}{1,3}" + _REST, _BYTES), True): "llama-bpe",
    ((_WORDS + r"|\p{N}{1,3}" + _REST, _BYTES), False): "smaug-bpe",
    ((_CASED % (_ENDINGS, _ENDINGS) + r"|\p{N}{1,3}" + _CASED_REST, _BYTES), False): "gpt-4o",
    ((_CASED % ("", "") + r"|\p{N}" + _CASED_REST, _BYTES), True): "tekken",
}


def pre_tokenizer_name(directory: Path) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer that a checkpoint's `tokenizer.json` defines; None if unknown."""
    definition = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    parts = _parts(definition.get("pre_tokenizer"))
    whole_words = bool(definition.get("model", {}).get("ignore_merges"))
    return None if parts is None else _NAMES.get((parts, whole_words))


def _parts(node: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Flatten a pre-tokenizer's definition into its rules; None where one of them is none of llama.cpp's."""
    match node:
        case {"type": "Sequence", "pretokenizers": list(nodes)}:
            parts = [_parts(each) for each in nodes]
            return None if None in parts else tuple(name for part in parts for name in part or ())
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (_GPT2,) if node.get("use_regex", True) else (_BYTES,)
        case {"type": "Digits", "individual_digits": True}:
            return (_DIGIT,)
        # Keeping the matches as they are and dropping what lies between them are the same for a rule that matches all.
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return (pattern,)
    return None
