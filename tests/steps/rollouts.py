"""Sampled answers for tests of rewards, and rewards read as a recipe gives them."""

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from steps.lm.tasks import Rollout, Task
from steps.train.rewards import Reward, Scorer

READ: TypeAdapter[Any] = TypeAdapter(Reward)


def rollout(answer: str, reference: str = "42", tokens: int = 10, **task: Any) -> Rollout:
    """An answer to row 7 of test.jsonl."""
    asked = Task("7", ({"role": "user", "content": "What is it?"},), reference, "test.jsonl", task)
    return Rollout(asked, answer, tokens)


def scores(settings: Mapping[str, Any], *rollouts: Rollout) -> list[float]:
    """What a reward with these settings gives."""
    return Scorer(READ.validate_python(settings))(rollouts)


def refused(settings: Mapping[str, Any]) -> str:
    """What is said of settings that are refused."""
    with pytest.raises(ValidationError) as caught:
        READ.validate_python(settings)
    return caught.value.errors()[0]["msg"].removeprefix("Value error, ")
