"""What this machine has and computes fastest in, told from its devices and processor flags without importing torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Literal

_elsewhere: ContextVar[bool] = ContextVar("elsewhere", default=False)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Read configs that are not to run on this machine: what it has and lacks is not asked within this context."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def runs_here() -> bool:
    """Whether what is read is to run on this machine, so that a missing program is a mistake."""
    return not _elsewhere.get()


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that may be used, by the names that `CUDA_VISIBLE_DEVICES` gives them."""
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not there:
        return [str(number) for number in range(there)]
    return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]


@cache
def fast_dtype() -> Literal["bfloat16", "float32"]:
    """Return `bfloat16` where matrix products in it are faster than in float32, else `float32`.

    That is on GPUs, on Intel processors with AMX, and on AMD processors with AVX512-BF16 (measured: 2 to 3 times).
    Intel's AVX512-BF16 alone is slower than float32 (measured: 54 to 89 against 130 GFLOP/s on one core).
    """
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "bfloat16"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    amd = "AuthenticAMD" in text and "avx512_bf16" in flags
    return "bfloat16" if amd or "amx_bf16" in flags else "float32"
