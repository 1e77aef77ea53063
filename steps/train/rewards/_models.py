"""Rewards that ask a model: one trained to score answers, or a judge that is asked a question."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from steps.lm.tasks import Rollout
from steps.train.rewards._reward import Tools, reward


@reward(reference="https://arxiv.org/abs/2203.02155")
def reward_model(
    rollouts: Sequence[Rollout],
    *,
    missing_end: Annotated[float, Field(allow_inf_nan=False)] | None = None,
    models: Tools,
) -> Sequence[float]:
    """What the step's `reward_model` gives: a number without bounds, higher for what people preferred.

    Args:
        rollouts: sampled answers.
        missing_end: what an answer gets that ran out of tokens, in place of its score: a model that scores finished
            answers says little of a beginning. By default it is scored as it stands.
        models: the step's models.
    """
    scores = models.reward_scores(rollouts)
    if missing_end is None:
        return scores
    return [missing_end if each.truncated else score for each, score in zip(rollouts, scores, strict=True)]


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
