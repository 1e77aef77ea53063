"""A GPTQ checkpoint opened for evaluation: its packed integers turned back into the numbers they stand for.

The kernels that run packed weights are made for GPUs; on a CPU they are compiled on the first load (minutes) and slower
than dense matrices. So `load_gptq` unpacks every matrix once, exactly, and hands out an ordinary model. What it says
about quality is what the packed checkpoint gives; what it says about speed and memory is not.

Source: https://arxiv.org/abs/2210.17323, and the layout that AutoGPTQ gave `qweight`, `qzeros`, `scales` and `g_idx`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError
from steps.lm.checkpoint import Dtype, check_safetensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GPTQ_RUNTIME = "transformers, weights dequantized from GPTQ"
"""Name of this runtime in reports."""

_WORD = 32


def load_gptq(directory: Path, dtype: Dtype = "float32") -> "PreTrainedModel":
    """Load a GPTQ checkpoint as a dense causal language model on the CPU.

    In `float32` the matrices are exactly (integer - zero) * scale; `bfloat16` rounds each product once more.

    Raises:
        UserError: the directory holds no GPTQ checkpoint in the layouts `gptq` or `gptq_v2`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    scheme = getattr(config, "quantization_config", None)
    layout = scheme.get("checkpoint_format", "gptq") if isinstance(scheme, dict) else None
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "gptq" or layout not in ("gptq", "gptq_v2"):
        raise UserError(f"{directory / 'config.json'}: not a GPTQ checkpoint (quantization_config is {scheme})")
    state = dense_state(directory, bits=int(scheme["bits"]), zeros_less_one=layout == "gptq")
    del config.quantization_config
    wanted = getattr(torch, dtype)
    state = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # Only a concrete class takes tensors instead of a directory; a model without memory tells which it is.
    with torch.device("meta"):
        model_class: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=wanted)
    model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def dense_state(directory: Path, *, bits: int, zeros_less_one: bool) -> "dict[str, torch.Tensor]":
    """Return a checkpoint's tensors with every packed matrix as `weight`, float32 of shape (out, in).

    Args:
        directory: the checkpoint.
        bits: 2, 4 or 8.
        zeros_less_one: whether zero points are stored less one (layout `gptq`) or as they are (`gptq_v2`).
    """
    from safetensors.torch import load_file

    check_safetensors(directory)
    packed: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        packed.update(load_file(path))
    state = {}
    for name, tensor in packed.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            parts = {key: packed[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
            state[f"{module}.weight"] = dequantize(**parts, bits=bits, zeros_less_one=zeros_less_one)
        elif f"{module}.qweight" not in packed or part == "bias":
            state[name] = tensor
    return state


def dequantize(
    qweight: "torch.Tensor",
    qzeros: "torch.Tensor",
    scales: "torch.Tensor",
    g_idx: "torch.Tensor",
    *,
    bits: int,
    zeros_less_one: bool,
) -> "torch.Tensor":
    """Unpack one matrix.

    Args:
        qweight: int32 (in * bits / 32, out), each word holding successive input channels, lowest bits first.
        qzeros: int32 (groups, out * bits / 32), each word holding successive output channels.
        scales: (groups, out).
        g_idx: int32 (in,), the group of each input channel.
        bits: 2, 4 or 8.
        zeros_less_one: see `dense_state`.

    Returns:
        float32 (out, in).
    """
    import torch

    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    if zeros_less_one:
        # The one was taken off whole words, borrows and all, so it is put back the same way.
        ones = sum(1 << int(shift) for shift in shifts)
        qzeros = (qzeros.long() + ones).int()
    values = (qweight.unsqueeze(1) >> shifts.view(1, -1, 1)).bitwise_and_(mask).flatten(0, 1)
    zeros = (qzeros.unsqueeze(2) >> shifts.view(1, 1, -1)).bitwise_and_(mask).flatten(1, 2)
    groups = g_idx.long()
    weight = (values - zeros[groups]).float() * scales.float()[groups]
    return weight.T.contiguous()
