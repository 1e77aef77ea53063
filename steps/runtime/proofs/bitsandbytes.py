"""bitsandbytes: a matrix in 4 bits and back, a product with it, and steps of 8-bit AdamW."""

from typing import Any

from steps.runtime.proof import Facts, Proof

PROOF = Proof(
    runtime="bitsandbytes",
    distribution="bitsandbytes",
    module="bitsandbytes",
    libraries=("*.so",),
    variables=("CUDA_VISIBLE_DEVICES",),
    stands_on=("torch",),
    imported_by=("peft", "gptqmodel"),
    serves="adapter: qlora, optimizer: adamw_8bit",
    advice="take `adapter: {kind: lora}` and `optimizer: adamw` until it works",
)


def prove() -> Facts:
    """Quantize, multiply and optimize, on the GPU where there is one, else on the processor.

    Returns:
        `device`, where it computed.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from bitsandbytes.optim.adamw import AdamW8bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    matrix = torch.randn(128, 256, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    error = (dequantize_4bit(packed, state) - matrix).float().std() / matrix.float().std()
    assert error < 0.15, f"a matrix in NF4 is off by {error:.2g} of its spread"
    layer = Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    options: Any = {"requires_grad": False, "quant_type": "nf4"}
    layer.weight = Params4bit(matrix.cpu(), **options)
    layer = layer.to(device)
    rows = torch.randn(8, 256, device=device, dtype=torch.bfloat16)
    wanted = rows.float() @ matrix.float().T
    error = (layer(rows).float() - wanted).std() / wanted.std()
    assert error < 0.2, f"a product with a matrix in NF4 is off by {error:.2g} of its spread"
    weights = torch.nn.Parameter(torch.randn(64, 128, device=device))
    before = weights.square().mean().item()
    optimizer = AdamW8bit([weights], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        weights.square().mean().backward()
        optimizer.step()
    after = weights.square().mean().item()
    assert after < before, f"8-bit AdamW took a loss from {before} to {after}"
    return {"device": device}
