"""Rewards that ask the verifiers of other libraries, in confined processes."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from steps.frame.errors import UserError
from steps.lm.tasks import Rollout
from steps.train.rewards._answers import place, stated_answer
from steps.train.rewards._reward import reward
from steps.train.rewards._sandbox import verified

Seconds = Annotated[float, Field(gt=0, le=600)]


@reward(reference="https://github.com/huggingface/Math-Verify", answer_in=stated_answer)
def math_verify(rollouts: Sequence[Rollout], *, seconds: Seconds = 5.0) -> Sequence[float]:
    """1 where the answer is mathematically equal to the reference, in LaTeX or plain; else 0.

    A reference that is no mathematics is compared as text.

    Args:
        rollouts: sampled answers.
        seconds: time for one answer; 0 for what takes longer.
    """
    asked = [({"reference": rollout.task.answer}, rollout.answer) for rollout in rollouts]
    return verified("math_verify", asked, seconds)


@reward(reference="https://arxiv.org/abs/2505.24760", answer_in=stated_answer)
def reasoning_gym(rollouts: Sequence[Rollout], *, partial: bool = True, seconds: Seconds = 5.0) -> Sequence[float]:
    """What the task's own verifier in reasoning-gym gives, 0 to 1; for rows of a source `reasoning-gym://NAME`.

    Args:
        rollouts: sampled answers; the text in `<answer>` tags counts where there are any.
        partial: keep what the verifier gives for answers that are partly right; else they get 0.
        seconds: time for one answer; 0 for what takes longer.

    Raises:
        UserError: a row is of another source.
    """
    for rollout in rollouts:
        if rollout.task.entry.get("kind") != "reasoning-gym":
            raise UserError(
                f"reward `reasoning_gym`: {place(rollout)} is no task of reasoning-gym; prepare its data from a source "
                "reasoning-gym://NAME"
            )
    scores = verified("reasoning_gym", [(rollout.task.entry, rollout.answer) for rollout in rollouts], seconds)
    return scores if partial else [float(score >= 1) for score in scores]
