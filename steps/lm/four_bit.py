"""Models whose linear layers bitsandbytes holds in 4 bits: the frozen bases of QLoRA."""

from pathlib import Path
from typing import TYPE_CHECKING

from steps.artifacts import FourBit
from steps.lm.checkpoint import Dtype, check_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_four_bit(directory: Path, dtype: Dtype, four_bit: FourBit) -> "PreTrainedModel":
    """Load a causal language model and quantize its linear layers, the output layer excepted.

    Args:
        directory: a checkpoint that is not quantized.
        dtype: of the arithmetic and of all other weights.
        four_bit: code and scales (https://arxiv.org/abs/2305.14314, section 3).
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from steps.lm.device import own_device

    check_safetensors(directory)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=four_bit.quant_type,
        bnb_4bit_use_double_quant=four_bit.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        quantization_config=quantization,
        # Left out, every process of a shared step would load it on the first GPU.
        device_map={"": own_device()} if torch.cuda.is_available() else None,
        use_safetensors=True,
        trust_remote_code=False,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On processors with AVX512-BF16 the first forward pass in eval mode would pack the weights into another
            # layout and taking a state dict would unpack them, which does not give them back (bitsandbytes 0.50): the
            # first checkpoint after an evaluation would spoil the base that is trained on.
            module.support_avx512bf16_for_cpu = False
    return model
