"""The runtimes that a model is evaluated in: transformers, GPTQModel and llama.cpp behind one small face."""

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steps.artifacts import Model, Quantized
from steps.frame import UserError
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer
from steps.lm.gptq import GPTQ_RUNTIME, load_gptq
from steps.lm.llama_cpp import GgufModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Floats = NDArray[np.float32]

_SPEED_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """How fast a runtime is with one conversation at a time."""

    prompt_tokens_per_second: float
    tokens_per_second: float
    """Decoding alone: the tokens after the first."""


@dataclass(frozen=True)
class Generation:
    """Greedy answers."""

    answers: list[list[int]]
    """Token ids without the stop token, one list a prompt."""
    speed: Speed | None
    """None where the runtime stands in for another one, whose speed and memory it cannot tell."""


class Runtime(Protocol):
    """A loaded model."""

    vocabulary: int
    """Width of its logits."""
    more_stops: tuple[int, ...]
    """Tokens at which it would stop by itself, beside those of the model's facts, at which it does stop."""

    def tokenize(self, text: str) -> list[int]:
        """Tokenise a templated text with the model's own tokenizer."""
        ...

    def logits(self, ids: Sequence[int], start: int) -> Floats:
        """Return the logits after each token from `start` on, shape (len(ids) - start, vocabulary), float32."""
        ...

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Generation:
        """Continue each prompt greedily until a stop token or `max_tokens`."""
        ...


def runtime_name(artifact: Model | Quantized) -> str:
    """Return what a model is evaluated in, for the report."""
    if not isinstance(artifact, Quantized):
        return "transformers"
    return {"gguf": "llama.cpp", "gptq": GPTQ_RUNTIME}.get(artifact.facts.format, "none")


def open_runtime(artifact: Model | Quantized, *, dtype: Dtype, context: int, threads: int) -> Runtime:
    """Load a model in its own runtime.

    Args:
        artifact: a checkpoint, or a GGUF or GPTQ artifact.
        dtype: precision of the matrix products in transformers.
        context: most tokens in one sequence.
        threads: cores to use.

    Raises:
        UserError: the format has no runtime here, or the runtime refuses the file.
    """
    if isinstance(artifact, Quantized) and artifact.facts.format == "gguf":
        return LlamaCppRuntime(artifact.gguf_file, context, threads, artifact.facts.stop_token_ids)
    if isinstance(artifact, Quantized) and artifact.facts.format == "gptq":
        model = load_gptq(artifact.path, dtype)
        return TransformersRuntime(model, artifact.path, artifact.facts.stop_token_ids, stand_in=True)
    if isinstance(artifact, Quantized):
        raise UserError(f"evaluate.compare runs `gguf` and `gptq`; it has no runtime for `{artifact.facts.format}`")
    return TransformersRuntime(load_model(artifact.path, dtype), artifact.path, artifact.facts.stop_token_ids)


class TransformersRuntime:
    """A checkpoint in transformers; scores row by row, answers in one left-padded batch.

    A `stand_in` is a model whose weights were packed and are unpacked here: its answers count, its speed does not.
    """

    def __init__(
        self, model: "PreTrainedModel", directory: Path, stop_token_ids: Sequence[int], *, stand_in: bool = False
    ) -> None:
        from transformers import GenerationConfig

        from steps.lm.device import own_device

        self._model: Any = model.eval().to(own_device())  # pyright: ignore[reportArgumentType]
        # A checkpoint may ask for sampling or penalties; the comparison is greedy and plain.
        self._model.generation_config = GenerationConfig()
        self._tokenizer: PreTrainedTokenizerFast = load_tokenizer(directory)
        self._stops = sorted(stop_token_ids)
        self.more_stops: tuple[int, ...] = ()
        self._stand_in = stand_in
        self._trims = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._precise_head: Any = _float32_copy(self._model.get_output_embeddings())
        self.vocabulary: int = self._precise_head.weight.shape[0]

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]

    def logits(self, ids: Sequence[int], start: int) -> Floats:
        """See `Runtime`."""
        import torch

        count = len(ids) - start
        trim = {"logits_to_keep": count} if self._trims else {}
        with torch.inference_mode(), _output_layer(self._model, self._precise_head):
            rows = torch.tensor([list(ids)], device=self._model.device)
            found = self._model(input_ids=rows, use_cache=False, **trim).logits
        return found[0, -count:].float().cpu().numpy()

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Generation:
        """See `Runtime`."""
        answers = [self._until_stop(row) for row in self._continue(prompts, max_tokens)]
        return Generation(answers, None if self._stand_in else self._speed(prompts[0]))

    def _speed(self, prompt: list[int]) -> Speed | None:
        """Time one prompt alone, with an answer that may not stop early; None where the model has no room for one."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        tokens = min(_SPEED_TOKENS, (positions or len(prompt) + _SPEED_TOKENS) - len(prompt))
        if tokens < 2:
            return None
        clock = self._clock()
        began = time.perf_counter()
        self._continue([prompt], tokens, min_new_tokens=tokens, stopping_criteria=[clock])
        first, last = clock.times[0], clock.times[-1]
        return Speed(len(prompt) / (first - began), (len(clock.times) - 1) / (last - first))

    def _continue(self, prompts: Sequence[list[int]], max_tokens: int, **options: Any) -> list[list[int]]:
        """Return the new tokens of each prompt, padding after the stop token included."""
        import torch

        width = max(len(prompt) for prompt in prompts)
        padding = self._stops[0] if self._stops else 0
        ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            found = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self._stops or None,
                pad_token_id=padding,
                **options,
            )
        return found[:, width:].tolist()

    def _until_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((index for index, token in enumerate(ids) if token in self._stops), len(ids))]

    @staticmethod
    def _clock() -> Any:
        """Return a stopping criterion that stops nothing and notes when each token came."""
        import torch
        from transformers import StoppingCriteria

        class Clock(StoppingCriteria):
            def __init__(self) -> None:
                self.times: list[float] = []

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
                self.times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return Clock()


class LlamaCppRuntime:
    """A GGUF file in llama.cpp; one conversation at a time."""

    def __init__(self, file: Path, context: int, threads: int, stops: Sequence[int] = ()) -> None:
        self._model = GgufModel(file, context=context, threads=threads)
        self.vocabulary = self._model.vocabulary
        # What the other runtimes stop on: otherwise an answer's score would tell of that, not of the weights.
        self._stops = frozenset(stops) or self._model.stop_token_ids
        self.more_stops = tuple(sorted(self._model.stop_token_ids - self._stops))

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        return self._model.tokenize(text)

    def logits(self, ids: Sequence[int], start: int) -> Floats:
        """See `Runtime`."""
        return self._model.logits(ids, start)

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Generation:
        """See `Runtime`. The time to the first token is measured by itself and taken off."""
        answers, first, whole, prompt_tokens, decoded = [], 0.0, 0.0, 0, 0
        for prompt in prompts:
            began = time.perf_counter()
            self._model.generate(prompt, 1, self._stops)
            between = time.perf_counter()
            answer = self._model.generate(prompt, max_tokens, self._stops)
            first += between - began
            whole += time.perf_counter() - between
            prompt_tokens += len(prompt)
            # The first token comes with the prompt; a stop token was decoded too, though it is not in the answer.
            decoded += len(answer) if len(answer) < max_tokens else max_tokens - 1
            answers.append(answer)
        return Generation(answers, Speed(prompt_tokens / first, decoded / max(whole - first, 1e-9)))


def _float32_copy(head: Any) -> Any:
    """Return the output layer in float32.

    bfloat16 has eight bits of precision: logits around 20 would come in steps of 0.125, and that alone puts a
    divergence of 4e-4 nats between a model and itself (measured on SmolLM2-135M).
    """
    import torch

    if head.weight.dtype == torch.float32:
        return head
    precise = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    precise.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if head.bias is not None:
        precise.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
    precise.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return precise


@contextmanager
def _output_layer(model: Any, head: Any) -> Iterator[None]:
    """Put another output layer into the model while the context lasts."""
    own = model.get_output_embeddings()
    model.set_output_embeddings(head)
    try:
        yield
    finally:
        model.set_output_embeddings(own)
