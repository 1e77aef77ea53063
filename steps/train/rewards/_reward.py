"""What a reward is: a small typed function over sampled answers, whose keyword parameters are its recipe keys.

    @reward(reference="...")
    def numeric(rollouts: Sequence[Rollout], *, tolerance: float = 1e-6) -> Sequence[float]:
        '''1 where the last number of the answer equals the reference's, else 0.

        Args:
            rollouts: sampled answers.
            tolerance: largest difference that still counts as equal.
        '''

A recipe asks for it as `{kind: numeric, tolerance: 0.01, weight: 1}`. A parameter annotated `Tools` is no key: it is
filled with the models that the step was given.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from steps.frame.errors import UserError
from steps.lm.tasks import Rollout

RewardFunction = Callable[..., Sequence[float]]
Check = Callable[[Any], None]
"""Takes the validated settings and raises ValueError where two of them do not fit together."""

_ARGUMENT = re.compile(r"^    (\w+): (.*)$")


class Tools(Protocol):
    """Models that a reward may ask; which of them there are is settled when the recipe is read."""

    def reward_scores(self, rollouts: Sequence[Rollout]) -> Sequence[float]:
        """Score answers with the step's reward model."""
        ...

    def judge_scores(self, rollouts: Sequence[Rollout], question: str) -> Sequence[float]:
        """Let the step's judge answer a question about each answer; the probability of yes."""
        ...


class RewardSpec(BaseModel):
    """What every reward has in common; each kind adds its own keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Share in the total reward; 0 measures without rewarding."""
    name: str | None = None
    """Name in the metrics; the kind when unset. Two rewards of one kind need two names."""

    @property
    def label(self) -> str:
        """Name in the metrics."""
        return self.name or self.kind


@dataclass(frozen=True)
class RewardKind:
    """A registered reward."""

    name: str
    function: RewardFunction
    spec: type[RewardSpec]
    reference: str
    needs_tools: str | None
    """Name of the parameter that takes the step's models; None where it takes none."""
    answer_in: Callable[[str], str] = str.strip
    """Takes from an answer's text what is judged, as answers are told apart where several vote (maj@n)."""
    prepare: Callable[..., object] | None = None
    """Called with the settings as soon as it is clear that the reward will be asked."""

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def keys(self) -> dict[str, dict[str, Any]]:
        """JSON Schema (type, default, description) of each recipe key that is its own."""
        properties = self.spec.model_json_schema()["properties"]
        return {name: schema for name, schema in properties.items() if name not in RewardSpec.model_fields}


REWARDS: dict[str, RewardKind] = {}


def reward(
    *,
    reference: str = "",
    check: Check | None = None,
    answer_in: Callable[[str], str] = str.strip,
    prepare: Callable[..., object] | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function as a reward under its own name, its keyword parameters as recipe keys.

    Args:
        reference: the paper or page that it follows.
        check: called with the validated settings; raises ValueError where they do not fit together.
        answer_in: see `RewardKind`.
        prepare: see `RewardKind`.
    """

    def register(function: RewardFunction) -> RewardFunction:
        name = function.__name__
        hints = get_type_hints(function, include_extras=True)
        documented, summary = _read_docstring(function)
        parameters = [
            each for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY
        ]
        tools = next((each.name for each in parameters if hints[each.name] is Tools), None)
        fields: dict[str, Any] = {}
        for each in parameters:
            if each.name != tools:
                hint = Annotated[hints[each.name], Field(description=documented.get(each.name))]
                fields[each.name] = (hint, ... if each.default is each.empty else each.default)
        fields["kind"] = (Literal[name], name)  # pyright: ignore[reportInvalidTypeForm] - made at run time
        validators: dict[str, Any] = {"_check": model_validator(mode="after")(_checked_by(check))} if check else {}
        spec = create_model(
            _class_name(name), __base__=RewardSpec, __doc__=summary, __validators__=validators, **fields
        )
        REWARDS[name] = RewardKind(name, function, spec, reference, tools, answer_in, prepare)
        return function

    return register


class Scorer:
    """A reward ready to be asked: the function, its settings, and a check of what it returns."""

    def __init__(self, spec: RewardSpec, tools: Tools | None = None) -> None:
        kind = REWARDS[spec.kind]
        settings = {name: getattr(spec, name) for name in kind.spec.model_fields if name not in RewardSpec.model_fields}
        if kind.prepare:
            kind.prepare(**settings)
        if kind.needs_tools:
            settings[kind.needs_tools] = tools
        self.kind = spec.kind
        self.name = spec.label
        self.weight = spec.weight
        self._function = kind.function
        self._settings: Mapping[str, Any] = settings

    def answer_in(self, rollout: Rollout) -> str:
        """Return what is judged of an answer, without the prose around it."""
        return REWARDS[self.kind].answer_in(rollout.answer)

    def asks_the_same_as(self, other: "Scorer") -> bool:
        """Whether both give the same to the same answers, whatever they are called and weigh."""
        return self.kind == other.kind and self._settings == other._settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return one finite number for each answer.

        Raises:
            UserError: the function raised, or returned another number of values, or one that is not finite; the
                sentence names the reward.
        """
        try:
            values = [float(value) for value in self._function(rollouts, **self._settings)]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"reward `{self.name}` raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if len(values) != len(rollouts):
            raise UserError(f"reward `{self.name}` returned {len(values)} values for {len(rollouts)} answers")
        for value, rollout in zip(values, rollouts, strict=True):
            if not math.isfinite(value):
                raise UserError(f"reward `{self.name}` returned {value} for the answer {rollout.text[:60]!r}")
        return values


def total(scorers: Sequence[Scorer], rollouts: Sequence[Rollout]) -> tuple[list[float], dict[str, list[float]]]:
    """Return the weighted sum for each answer, and every component by name.

    Raises:
        UserError: two rewards have one name, or one of them failed.
    """
    names = [scorer.name for scorer in scorers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two rewards are called `{twice}`; give one of them another `name`")
    parts = {scorer.name: scorer(rollouts) for scorer in scorers}
    sums = [sum(scorer.weight * parts[scorer.name][index] for scorer in scorers) for index in range(len(rollouts))]
    return sums, parts


def _checked_by(check: Check) -> Callable[[Any], Any]:
    def checked(spec: Any) -> Any:
        check(spec)
        return spec

    return checked


def _read_docstring(function: RewardFunction) -> tuple[dict[str, str], str]:
    """Return what the `Args:` section says of each parameter, and the text before it."""
    text = inspect.getdoc(function) or ""
    summary, _, rest = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    last = ""
    for line in rest.splitlines():
        if match := _ARGUMENT.match(line):
            last = match[1]
            found[last] = match[2]
        elif line.startswith("     "):
            found[last] += " " + line.strip()
        else:
            break
    return found, summary.strip()


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_")) + "Reward"
