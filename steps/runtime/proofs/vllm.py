"""vLLM: a tiny Llama of random weights is written, loaded on the GPU and continues a prompt."""

import importlib
from tempfile import TemporaryDirectory
from typing import Any

from steps.runtime.gpus import gpus
from steps.runtime.proof import Absent, Facts, Proof

PROOF = Proof(
    runtime="vLLM",
    distribution="vllm",
    module="vllm",
    libraries=("*.so",),
    variables=("CUDA_VISIBLE_DEVICES",),
    stands_on=("torch",),
    imported_by=("trl",),
    serves="backend: vllm, rollouts: {kind: vllm}",
    advice="leave `backend` and `rollouts` out: transformers answers then, more slowly",
    optional=True,
)

_TOKENS = 8


def prove() -> Facts:
    """Load a model of one layer into vLLM's offline engine and let it answer.

    Returns:
        `tokens`, how many it gave.
    """
    if not gpus():
        raise Absent("vLLM needs a GPU, and this machine has none")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vllm = importlib.import_module("vllm")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
    )
    with TemporaryDirectory(prefix="posttrain-proof-") as folder:
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
        engine = vllm.LLM(
            folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, gpu_memory_utilization=0.2
        )
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": list(range(1, 20))}], settings)
        count = len(answers[0].outputs[0].token_ids)
    assert count == _TOKENS, f"vLLM gave {count} tokens where {_TOKENS} were asked for"
    return {"tokens": count}
