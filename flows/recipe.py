"""Recipes: YAML in, one resolved mapping out, after `extends:`, `--set` and `${...}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flows.yaml_file import Place, YamlFile
from registry.gates import Gate
from steps.frame import Resources, UserError
from steps.frame.errors import did_you_mean


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Publish(_Part):
    """What is registered when every step has finished."""

    family: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name under which people pull it."""
    members: list[str] = Field(min_length=1)
    """Steps whose outputs belong to the family; the first is the one that gates compare."""
    gates: list[Gate] = []
    """Conditions under which the candidate becomes `champion`."""


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
    """Config keys with several values each: the step is run once for each combination."""
    resources: Resources | None = None
    """What it asks of the machine, where the kind's default does not fit."""

    @property
    def config(self) -> dict[str, Any]:
        """The kind's own keys."""
        return dict(self.model_extra or {})


class Recipe(_Part):
    """A whole recipe, checked for its own shape (the graph is checked by `flows.graph`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    base: str | StepEntry | None = None
    """The pretrained model: a URI, or a step of its own. Steps refer to it as `base`."""
    seed: int = 0
    """Seed of every step that takes one and does not set its own."""
    vars: dict[str, Any] = {}
    """Values for `${vars.NAME}` anywhere in the recipe."""
    steps: dict[str, StepEntry] = Field(min_length=1)
    publish: Publish | None = None
    schedule: Schedule | None = None

    @field_validator("steps", mode="after")
    @classmethod
    def _names(cls, steps: dict[str, StepEntry]) -> dict[str, StepEntry]:
        for name in steps:
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

    @property
    def yaml(self) -> str:
        """The resolved recipe as YAML: what MLflow keeps."""
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)

    def error(self, place: Sequence[str | int], message: str) -> UserError:
        """Build the one-sentence error for a key: `FILE:LINE: steps.sft.rank: message`."""
        dotted = ".".join(map(str, place))
        return UserError(f"{self.file.where(place)}: {dotted}: {message}")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, merge what it extends, apply overrides, resolve variables and check its shape.

    Args:
        path: the YAML file.
        overrides: `path=value` texts as given to `--set`; values are YAML.

    Raises:
        UserError: one sentence with file, line and key.
    """
    file = YamlFile.read(path)
    content = _extended(file, ())
    for override in overrides:
        _override(content, override)
    resolved = _interpolated(content, file)
    try:
        recipe = Recipe.model_validate(resolved)
    except ValidationError as error:
        raise validation_error(error, file, (), Recipe) from None
    return LoadedRecipe(recipe, file, resolved)


def validation_error(error: ValidationError, file: YamlFile, place: Place, model: type[BaseModel]) -> UserError:
    """Turn pydantic's first complaint into one sentence that names file, line and key."""
    first = error.errors()[0]
    # Members of a union appear in pydantic's location by type; the recipe has no such key.
    spot: Place = (*place, *(part for part in first["loc"] if isinstance(part, int) or part.islower() or "-" in part))
    dotted = ".".join(map(str, spot))
    prefix = f"{file.where(spot)}: {dotted or 'recipe'}"
    if first["type"] == "extra_forbidden":
        return UserError(f"{prefix}: unknown key{did_you_mean(str(spot[-1]), _known_keys(model, first['loc'][:-1]))}")
    if first["type"] == "missing":
        return UserError(f"{prefix}: this key is required")
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) or first["type"] == "value_error" else f", not {given!r}"
    return UserError(f"{prefix}: {message[0].lower()}{message[1:]}{shown}")


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Follow a location down the models to the one that refused a key."""
    current: Any = model
    for part in loc:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        current = next((each for each in _models_in(field.annotation)), current)
    return list(current.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    from typing import get_args

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _extended(file: YamlFile, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Merge a recipe over the ones it extends; a null removes a key."""
    content = dict(file.content)
    parents = content.pop("extends", [])
    merged: dict[str, Any] = {}
    for name in [parents] if isinstance(parents, str) else parents:
        path = (file.path.parent / name).resolve()
        if path in (*seen, file.path.resolve()):
            raise UserError(f"{file.where(('extends',))}: extends: {name} extends this recipe in turn")
        if not path.exists():
            near = did_you_mean(name, [each.name for each in file.path.parent.glob("*.yaml")])
            raise UserError(f"{file.where(('extends',))}: extends: there is no {path}{near}")
        merged = _merge(merged, _extended(YamlFile.read(path), (*seen, file.path.resolve())))
    return _merge(merged, content)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            # Another step kind has other keys: inheriting the old ones would only be refused.
            replaces = "uses" in value and value["uses"] != merged[key].get("uses")
            merged[key] = dict(value) if replaces else _merge(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: write path=value, e.g. --set steps.sft.epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = path.split(".")
    current: Any = content
    for index, part in enumerate(parents):
        known = list(current) if isinstance(current, dict) else []
        if part not in known and (index > 0 or part not in Recipe.model_fields):
            raise UserError(
                f"--set {path}: the recipe has no `{'.'.join(parents[: index + 1])}`{did_you_mean(part, known)}"
            )
        current = current.setdefault(part, {})
    if not isinstance(current, dict):
        raise UserError(f"--set {path}: `{'.'.join(parents)}` is not a mapping")
    if value is None:
        current.pop(last, None)
    else:
        current[last] = value


def _interpolated(content: dict[str, Any], file: YamlFile) -> dict[str, Any]:
    """Resolve `${vars.rank}` and its like; `${oc.env:NAME}` reads the environment."""
    if "${" not in str(content):
        return content
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{file.where(key.split('.'))}: {key}: {reason}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
