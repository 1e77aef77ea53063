"""Answers by vLLM's offline engine (https://docs.vllm.ai/en/latest/serving/offline_inference/); needs a GPU."""

import gc
import importlib
from collections.abc import Sequence
from typing import Any

from steps.artifacts import Adapter, Model
from steps.frame.errors import UserError
from steps.lm.generate import Continuation, Decoding, random_seed

_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Adapter ranks that vLLM reserves memory for."""
_METHODS = ("lora", "rslora", "pissa")
"""Adapters that vLLM applies: LoRA on a base that is not quantized."""


class VllmEngine:
    """Continues prompts by vLLM, which forms its own batches."""

    def __init__(self, model: Model, adapter: Adapter | None, decoding: Decoding) -> None:
        """Load the model.

        Raises:
            UserError: vLLM is not installed, or takes no adapter of this kind.
        """
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError("backend: vllm is not installed; `pip install vllm`, or leave `backend` out") from error
        lora: dict[str, Any] = {}
        if adapter is not None:
            rank = adapter.facts.rank or 0
            if adapter.facts.method not in _METHODS or rank > _RANKS[-1]:
                raise UserError(
                    f"backend: vllm takes adapters of the kinds {', '.join(_METHODS)} up to rank {_RANKS[-1]}, this is "
                    f"{adapter.facts.method} of rank {adapter.facts.rank}; merge it first"
                )
            lora = {"enable_lora": True, "max_lora_rank": min(each for each in _RANKS if each >= rank)}
        self.decoding = decoding
        self.stops = list(model.facts.stop_token_ids)
        self.lora = None
        if adapter is not None:
            self.lora = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter.path))
        self.llm = self._vllm.LLM(
            model=str(model.path),
            dtype=decoding.dtype,
            seed=decoding.seed,
            # Only what is asked for, never the checkpoint's own sampling settings.
            generation_config="vllm",
            enable_prefix_caching=True,
            tensor_parallel_size=decoding.tensor_parallel,
            **lora,
        )

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int) -> list[Continuation]:
        """Continue each prompt by at most `new_tokens` tokens."""
        how = [self._parameters(key, new_tokens) for key in keys]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, how, lora_request=self.lora, use_tqdm=False) if asked else []
        first = [output.outputs[0] for output in outputs]
        return [Continuation(list(each.token_ids), each.finish_reason == "stop") for each in first]

    def close(self) -> None:
        """End the engine's own processes, which hold the GPU's memory."""
        del self.llm
        gc.collect()

    def _parameters(self, key: str, new_tokens: int) -> Any:
        how = self.decoding
        return self._vllm.SamplingParams(
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=how.min_p,
            max_tokens=new_tokens,
            stop_token_ids=self.stops,
            seed=random_seed(key),
            detokenize=False,
        )
