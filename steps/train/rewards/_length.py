"""Rewards for how long an answer is and how often it repeats itself."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema

from steps.frame.errors import did_you_mean
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import REWARDS, RewardSpec, Scorer, Tools, reward

Tokens = Annotated[int, Field(ge=1)]


def _one_of_two(spec: Any) -> None:
    if (spec.target is None) == (spec.limit is None):
        raise ValueError("length: give either `target` or `limit`")


def _cache_below(spec: Any) -> None:
    if spec.cache >= spec.max_length:
        raise ValueError(f"overlong: `cache` ({spec.cache}) must be less than `max_length` ({spec.max_length})")


def _inner(value: Any) -> Any:
    """Read the reward inside another one: a kind's name or its settings."""
    if isinstance(value, RewardSpec):
        return value
    settings = {"kind": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise ValueError("give the kind of a reward, or its settings with `kind`")
    if settings["kind"] not in REWARDS:
        raise ValueError(f"no reward `{settings['kind']}`{did_you_mean(str(settings['kind']), REWARDS)}")
    return REWARDS[settings["kind"]].spec.model_validate(settings)


Inner = Annotated[
    SerializeAsAny[RewardSpec],
    BeforeValidator(_inner),
    Field(validate_default=True),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}]}),
]
"""A reward as a setting of another one."""


@reward(reference="https://arxiv.org/abs/2503.04697", check=_one_of_two)
def length(
    rollouts: Sequence[Rollout], *, target: Tokens | None = None, limit: Tokens | None = None
) -> Sequence[float]:
    """1 at the length asked for, falling linearly to 0: at 0 or twice the target, or at twice the limit.

    Args:
        rollouts: sampled answers; what counts is their length in tokens, thinking included.
        target: length to come near to, from both sides.
        limit: length up to which all is well.
    """
    if target is not None:
        return [max(0.0, 1 - abs(rollout.tokens - target) / target) for rollout in rollouts]
    return [min(1.0, max(0.0, 2 - rollout.tokens / limit)) for rollout in rollouts] if limit is not None else []


@reward(reference="https://arxiv.org/abs/2503.14476", check=_cache_below)
def overlong(rollouts: Sequence[Rollout], *, max_length: Tokens, cache: Tokens) -> Sequence[float]:
    """0 for answers that end in time, falling linearly to -1 over the last tokens (DAPO's soft overlong punishment).

    Args:
        rollouts: sampled answers.
        max_length: length in tokens from which on the reward is -1.
        cache: tokens before that over which it falls.
    """
    begin = max_length - cache
    return [-min(1.0, max(0.0, (rollout.tokens - begin) / cache)) for rollout in rollouts]


@reward(reference="https://arxiv.org/abs/2502.03373")
def repetition(
    rollouts: Sequence[Rollout],
    *,
    size: Annotated[int, Field(ge=1)] = 4,
    unit: Literal["words", "characters"] = "words",
) -> Sequence[float]:
    """Minus the share of n-grams that were there before: 0 for a text that never repeats itself, towards -1 for a loop.

    Args:
        rollouts: sampled answers, thinking included.
        size: words (or characters) in an n-gram.
        unit: characters also see loops without spaces, and serve scripts that have none; take a larger `size` then.
    """

    def penalty(text: str) -> float:
        units = text.split() if unit == "words" else text
        grams = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return [penalty(rollout.text) for rollout in rollouts]


@reward(reference="https://arxiv.org/abs/2502.03373")
def cosine(
    rollouts: Sequence[Rollout],
    *,
    max_length: Tokens,
    correctness: Inner = "exact",  # pyright: ignore[reportArgumentType] - validated into a reward's settings
    correct_from: float = 1.0,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    models: Tools,
) -> Sequence[float]:
    """Right answers are worth more the shorter, wrong ones cost less the longer, along half a cosine.

    Args:
        rollouts: sampled answers.
        max_length: length in tokens from which on the second value of a range holds.
        correctness: the reward that tells right from wrong, by name or with its settings.
        correct_from: its smallest value that counts as right.
        correct: reward of a right answer at no length and at `max_length`.
        wrong: reward of a wrong answer at no length and at `max_length`.
        models: passed on to `correctness`.
    """
    scores = Scorer(correctness, models)(rollouts)

    def scaled(rollout: Rollout, ends: tuple[float, float]) -> float:
        share = min(1.0, rollout.tokens / max_length)
        return ends[1] + 0.5 * (ends[0] - ends[1]) * (1 + math.cos(math.pi * share))

    return [
        scaled(rollout, correct if score >= correct_from else wrong)
        for rollout, score in zip(rollouts, scores, strict=True)
    ]
