"""Writing a quantized GGUF file with llama.cpp's own quantizer."""

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.lm.llama_cpp import captured_log

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FALLBACKS = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback quantization")
_UNWEIGHED = re.compile(r"did not find weights for (\S+)")
# Metadata keys under which llama.cpp looks for tokens that end an answer, besides the end-of-sequence token.
_STOP_KEYS = (b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.eom_token_id")
MOST_STOPS = len(_STOP_KEYS)
"""Tokens that a file can name as ends of an answer, besides its end-of-sequence token."""


@dataclass(frozen=True)
class Outcome:
    """What the quantizer had to do otherwise than asked."""

    fallbacks: int
    """Tensors stored in another type than the scheme's, because their rows do not divide into its blocks."""
    unweighed: tuple[str, ...]
    """Matrices that the importance matrix does not cover."""


def quantize_file(
    source: Path,
    target: Path,
    scheme: str,
    *,
    importance: "Mapping[str, NDArray[np.float32]]",
    stop_token_ids: Sequence[int],
    threads: int,
) -> Outcome:
    """Quantize an unquantized GGUF file.

    Args:
        source: the file to read.
        target: the file to write.
        scheme: llama.cpp's name, e.g. `Q4_K_M`.
        importance: GGUF tensor name -> mean square of each input channel; may be empty.
        stop_token_ids: at most `MOST_STOPS` tokens to mark as ends of an answer, besides those that llama.cpp finds.
        threads: cores to use; they do not change the result.

    Raises:
        RuntimeError: llama.cpp gave up; its log says why.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme}")
    params.nthread = threads
    matrix, overrides = _importance_array(importance), _stop_overrides(stop_token_ids)
    if importance:
        params.imatrix = matrix
    if stop_token_ids:
        params.kv_overrides = overrides
    with captured_log() as pieces:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.pointer(params))
    text = "".join(pieces)
    if code:
        raise RuntimeError(f"llama.cpp could not quantize to {scheme}: {text.strip().splitlines()[-1]}")
    found = _FALLBACKS.search(text)
    unweighed = sorted(set(_UNWEIGHED.findall(text)) - {"token_embd.weight", "output.weight"})
    return Outcome(int(found.group(1)) if found else 0, tuple(unweighed))


def _importance_array(importance: "Mapping[str, NDArray[np.float32]]") -> Any:
    """Return the C array of (name, values, length), ended by an entry without a name; it borrows the values."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, sorted(importance.items()), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


def _stop_overrides(stop_token_ids: Sequence[int]) -> Any:
    """Return the C array of metadata that marks the tokens, ended by an entry without a key."""
    import llama_cpp

    entries = (llama_cpp.llama_model_kv_override * (len(_STOP_KEYS) + 1))()
    for entry, key, token in zip(entries, _STOP_KEYS[: len(stop_token_ids)], stop_token_ids, strict=False):
        entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        entry.key = key
        entry.value.val_i64 = token
    return entries
