"""Rewards that ask a model: one trained to score answers, or a judge that is asked a question."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from steps.lm.tasks import Rollout
from steps.train.rewards._reward import Tools, reward


@reward(reference="https://arxiv.org/abs/2203.02155")
def reward_model(rollouts: Sequence[Rollout], *, models: Tools) -> Sequence[float]:
    """What the step's `reward_model` gives: a number without bounds, higher for what people preferred.

    Args:
        rollouts: sampled answers.
        models: the step's models.
    """
    return models.reward_scores(rollouts)


@reward(reference="https://arxiv.org/abs/2306.05685")
def judge(
    rollouts: Sequence[Rollout],
    *,
    question: Annotated[str, Field(min_length=1)] = "Is this a correct and helpful answer?",
    models: Tools,
) -> Sequence[float]:
    """The probability with which the step's `judge` says yes, rather than no, to a question about each answer.

    Args:
        rollouts: sampled answers.
        question: a question to be answered by yes or no; `{reference}` in it becomes the reference answer.
        models: the step's models.
    """
    return models.judge_scores(rollouts, question)
