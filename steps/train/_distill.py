"""TRL's distillation, taught to learn from given answers too. Imports TRL: use within a step only."""

import random
from typing import Any

from trl.trainer.distillation_trainer import DistillationTrainer


class Distillation(DistillationTrainer):
    """On-policy distillation in which a share of the batches is answered by the data instead of the student.

    That is GKD's λ (https://arxiv.org/abs/2306.13649, algorithm 1). TRL's own GKD trainer is experimental and holds all
    logits in memory; here both kinds of batches go through `DistillationTrainer`'s chunked loss.
    """

    def __init__(self, *args: Any, on_policy_share: float, **kwargs: Any) -> None:
        """Take the share, 0 to 1, and all that `DistillationTrainer` takes; rows have `prompt`, `answer` (tokens)."""
        super().__init__(*args, **kwargs)
        self.on_policy_share = on_policy_share
        self._given: list[list[int]] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Drawn by the step, not from a running generator: a resumed run must draw what an undisturbed one draws.
        drawn = random.Random(f"{self.args.seed}/{self.state.global_step}").random()
        self._given = None if drawn < self.on_policy_share else [row["answer"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        if self._given is not None:
            return self._given
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
