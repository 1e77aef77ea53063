"""GPTQModel: a matrix is quantized to 4 bits on its inputs, packed, and multiplied by GPTQModel's own torch kernel."""

import os

from steps.runtime.proof import Facts, Proof

PROOF = Proof(
    runtime="GPTQModel",
    distribution="GPTQModel",
    module="gptqmodel",
    libraries=("**/*.so",),
    stands_on=("torch", "bitsandbytes", "PyPcre"),
    beside=("pcre", "pcre_ext_c"),
    variables=("CUDA_VISIBLE_DEVICES",),
    # For each adapter it asks whether the layer is one of GPTQModel's.
    imported_by=("peft",),
    serves="quantize.gptq",
    advice="leave `quantize.gptq` out until it works; `quantize.gguf` needs it not",
)

_INPUTS, _OUTPUTS, _GROUP = 128, 64, 32


def prove() -> Facts:
    """Quantize, pack and multiply on the processor; imports take most of the time."""
    # Read once, at the import: with a single worker, its default on two cores, loading fails.
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    # Its kernel would be compiled for some twenty seconds.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.gptq import GPTQ

    torch.manual_seed(1)
    layer = torch.nn.Linear(_INPUTS, _OUTPUTS, bias=False)
    rows = torch.randn(4, 32, _INPUTS)
    with torch.inference_mode():
        wanted = layer(rows)
        gptq = GPTQ(layer, QuantizeConfig(bits=4, group_size=_GROUP, offload_to_disk=False))
        gptq.quantizer.configure(perchannel=True)
        for index in range(len(rows)):
            gptq.add_batch(rows[index : index + 1], wanted[index : index + 1], batch_index=index)
        weights, scales, zeros, groups = gptq.quantize()[:4]
        layer.weight.data = weights.to(layer.weight.dtype)
        kernel = TorchLinear(
            bits=4,
            group_size=_GROUP,
            sym=True,
            desc_act=False,
            in_features=_INPUTS,
            out_features=_OUTPUTS,
            bias=False,
        )
        kernel.pack_original(layer, scales, zeros, groups)
        kernel.post_init()
        found = kernel(rows.half()).float()
    error = ((found - wanted).std() / wanted.std()).item()
    assert error < 0.2, f"a product with a matrix in 4 bits is off by {error:.2g} of its spread"
    return {}
