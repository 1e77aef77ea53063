"""Rewards: what reinforcement learning, rejection sampling and held-out verification judge answers by.

Each is one small typed function (see `_reward`); a recipe lists them as `rewards: [{kind: exact}, {kind: think_format,
weight: 0.2}]`. To add one, write a function with the decorator `reward` in one of the modules imported here.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from steps.train.rewards import (  # noqa: F401 - importing registers
    _answers,
    _code,
    _external,
    _form,
    _length,
    _models,
    _user,
    _verified,
)
from steps.train.rewards._reward import REWARDS, RewardKind, RewardSpec, Scorer, Tools, reward, total
from steps.train.rewards._tools import Models, check_labels, check_tools

if TYPE_CHECKING:
    Reward = RewardSpec
else:
    # A union over the registered kinds: unknown keys are refused by the kind that the recipe names.
    Reward = Annotated[reduce(or_, (kind.spec for kind in REWARDS.values())), Field(discriminator="kind")]

LIBRARIES = ("jsonschema", "math-verify", "reasoning-gym", "regex")
"""Distributions that shape a verdict, for the steps that ask for one."""

__all__ = [
    "LIBRARIES",
    "REWARDS",
    "Models",
    "Reward",
    "RewardKind",
    "RewardSpec",
    "Scorer",
    "Tools",
    "check_labels",
    "check_tools",
    "describe",
    "reward",
    "total",
]


def describe() -> list[dict[str, Any]]:
    """Return for every reward its `name`, first docstring line (`summary`), `reference` and `keys`.

    `keys` holds the JSON Schema (type, default, description) of each recipe key, without those that all rewards share
    (`weight`, `name`).
    """
    return [
        {"name": kind.name, "summary": kind.summary, "reference": kind.reference, "keys": kind.keys}
        for kind in sorted(REWARDS.values(), key=lambda kind: kind.name)
    ]
