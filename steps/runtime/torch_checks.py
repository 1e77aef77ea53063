"""What the proofs of torch have in common: right products, a training step that learns, the faster precision."""

import time

import torch

_TOKENS, _WIDTH, _HEIGHT = 256, 576, 1536
"""A feed-forward layer of SmolLM2-135M on a short batch."""
_GAIN = 1.2
"""How much faster bfloat16 must be to be taken: it costs precision."""
_SECONDS = 0.25


def computes_rightly(device: str) -> dict[str, float | str]:
    """Check products and a training step on a device, and time the products.

    Returns:
        `bfloat16_gflops` and `float32_gflops` of a layer's product (10^9 operations a second, on a processor of all
        cores that this process may use), and `fast_dtype`, the precision to compute in unless a recipe says otherwise.

    Raises:
        AssertionError: something is computed wrongly; the message says what, and by how much.
    """
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(_TOKENS, _WIDTH, generator=generator)
    right = torch.randn(_HEIGHT, _WIDTH, generator=generator)
    exact = left.double() @ right.double().T
    speeds = {}
    for dtype, bound in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        rows, weights = left.to(device, dtype), right.to(device, dtype)
        found = torch.nn.functional.linear(rows, weights).double().cpu()
        error = ((found - exact).abs().max() / exact.std()).item()
        assert error < bound, f"a product in {dtype} is off by {error:.2g} of its spread"
        _check_training(device, dtype)
        speeds[dtype] = _gflops(rows, weights)
    half, single = speeds[torch.bfloat16], speeds[torch.float32]
    return {
        "bfloat16_gflops": round(half, 1),
        "float32_gflops": round(single, 1),
        "fast_dtype": "bfloat16" if half > _GAIN * single else "float32",
    }


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
