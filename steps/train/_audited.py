"""TRL's online trainers: a group's prompt is read once, and the audits see the importance ratios.

Imports TRL: use within a step only.
"""

from collections.abc import Mapping
from typing import Any

import torch

from steps.lm.prefill import prefill_once
from steps.train._audits import Audits


def audited(trainer_class: type[Any], audits: Audits) -> type[Any]:
    """Return a subclass of GRPOTrainer or RLOOTrainer that shows the audits how far the policy has moved.

    The ratio of a token (RLOO: of an answer) is its probability under the policy that learns over its probability when
    it was sampled. TRL logs only how many were clipped; what tells that a run is about to fail are their tails.
    """

    class Audited(trainer_class):
        _learning_logps: torch.Tensor | None = None

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with prefill_once(self.model):
                return super()._generate_single_turn(*args, **kwargs)

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
