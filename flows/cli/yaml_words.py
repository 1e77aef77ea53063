"""Settings in the words of the YAML in which people write them, instead of Python's types."""

import types
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from steps.frame import StepKind

_PLAIN = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path", type(None): "null"}
_SAMPLES = {"whole number": 1, "number": 1.0, "text": "text", "path": "path", "true | false": True}


def type_in_words(annotation: Any) -> str:
    """Say what may stand as a value.

    >>> type_in_words(Literal["a", "b"] | None), type_in_words(list[int])
    ('a | b | null', '[whole number, ...]')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return " | ".join(yaml_value(each) for each in arguments)
    if origin in (Union, types.UnionType):
        return _choice(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, value = arguments
        names = [yaml_value(each) for each in get_args(key)] if get_origin(key) is Literal else ["NAME"]
        return f"{{{', '.join(names)}: {type_in_words(value)}}}"
    if isinstance(origin, type) and issubclass(origin, Sequence | Set):
        return f"[{type_in_words(arguments[0])}, ...]" if arguments else "[...]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _mapping(annotation)
    return _PLAIN.get(annotation, "any")


def yaml_value(value: Any) -> str:
    """Write a value as YAML does, in one line: `null`, `true`, `{kind: lora, rank: 16}`."""
    value = to_jsonable_python(value)
    if isinstance(value, dict) and "kind" in value:
        # It says most: it comes first.
        value = {"kind": value["kind"], **value}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def example_of(kind: StepKind) -> str:
    """Return a step as a recipe may write it, with what it requires: `{uses: merge.adapter, adapter: STEP}`."""
    parts = [f"uses: {kind.name}"]
    for name, info in kind.config.model_fields.items():
        edge = kind.edges.get(name)
        if not info.is_required():
            continue
        if edge:
            parts.append(f"{name}: [STEP, ...]" if edge.many else f"{name}: STEP")
        else:
            parts.append(f"{name}: {_sample(info.annotation)}")
    return f"{{{', '.join(parts)}}}"


def _choice(arguments: Sequence[Any]) -> str:
    kinds = [name for each in arguments for name in _kinds(each)]
    rest = [type_in_words(each) for each in arguments if not _kinds(each)]
    told = [f"{{kind: {' | '.join(kinds)}, ...}}"] if kinds else []
    words = list(dict.fromkeys([*told, *rest]))
    return " | ".join([word for word in words if word != "null"] + [word for word in words if word == "null"])


def _kinds(annotation: Any) -> list[str]:
    """Return the kinds by which members of a choice are told apart; none of what has no kind."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [name for each in get_args(annotation) for name in _kinds(each)]
    field = getattr(annotation, "model_fields", {}).get("kind")
    return [str(each) for each in get_args(field.annotation)] if field is not None else []


def _mapping(model: type[BaseModel]) -> str:
    kinds = _kinds(model)
    if kinds:
        return f"{{kind: {' | '.join(kinds)}, ...}}"
    return f"{{{', '.join(model.model_fields)}}}"


def _sample(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"[{_sample(arguments[0])}]"
    if kinds := _kinds(annotation):
        return f"{{kind: {kinds[0]}}}"
    words = type_in_words(annotation).split(" | ")[0]
    return yaml_value(_SAMPLES[words]) if words in _SAMPLES else words
