"""The step frame: how a step kind is declared, keyed, launched and published."""
from steps.frame.config import Follow, Input, Ref, Resources, Source, StepConfig
from steps.frame.errors import UserError
from steps.frame.job import Job
from steps.frame.kinds import StepKind, all_kinds, load_kind, step
__all__ = [
    "Follow",
    "Input",
    "Job",
    "Ref",
    "Resources",
    "Source",
    "StepConfig",
    "StepKind",
    "UserError",
    "all_kinds",
    "load_kind",
    "step",
]
