"""Recipes: YAML in, one checked recipe out, after `extends:`, its profile, `--set` and `${...}`."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from flows.layers import extended, interpolated, override, profiles_of, with_profile
from flows.yaml_file import Place, YamlFile
from registry.champions import SUFFIX
from registry.gates import Gate
from steps.frame import Resources, Seed, UserError
from steps.frame.errors import did_you_mean

_MOST = 1000
"""Members of a matrix, and rounds of a group."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a recipe and a family may be called."""
_LONGEST = 128
"""Letters of such a name: the registry takes no more, and it is the name of folders, too."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Publish(_Part):
    """What is registered when every step has finished."""

    family: str = Field(pattern=_NAME, max_length=_LONGEST)
    """Name under which people pull it."""
    members: list[str] = Field(min_length=1)
    """Steps whose outputs belong to the family; the first is the one that gates compare."""
    gates: list[Gate] = []
    """Conditions under which the candidate becomes `champion`."""

    @field_validator("family")
    @classmethod
    def _kept(cls, family: str) -> str:
        if family.endswith(SUFFIX):
            raise ValueError(f"`{SUFFIX}` at a family's end is the registry's own; give it another name")
        return family


class Schedule(_Part):
    """When the nightly deployment runs the recipe."""

    cron: str = "0 2 * * *"
    timezone: str = "UTC"


class StepEntry(BaseModel):
    """One step as a recipe writes it: what every kind has in common. All other keys are the kind's own config."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    uses: str
    """Step kind, e.g. `train.sft`."""
    matrix: dict[str, list[Any]] = {}
    """Config keys with several values each (`scheme`, `adapter.rank`): the step is run once for each combination."""
    resources: Resources | None = None
    """What it asks of the machine, where the kind's default does not fit."""

    @field_validator("matrix")
    @classmethod
    def _bounded(cls, matrix: dict[str, list[Any]]) -> dict[str, list[Any]]:
        members = math.prod(len(values) for values in matrix.values())
        if members > _MOST:
            raise ValueError(f"these are {members} combinations; {_MOST} are the most that a step is run for")
        if empty := [key for key, values in matrix.items() if not values]:
            raise ValueError(f"`{empty[0]}` has no value; leave the key out, or give it one")
        names = Counter(_member(values) for values in itertools.product(*matrix.values()))
        if alike := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"several combinations are called `{alike[0]}`; give each a value of its own")
        return matrix

    @property
    def config(self) -> dict[str, Any]:
        """The kind's own keys."""
        return dict(self.model_extra or {})

    @property
    def combinations(self) -> list[tuple[str, dict[str, Any]]]:
        """The values of each combination, as text for the name and by key; one without any where no matrix is."""
        found = itertools.product(*self.matrix.values())
        return [(_member(values), dict(zip(self.matrix, values, strict=True))) for values in found]


def _member(values: Sequence[Any]) -> str:
    """Return the text by which a combination is named; an empty one would be the name of the whole matrix."""
    return ",".join(map(str, values)) or ("''" if values else "")


class Carried(_Part):
    """An artifact that goes from round to round."""

    start: str
    """What the name means in the first round: a step outside the group."""
    then: str
    """What it means in every later round: a step of the group, as the round before made it."""


class Rounds(_Part):
    """A group of steps that is run several times, one round after the other."""

    rounds: int = Field(ge=1, le=_MOST)
    """How often. Steps are named by their round, `tuned[2]`; from outside `tuned` is the last round's, and all rounds'
    where a list is asked for."""
    carry: dict[str, Carried] = {}
    """Names that stand for another artifact in each round."""
    steps: dict[str, StepEntry] = Field(min_length=1)
    """The steps of a round; a name among them means the same round's step."""

    @field_validator("steps", mode="before")
    @classmethod
    def _flat(cls, steps: Any) -> Any:
        if nested := [name for name, entry in _items(steps) if _entry_kind(entry) == "Rounds"]:
            raise ValueError(f"`{nested[0]}` is a group within a group; write its steps here, or the group beside it")
        return steps


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _entry_kind(entry: Any) -> str:
    """Tell a group of rounds from a step by its keys."""
    keys = set(entry) if isinstance(entry, Mapping) else set()
    group = isinstance(entry, Rounds) or "rounds" in keys or ("steps" in keys and "uses" not in keys)
    return "Rounds" if group else "StepEntry"


Entry = Annotated[Annotated[StepEntry, Tag("StepEntry")] | Annotated[Rounds, Tag("Rounds")], Discriminator(_entry_kind)]


class Recipe(_Part):
    """A whole recipe, checked for its own shape (the graph is checked by `flows.graph`)."""

    name: str = Field(pattern=_NAME, max_length=_LONGEST)
    description: str = ""
    base: str | StepEntry | None = None
    """The pretrained model: a URI, `{uri: ..., template: chatml}`, or a step of its own; steps say `base`."""
    seed: Seed = 0
    """Seed of every step that takes one and does not set its own."""
    vars: dict[str, Any] = {}
    """Values for `${vars.NAME}` anywhere in the recipe."""
    steps: dict[str, Entry] = Field(min_length=1)
    """Steps, and groups of steps that are repeated."""
    publish: Publish | None = None
    schedule: Schedule | None = None

    @field_validator("base", mode="before")
    @classmethod
    def _source(cls, base: Any) -> Any:
        """Take settings without a step kind as those of `model.source`."""
        return {"uses": "model.source", **base} if isinstance(base, Mapping) and "uses" not in base else base

    @field_validator("steps", mode="after")
    @classmethod
    def _names(cls, steps: dict[str, Entry]) -> dict[str, Entry]:
        inner = [name for group in steps.values() if isinstance(group, Rounds) for name in (*group.steps, *group.carry)]
        for name in (*steps, *inner):
            if name in ("base", "champion"):
                raise ValueError(f"`{name}` is kept for the recipe's own; give the step another name")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"step name `{name}` may hold letters, digits, `-` and `_` only")
        return steps


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe together with where it came from, for errors and for the record."""

    recipe: Recipe
    file: YamlFile
    resolved: dict[str, Any]
    profile: str = ""
    """The profile that was chosen; empty for the recipe as it stands."""
    profiles: tuple[str, ...] = ()
    """All that it has."""

    @property
    def name(self) -> str:
        """What runs are called: the recipe's name, and its profile where one was chosen, `tina@pico`."""
        return f"{self.recipe.name}@{self.profile}" if self.profile else self.recipe.name

    @property
    def yaml(self) -> str:
        """The resolved recipe as YAML: what MLflow keeps."""
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)

    def error(self, place: Sequence[str | int], message: str) -> UserError:
        """Build the one-sentence error for a key: `FILE:LINE: steps.sft.rank: message`."""
        dotted = ".".join(map(str, place))
        return UserError(f"{self.file.where(place)}: {dotted}: {message}")


def load_recipe(path: Path, overrides: Sequence[str] = (), profile: str = "") -> LoadedRecipe:
    """Read a recipe, merge what it extends and a profile, apply overrides, resolve variables and check its shape.

    Args:
        path: the YAML file.
        overrides: `path=value` texts as given to `--set`; values are YAML.
        profile: name of one of the recipe's `profiles:`.

    Raises:
        UserError: one sentence with file, line and key.
    """
    file = YamlFile.read(path)
    content = extended(file)
    profiles = profiles_of(content, file)
    if profile:
        if profile not in profiles:
            none = "" if profiles else "; this recipe has no `profiles:`"
            raise UserError(f"{path}: there is no profile `{profile}`{did_you_mean(profile, profiles)}{none}")
        content = with_profile(content, profile, profiles[profile])
        file = file.with_lines_of(("profiles", profile))
    for each in overrides:
        override(content, each, Recipe.model_fields)
    resolved = interpolated(content, file)
    try:
        recipe = Recipe.model_validate(resolved)
    except ValidationError as error:
        raise validation_error(error, file, (), Recipe, resolved) from None
    return LoadedRecipe(recipe, file, resolved, profile, tuple(profiles))


def validation_error(
    error: ValidationError, file: YamlFile, place: Place, model: type[BaseModel], given: Any
) -> UserError:
    """Turn pydantic's first complaint into one sentence that names file, line and key.

    Args:
        error: what pydantic says.
        file: the recipe.
        place: where `given` stands in it.
        model: what `given` was checked against.
        given: the values.
    """
    complaints = error.errors()
    # A misspelt key is missing, too: what is written says more than what is not.
    first = next((each for each in complaints if each["type"] == "extra_forbidden"), complaints[0])
    spot: Place = (*place, *_keys(first["loc"], given, missing=first["type"] == "missing"))
    dotted = ".".join(map(str, spot))
    prefix = f"{file.where(spot)}: {dotted or 'recipe'}"
    if first["type"] == "extra_forbidden":
        return UserError(f"{prefix}: unknown key{did_you_mean(str(spot[-1]), _known_keys(model, first['loc'][:-1]))}")
    if first["type"] == "missing":
        return UserError(f"{prefix}: this key is required")
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, (dict, list)) or first["type"] == "value_error" else f", not {value!r}"
    return UserError(f"{prefix}: {message[0].lower()}{message[1:]}{shown}")


def _keys(loc: tuple[int | str, ...], given: Any, *, missing: bool) -> Place:
    """Return the keys of a location, without the names of union members that pydantic puts between them."""
    keys: list[int | str] = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:
            keys.append(part)
            given = given[part]
        elif isinstance(given, list) and isinstance(part, int):
            keys.append(part)
            given = given[part] if part < len(given) else None
    return (*keys, loc[-1]) if missing else tuple(keys)


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Follow a location down the models to the one that refused a key; a union's member goes by name or by kind."""
    current = [model]
    for part in loc:
        named = [each for each in current if part in (each.__name__, *_defaults(each))]
        below = [each.model_fields[part] for each in current if isinstance(part, str) and part in each.model_fields]
        if named:
            current = named
        elif below:
            current = [found for info in below for found in _models_in(info.annotation)] or current
    return list(dict.fromkeys(name for each in current for name in each.model_fields))


def _defaults(model: type[BaseModel]) -> list[str]:
    """Return the texts by which a model tells itself from others of its union, `lora` of `kind: lora`."""
    return [info.default for info in model.model_fields.values() if isinstance(info.default, str)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
