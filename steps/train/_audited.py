"""TRL's online trainers: a group's prompt is read once, and the audits see the importance ratios.

Imports TRL: use within a step only.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig

from steps.lm.prefill import prefill_once
from steps.train._audits import Audits

_KEPT = (
    "max_new_tokens",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "repetition_penalty",
    "cache_implementation",
)
"""What of a trainer's sampling settings holds for greedy answers too."""


def audited(trainer_class: type[Any], audits: Audits) -> type[Any]:
    """Return a subclass of GRPOTrainer or RLOOTrainer that shows the audits how far the policy has moved.

    The ratio of a token (RLOO: of an answer) is its probability under the policy that learns over its probability when
    it was sampled. TRL logs only how many were clipped; what tells that a run is about to fail are their tails.
    """

    class Audited(trainer_class):
        _learning_logps: torch.Tensor | None = None
        # GRPO's method is told how many answers a prompt gets, and returns their log-probabilities too; RLOO's is not.
        _one_answer = (1,) if "num_generations" in _asked_of(trainer_class._generate_single_turn) else ()

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with prefill_once(self.model):
                return super()._generate_single_turn(*args, **kwargs)

        def answer_greedily(self, prompts: list[list[int]]) -> list[list[int]]:
            """Answer prompts (tokens) with the likeliest tokens; all processes must ask equally many.

            They are answered by what samples the rollouts, with the memory that those take: a batch of them at a time.
            """
            batch = self.args.per_device_train_batch_size * self.args.steps_per_generation
            written: list[list[int]] = []
            with _greedy(self):
                for start in range(0, len(prompts), batch):
                    found = self._generate_single_turn(prompts[start : start + batch], None, {}, *self._one_answer)
                    written += found[0] if self._one_answer else found
            return written

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            if torch.is_grad_enabled():
                self._learning_logps = found[0].detach()
            return found

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            loss = super()._compute_loss(model, inputs)
            if self.model.training and self._learning_logps is not None:
                ratios = _ratios(self._learning_logps, inputs)
                if ratios is not None:
                    audits.saw_ratios(ratios)
            return loss

    Audited.__name__ = trainer_class.__name__
    return Audited


def _asked_of(method: Any) -> Iterable[str]:
    return signature(method).parameters


@contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """Let a trainer's own sampling take the likeliest tokens, one answer to a prompt, without dropout."""
    training = trainer.model.training
    changed: list[tuple[Any, dict[str, Any]]] = [(trainer, {"num_generations": 1, "num_generations_eval": 1})]
    if trainer.use_vllm:
        changed.append((trainer.vllm_generation, {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": None}))
    else:
        how = {name: trainer.generation_kwargs[name] for name in _KEPT} | {"do_sample": False}
        config = GenerationConfig(**how, disable_compile=True)
        changed[0][1].update(generation_kwargs=how, generation_config=config)
    before = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in changed]
    trainer.model.eval()
    _set(changed)
    try:
        yield
    finally:
        _set(before)
        trainer.model.train(training)


def _set(settings: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    for owner, values in settings:
        for name, value in values.items():
            setattr(owner, name, value)


def _ratios(logps: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the ratios of one forward pass, or None where it is the one that the answers were sampled with.

    Args:
        logps: log-probabilities of the answers' tokens now, answers × tokens.
        inputs: what the loss was given; GRPO keeps the old log-probability of each token, RLOO of each answer.
    """
    mask = inputs["completion_mask"]
    if (old := inputs.get("old_per_token_logps")) is not None:
        return (logps - old).exp()[mask.bool()]
    if (old := inputs.get("old_logps")) is not None:
        return ((logps * mask).sum(1) - old).exp()
    return None
