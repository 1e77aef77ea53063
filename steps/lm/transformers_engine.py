"""Answers by transformers' `generate`, with random numbers that belong to the answer; needs no GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError
from steps.lm.generate import Continuation, Decoding, random_seed

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast


class TransformersEngine:
    """Continues prompts padded on the left."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        decoding: Decoding,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """Take a loaded model; one that is being trained is left in training mode."""
        self.model: Any = model
        self.decoding = decoding
        own: Any = tokenizer.eos_token_id
        self.stops: list[int] = list(stop_token_ids) or ([] if own is None else [own])
        pad: Any = tokenizer.pad_token_id
        text_config = model.config.get_text_config()
        # Any that the model has will do: nothing looks at it.
        usable = (token for token in (pad, *self.stops) if token is not None and token < text_config.vocab_size)
        self.pad: int = next(usable, 0)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int) -> list[Continuation]:
        """Continue each prompt by at most `new_tokens` tokens.

        Raises:
            UserError: prompt and answer together are longer than the model's context.
        """
        import torch

        from steps.lm.prefill import prefill_once

        if not prompts:
            return []
        longest = max(map(len, prompts))
        if self.context and longest + new_tokens > self.context:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {new_tokens} do not fit the model's context of "
                f"{self.context}; lower `max_new_tokens` or drop the long rows"
            )
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        with _only_asked_for(self.model), prefill_once(self.model), torch.inference_mode():
            out: Any = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._config(new_tokens),
                logits_processor=self._processors(keys, longest, new_tokens),
            )
        return [self._cut(row) for row in out[:, longest:].tolist()]

    def close(self) -> None:
        """Let go of the model."""
        import torch

        del self.model
        torch.cuda.empty_cache()

    def _config(self, new_tokens: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=new_tokens,
            # The choice itself is `_SeededChoice`'s, which leaves one token over.
            do_sample=False,
            eos_token_id=self.stops or None,
            pad_token_id=self.pad,
            disable_compile=True,
        )

    def _cut(self, row: list[int]) -> Continuation:
        end = next((index for index, token in enumerate(row) if token in self.stops), None)
        return Continuation(row, stopped=False) if end is None else Continuation(row[: end + 1], stopped=True)

    def _processors(self, keys: Sequence[str], prompt_length: int, new_tokens: int) -> "LogitsProcessorList":
        """Return the filters in transformers' own order, then the choice; nothing for greedy decoding."""
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        how, chain = self.decoding, LogitsProcessorList()
        if how.temperature == 0:
            return chain
        if how.temperature != 1:
            chain.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k:
            chain.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            chain.append(TopPLogitsWarper(how.top_p))
        if how.min_p:
            chain.append(MinPLogitsWarper(how.min_p))
        chain.append(seeded_choice(keys, prompt_length, new_tokens))
        return chain


def seeded_choice(keys: Sequence[str], prompt_length: int, new_tokens: int) -> Any:
    """Return a logits processor that leaves in each row only the token that the row's own random number picks."""
    import numpy as np
    import torch
    from transformers import LogitsProcessor

    uniform = torch.from_numpy(np.stack([np.random.default_rng(random_seed(key)).random(new_tokens) for key in keys]))

    class SeededChoice(LogitsProcessor):
        def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
            cumulative = scores.double().softmax(-1).cumsum(-1)
            position = input_ids.shape[1] - prompt_length
            at = uniform[:, position, None].to(scores.device) * cumulative[:, -1:]
            # `right` passes over tokens without probability, whose sum equals the one before.
            chosen = torch.searchsorted(cumulative, at, right=True)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return SeededChoice()


@contextmanager
def _only_asked_for(model: "PreTrainedModel") -> Iterator[None]:
    """Let the model evaluate, without its checkpoint's own sampling settings."""
    from transformers import GenerationConfig

    # `generate` fills what a config leaves open from the checkpoint's, e.g. Qwen's repetition penalty.
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
