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


def _told_by_backends() -> list[str]:
    """Ask the package's own file for the note of what died here, and for the variants that this processor can run."""
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    path = Path(places[0]) / "_backends.py" if places else None
    if path is None or not path.exists():
        return []
    return subprocess.run([sys.executable, path], capture_output=True, text=True).stdout.splitlines()


def _attempts() -> Sequence[Mapping[str, str]]:
    """Return each variant that this processor can run, the best first, whatever died before; or the one there is."""
    if os.environ.get(VARIANT):
        return [{}]
    return [{VARIANT: name} for name in _told_by_backends()[1:]] or [{}]


def _settle(died: Sequence[Mapping[str, str]]) -> None:
    """Note the variants that died on this machine, so that no process loads them; forget those that live again."""
    told = _told_by_backends()
    if not told or os.environ.get(VARIANT):
        return
    path, names = Path(told[0]), sorted(each[VARIANT] for each in died if VARIANT in each)
    if names:
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text("\n".join(names) + "\n")
        partial.replace(path)
    elif path.exists():
        path.unlink(missing_ok=True)


PROOF = Proof(
    runtime="llama.cpp",
    distribution="llama-cpp-python",
    module="llama_cpp",
    libraries=("lib/*.so", "lib/*.dylib"),
    imported_by=("gptqmodel",),
    serves="GGUF: quantize.gguf, and every step that opens one",
    advice="`infra/setup.sh` builds it anew",
    variables=("LLAMA_CPP_LIB_PATH", VARIANT),
    attempts=_attempts,
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
