"""The step frame: how a step kind is declared, keyed, launched and published."""

from steps.frame.config import (
    Chooses,
    Follow,
    Follows,
    Input,
    Metric,
    NamesOf,
    Ref,
    Resources,
    Seed,
    Source,
    StepConfig,
)
from steps.frame.errors import UserError
from steps.frame.job import Job
from steps.frame.kinds import Like, StepKind, all_kinds, load_kind, step

__all__ = [
    "Chooses",
    "Follow",
    "Follows",
    "Input",
    "Job",
    "Like",
    "Metric",
    "NamesOf",
    "Ref",
    "Resources",
    "Seed",
    "Source",
    "StepConfig",
    "StepKind",
    "UserError",
    "all_kinds",
    "load_kind",
    "step",
]
