"""What the proofs of torch have in common: right products, a training step that learns, the faster precision."""

import time
from collections.abc import Sequence

import torch

_TOKENS, _WIDTH, _HEIGHT = 256, 576, 1536
"""A feed-forward layer of SmolLM2-135M on a short batch."""
_GAIN = 1.2
"""How much faster bfloat16 must be to be taken: it costs precision."""
_ROUNDS, _SECONDS = 12, 0.05
"""How often, and for how long, each precision is timed, in turn: what else the machine does then slows both."""
_AGREEING = 9
"""In how many of the rounds the same precision must be the faster one; else nothing is said."""


def computes_rightly(device: str) -> dict[str, float | str]:
    """Check products and a training step on a device, and time the products.

    Returns:
        `bfloat16_gflops` and `float32_gflops` of a layer's product (10^9 operations a second, on a processor of all
        cores that this process may use), and `fast_dtype`, the precision to compute in unless a recipe says otherwise;
        left out where the measurements contradict each other, as on a busy machine.

    Raises:
        AssertionError: something is computed wrongly; the message says what, and by how much.
    """
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(_TOKENS, _WIDTH, generator=generator)
    right = torch.randn(_HEIGHT, _WIDTH, generator=generator)
    exact = left.double() @ right.double().T
    products = {}
    for dtype, bound in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        rows, weights = left.to(device, dtype), right.to(device, dtype)
        found = torch.nn.functional.linear(rows, weights).double().cpu()
        error = ((found - exact).abs().max() / exact.std()).item()
        assert error < bound, f"a product in {dtype} is off by {error:.2g} of its spread"
        _check_training(device, dtype)
        products[dtype] = rows, weights
    timed = [[_gflops(*products[dtype]) for dtype in (torch.bfloat16, torch.float32)] for _ in range(_ROUNDS)]
    half, single = (max(speeds) for speeds in zip(*timed, strict=True))
    facts: dict[str, float | str] = {"bfloat16_gflops": round(half, 1), "float32_gflops": round(single, 1)}
    if choice := fast_dtype_of(timed):
        facts["fast_dtype"] = choice
    return facts


def fast_dtype_of(timed: Sequence[Sequence[float]]) -> str:
    """Return the precision to compute in, from rounds of (bfloat16, float32) in GFLOP/s; empty where they disagree."""
    halves = sum(half > _GAIN * single for half, single in timed)
    needed = _AGREEING * len(timed) / _ROUNDS
    return "bfloat16" if halves >= needed else "float32" if len(timed) - halves >= needed else ""


def _check_training(device: str, dtype: torch.dtype) -> None:
    """Take steps of fused AdamW through attention and a matrix; the loss must fall."""
    torch.manual_seed(1)
    weights = torch.nn.Linear(64, 64, device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2, fused=True)
    rows = torch.randn(2, 4, 16, 64, device=device, dtype=dtype)
    losses = []
    for _ in range(5):
        mixed = torch.nn.functional.scaled_dot_product_attention(rows, rows, weights(rows), is_causal=True)
        loss = (mixed.float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss of a training step in {dtype} went from {losses[0]} to {losses[-1]}"


def _gflops(rows: torch.Tensor, weights: torch.Tensor) -> float:
    """Time the product, the best of many, a GPU's queue emptied each time."""
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        if rows.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * rows.numel() * weights.shape[0] / best / 1e9
