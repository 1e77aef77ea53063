"""A GGUF file as a Hugging Face checkpoint: weights dequantised, tokenizer and chat template rebuilt and proved.

transformers reads GGUF weights and vocabulary, but only some vocabularies' rule for splitting text into words
(`tokenizer.ggml.pre`); for the others it silently uses GPT-2's. Training on such tokens would teach the wrong thing, so
the rule is mended from a table here, and the result compared with llama.cpp's own tokenizer on real text.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError
from steps.lm.checkpoint import Dtype, save_model
from steps.sources import stdlib_docs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Vocabularies whose merges were learned with digits apart, then GPT-2's words (llama.cpp, src/llama-vocab.cpp).
_DIGITS_APART = {"codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"}
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_HARD_TEXTS = (
    "In 1999, 12345 of 67,890.12 cost $3.50; 2**10 == 1024.",
    "\tdef f(x):\n\t\treturn x  # two  spaces\n\n\n    four\n",
    "It's what they'll say: I'm sure we've done it, you'd agree, DON'T you?",
    "Grüße, naïve café, Ελληνικά, русский, 日本語のテキスト, 한국어, emoji 🙂🚀 and ½.",
    "https://example.org/a_b-c?d=1&e=%20#f  {'k': [1, 2, 3]}  a->b  x<=y  ~/.config",
)


def dequantize(source: Path, target: Path, dtype: Dtype) -> str | None:
    """Write the checkpoint of a GGUF file into the directory `target`; return the licence that its metadata names.

    Raises:
        UserError: the file is no GGUF of a known architecture, or its tokenizer cannot be rebuilt exactly.
    """
    metadata = _metadata(source)
    tokenizer = _tokenizer(source, metadata)
    compare_with_llama_cpp(tokenizer, source, metadata.get("tokenizer.ggml.pre", "none"))
    save_model(_model(source, metadata, dtype), tokenizer, target)
    return metadata.get("general.license")


def compare_with_llama_cpp(tokenizer: "PreTrainedTokenizerFast", source: Path, rule: str) -> int:
    """Tokenise some hundred texts, plain and in the chat template, here and by llama.cpp; return the number of tokens.

    Args:
        tokenizer: the rebuilt one.
        source: the GGUF file.
        rule: its `tokenizer.ggml.pre`, for the error message.

    Raises:
        UserError: one text is tokenised differently.
    """
    from llama_cpp import Llama

    rows = [row.values["messages"] for row in itertools.islice(stdlib_docs.read_rows(), 400)]
    plain = [message["content"] for messages in rows for message in messages]
    cases = [(text, False) for text in (*_HARD_TEXTS, *plain)]
    if tokenizer.chat_template:
        cases += [(str(tokenizer.apply_chat_template(messages, tokenize=False)), True) for messages in rows[:50]]
    reference = Llama(str(source), vocab_only=True, verbose=False)
    try:
        count = 0
        for text, special in cases:
            expected = reference.tokenize(text.encode(), add_bos=False, special=special)
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            if found != expected:
                raise UserError(
                    f"{source.name}: the tokenizer rebuilt from it differs from llama.cpp's on {text[:40]!r}; there is "
                    f"no rule here for its `tokenizer.ggml.pre` ({rule})"
                )
            count += len(expected)
    finally:
        reference.close()
    return count


def _metadata(source: Path) -> Mapping[str, Any]:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with source.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{source}: not a GGUF file")
    return read_gguf_metadata(str(source))[0]


def _tokenizer(source: Path, metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Rebuild the tokenizer, its splitting rule mended and its longest text set."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    backend = found.backend_tokenizer
    if metadata.get("tokenizer.ggml.pre") in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    # A new object: the one that was loaded would save how it was loaded.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        **{name: token for name in names if (token := getattr(found, name)) is not None},
    )
    tokenizer.chat_template = found.chat_template
    return tokenizer


def _model(source: Path, metadata: Mapping[str, Any], dtype: Dtype) -> "PreTrainedModel":
    """Load the weights dequantised, and mend what the metadata's 32-bit floats and single stop token blur."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
        )
    except ValueError as error:
        architecture = metadata["general.architecture"]
        raise UserError(f"{source.name}: transformers cannot read a GGUF of `{architecture}` ({error})") from None
    if (epsilon := getattr(model.config, "rms_norm_eps", None)) is not None:
        model.config.rms_norm_eps = float(f"{epsilon:.6g}")
    ends = sorted({metadata[key] for key in _END_KEYS if key in metadata})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return model
