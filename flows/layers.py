"""The layers of a recipe: what it extends, its profile, `--set`, and `${...}`, each laid over the one before."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.yaml_file import YamlFile, read_value
from steps.frame import UserError
from steps.frame.errors import did_you_mean

PROFILES = "profiles"
"""Key of a recipe under which its profiles stand: partial recipes by name."""
_OF_ENVIRONMENT = "Environment variable"
"""How OmegaConf begins to say that one is not set."""
_LONGEST = 64
"""Letters of a profile's name: it is part of the name of folders, and of a family."""
_REPLACING = ("uses", "kind")
"""Keys that say what a mapping is; with another value its other keys are others, too."""


class NotSet(UserError):
    """A recipe reads an environment variable that is not set."""


def extended(file: YamlFile, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe merged over the ones it extends; a null removes a key.

    Raises:
        UserError: it extends a file that is not there, or itself.
    """
    content = dict(file.content)
    parents = content.pop("extends", None) or []
    below: dict[str, Any] = {}
    names = [parents] if isinstance(parents, str) else parents
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise UserError(f"{file.where(('extends',))}: extends: name a file, or a list of files, not {parents!r:.60}")
    for name in names:
        path = (file.path.parent / name).resolve()
        if path in (*seen, file.path.resolve()):
            raise UserError(f"{file.where(('extends',))}: extends: {name} extends this recipe in turn")
        if not path.exists():
            near = did_you_mean(name, [each.name for each in file.path.parent.glob("*.yaml")])
            raise UserError(f"{file.where(('extends',))}: extends: there is no {path}{near}")
        below = _over(below, extended(YamlFile.read(path), (*seen, file.path.resolve())))
    return _over(below, content)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two recipes; what a profile removes is kept as a null until the profile is chosen."""
    merged = merge(below, above)
    under, over = below.get(PROFILES), above.get(PROFILES)
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        merged[PROFILES] = merge(under, over, keep_nulls=True)
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, keep_nulls: bool = False) -> dict[str, Any]:
    """Lay one mapping over another, key by key.

    A null removes a key (or is kept, to remove it later); another `uses` (or `kind`), or a group of rounds in the
    place of a step, replaces the mapping whole, since inheriting the old keys would only be refused.
    """
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            merged[key] = dict(value) if _replaces(value, under) else merge(under, value, keep_nulls=keep_nulls)
        elif value is None and not keep_nulls:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _replaces(above: Mapping[str, Any], below: Mapping[str, Any]) -> bool:
    other = any(name in above and above[name] != below.get(name) for name in _REPLACING)
    return other or ("uses" in below and "steps" in above)


def profiles_of(content: dict[str, Any], file: YamlFile) -> dict[str, Mapping[str, Any]]:
    """Take the profiles out of a recipe.

    Raises:
        UserError: a profile is no mapping, or has profiles or parents of its own.
    """
    found = content.pop(PROFILES, None) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{file.where((PROFILES,))}: {PROFILES}: write NAME: {{...}}, a partial recipe for each name")
    for name, partial in found.items():
        where = f"{file.where((PROFILES, name))}: {PROFILES}.{name}"
        if not str(name).replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{where}: a profile's name may hold letters, digits, `-` and `_` only")
        if len(str(name)) > _LONGEST:
            raise UserError(f"{where:.200}: a profile's name may have {_LONGEST} letters")
        if partial is not None and not isinstance(partial, Mapping):
            raise UserError(f"{where}: a profile is a partial recipe, a mapping, not {partial!r}")
        if own := {"extends", PROFILES} & set(partial or {}):
            raise UserError(f"{where}: a profile cannot have `{min(own)}` of its own")
    return {str(name): partial for name, partial in found.items() if partial is not None}


def with_profile(content: Mapping[str, Any], name: str, partial: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a profile over a recipe.

    Its family is another one than the recipe's, `NAME-PROFILE` unless the profile names it: a model that was made
    small to try the recipe must not meet the real champion.
    """
    merged = merge(content, partial)
    own = partial.get("publish")
    named = isinstance(own, Mapping) and "family" in own
    if not named and isinstance(publish := merged.get("publish"), Mapping) and "family" in publish:
        merged["publish"] = {**publish, "family": f"{publish['family']}-{name}"}
    return merged


def override(content: dict[str, Any], text: str, known: Collection[str]) -> None:
    """Apply one `--set`, `path=value`, in place; `known` are the keys that a recipe may have.

    Raises:
        UserError: it is malformed, or its path leads through a key that is not there.
    """
    path, equals, value_text = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: write path=value, e.g. --set steps.sft.epochs=2")
    try:
        value = read_value(value_text, Path(f"--set {path}"))
    except (yaml.YAMLError, UnicodeError, RecursionError):
        # Also brackets without end, and bytes that are no text in the shell's encoding.
        raise UserError(f"--set {text:.200}: the value is not valid YAML") from None
    *parents, last = path.split(".")
    current: Any = content
    for index, part in enumerate(parents):
        here = list(current) if isinstance(current, dict) else []
        if part not in here and (index > 0 or part not in known):
            shown = ".".join(parents[: index + 1])
            raise UserError(f"--set {path}: the recipe has no `{shown}`{did_you_mean(part, here)}")
        below = current.get(part, {})
        # Copied, because where the recipe writes an anchor and its aliases, all of them are this one mapping.
        current[part] = dict(below) if isinstance(below, dict) else below
        current = current[part]
    if not isinstance(current, dict):
        raise UserError(f"--set {path}: `{'.'.join(parents)}` is not a mapping")
    if value is None:
        current.pop(last, None)
    else:
        current[last] = value


def interpolated(content: dict[str, Any], file: YamlFile) -> dict[str, Any]:
    """Resolve `${vars.rank}` and its like; `${oc.env:NAME}` reads the environment.

    Raises:
        UserError: there is nothing of that name.
    """
    if "${" not in str(content):
        return content
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None) or ""
        kind = NotSet if _OF_ENVIRONMENT in reason else UserError
        raise kind(f"{file.where(key.split('.'))}: {key}: {reason}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
