"""llama.cpp: a tiny model is loaded, decoded, quantized, and what is quantized decoded again."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from steps.runtime.proof import Facts, Proof

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

VARIANT = "POSTTRAIN_LLAMA_CPP_VARIANT"
"""Environment variable by which one of the processor backends is chosen, see `infra/setup/backends.py`."""
_WIDTH, _VOCABULARY, _HEADS = 256, 512, 4
_SCHEMES = {"Q8_0": 0.05, "Q4_0": 0.5, "Q4_K_M": 0.5}
"""Schemes to try, and how far their logits may lie from the model's own, in shares of their spread."""


def _libraries() -> Path | None:
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "lib" if places else None


def _fallbacks() -> Sequence[Mapping[str, str]]:
    """Return the processor backends that this machine can run, the better first."""
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    if not places or VARIANT in os.environ:
        return []
    done = subprocess.run([sys.executable, Path(places[0]) / "_backends.py"], capture_output=True, text=True)
    return [{VARIANT: name} for name in done.stdout.split()]


def _settle(died: Sequence[Mapping[str, str]]) -> None:
    """Note the backends that died, so that no process loads them; forget those that work again."""
    folder = _libraries()
    if folder is None or VARIANT in os.environ:
        return
    names = sorted({each[VARIANT] for each in died if VARIANT in each})
    path, partial = folder / "avoid.txt", folder / f"avoid.{os.getpid()}"
    if names:
        partial.write_text("\n".join(names) + "\n")
        partial.replace(path)
    else:
        path.unlink(missing_ok=True)


PROOF = Proof(
    runtime="llama.cpp",
    distribution="llama-cpp-python",
    module="llama_cpp",
    libraries=("lib/*.so", "lib/*.dylib"),
    serves="GGUF: quantize.gguf, and every step that opens one",
    advice="`make setup` builds it anew",
    variables=("LLAMA_CPP_LIB_PATH", VARIANT),
    fallbacks=_fallbacks,
    settle=_settle,
)


def prove() -> Facts:
    """Load, decode and quantize a tiny Llama of random weights.

    Returns:
        `variant`, the processor backend that computed; empty where it is part of the library.
    """
    import llama_cpp
    import numpy as np

    from steps.lm.llama_cpp import GgufModel
    from steps.quantize._gguf_file import quantize_file

    ids = [int(each) for each in np.random.default_rng(2).integers(0, _VOCABULARY, 48)]
    with TemporaryDirectory(prefix="posttrain-proof-") as folder:
        plain = Path(folder) / "plain.gguf"
        _write_model(plain)
        with GgufModel(plain, context=64, threads=2) as model:
            together = model.logits(ids)
            # A prompt and a single token take different kernels.
            alone = np.concatenate([model.logits(ids[:1]), model.logits(ids[:17])[-1:]])
        _check_close("short prompts", alone, together[[0, 16]], 0.02)
        for scheme, bound in _SCHEMES.items():
            target = Path(folder) / f"{scheme}.gguf"
            quantize_file(plain, target, scheme, importance={}, stop_token_ids=(), threads=2)
            with GgufModel(target, context=64, threads=2) as model:
                _check_close(scheme, model.logits(ids), together, bound)
    backends = getattr(llama_cpp, "_backends", None)
    return {"variant": backends.loaded if backends else ""}


def _check_close(what: str, found: "Floats", wanted: "Floats", bound: float) -> None:
    import numpy as np

    error = float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())
    assert error < bound, f"{what}: the logits are off by {error:.2g} of their spread, {bound} is allowed"


def _write_model(path: Path) -> None:
    """Write a Llama of one layer and random weights, without a tokenizer."""
    import gguf
    import numpy as np

    chance = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * _WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "token_embd": (_VOCABULARY, _WIDTH),
        "output": (_VOCABULARY, _WIDTH),
        **{f"blk.0.attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (2 * _WIDTH, _WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down": (_WIDTH, 2 * _WIDTH),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.normal(0, 0.06, shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
