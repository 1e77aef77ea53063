"""What this machine computes fastest in, and whether what is read is to run on it; without importing torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast

from steps.runtime.gpus import gpus
from steps.runtime.processor import this_processor
from steps.runtime.verdicts import is_broken, kept_choice, last_verdict

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


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """Return the precision in which this machine multiplies matrices faster, as `posttrain doctor` measured it.

    Before it did, what is known of processors: bfloat16 on GPUs, on Intel's with AMX and on AMD's with AVX512-BF16
    (measured: 2 to 3 times faster), float32 elsewhere (Intel's AVX512-BF16 alone: 54 to 89 against 130 GFLOP/s on one
    core). It enters the keys of the steps that compute in it.
    """
    runtime = "CUDA" if gpus() and not is_broken("CUDA") else "torch"
    verdict = last_verdict(runtime)
    found = verdict.facts.get("fast_dtype") if verdict and verdict.status == "works" else None
    measured = found or kept_choice(runtime)
    if measured in ("bfloat16", "float32"):
        return cast(Literal["bfloat16", "float32"], measured)
    processor = this_processor()
    fast = (processor.is_amd and "avx512_bf16" in processor.features) or "amx_bf16" in processor.features
    return "bfloat16" if fast or (gpus() and not is_broken("CUDA")) else "float32"
