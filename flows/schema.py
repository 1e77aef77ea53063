"""The JSON Schema of recipes: what an editor completes and checks while a recipe is written."""

from collections.abc import Mapping
from typing import Any

from flows.recipe import Recipe
from steps.frame import StepKind, all_kinds

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PARTIAL = {"$ref": "#/$defs/PartialSteps"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema: the recipe's own keys, and for each step the keys of the kind that `uses:` names."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for kind in all_kinds():
        name = kind.name.replace(".", "_")
        definitions[name] = _step_schema(kind, definitions)
        condition = {"properties": {"uses": {"const": kind.name}}, "required": ["uses"]}
        choices.append({"if": condition, "then": {"$ref": f"#/$defs/{name}"}})
    # A base that does not say what it is, is a source.
    schema["properties"]["base"]["anyOf"].insert(1, {"$ref": "#/$defs/model_source"})
    uses = {"enum": [kind.name for kind in all_kinds()], "description": "Step kind."}
    definitions["StepEntry"] = {"type": "object", "properties": {"uses": uses}, "required": ["uses"], "allOf": choices}
    whole, part = {"$ref": "#/$defs/StepEntry"}, _partial_step(uses)
    rounds = definitions["Rounds"]["properties"]
    rounds["steps"]["additionalProperties"] = whole
    rounds["rounds"] = _or_variable(rounds["rounds"])
    definitions["Steps"] = {"type": "object", "additionalProperties": _step_or_rounds(whole), "minProperties": 1}
    definitions["PartialSteps"] = {"type": "object", "additionalProperties": part}
    properties = schema["properties"]
    steps = properties.pop("steps")
    properties["steps"] = {"type": "object", "description": steps["description"]}
    profile = {**_or_null(properties), **_partial(definitions, part), "steps": _PARTIAL}
    texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    properties["extends"] = {**texts, "description": "Recipes that this one changes, relative to it."}
    properties["profiles"] = {
        "type": "object",
        "description": "The recipe in other sizes, by name: what each changes; a null removes a key.",
        "additionalProperties": {"type": ["object", "null"], "properties": profile, "additionalProperties": False},
    }
    schema["required"] = []
    return {
        "$schema": _DIALECT,
        **schema,
        "title": "posttrain recipe",
        # What extends another recipe may leave out what that one says.
        "if": {"required": ["extends"]},
        "then": {"properties": {"steps": _PARTIAL}},
        "else": {"properties": {"steps": {"$ref": "#/$defs/Steps"}}, "required": ["name", "steps"]},
    }


def _step_or_rounds(step: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"required": ["rounds"]}, "then": {"$ref": "#/$defs/Rounds"}, "else": step}


def _partial_step(uses: dict[str, Any]) -> dict[str, Any]:
    """Schema of a step, or of a group, of which the recipe below says the rest."""
    return {"type": ["object", "null"], "properties": {"uses": uses, "steps": _PARTIAL}}


def _partial(definitions: Mapping[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Schemas of `base` and `publish` where another layer of the recipe says the rest."""
    publish = {name: value for name, value in definitions["Publish"].items() if name != "required"}
    return {"base": {"anyOf": [{"type": "string"}, step]}, "publish": {**publish, "type": ["object", "null"]}}


def _or_null(properties: dict[str, Any]) -> dict[str, Any]:
    return {name: {"anyOf": [value, {"type": "null"}]} for name, value in properties.items()}


def _step_schema(kind: StepKind, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = kind.config.model_json_schema()
    for name, definition in schema.pop("$defs", {}).items():
        inner = {key: _or_variable(value) for key, value in definition.get("properties", {}).items()}
        definitions[name] = {**definition, "properties": inner} if inner else definition
    properties = {
        name: _or_variable(_or_list(value, many=name in kind.edges and kind.edges[name].many))
        for name, value in schema.get("properties", {}).items()
        if "names_of" not in value
    }
    properties["uses"] = {"const": kind.name}
    properties["matrix"] = {"type": "object", "additionalProperties": {"type": "array"}}
    properties["resources"] = {"$ref": "#/$defs/Resources"}
    return {
        "type": "object",
        "description": kind.summary,
        "properties": properties,
        "required": list(schema.get("required", [])),
        "additionalProperties": False,
    }


def _or_list(value: dict[str, Any], *, many: bool) -> dict[str, Any]:
    """Let a list of inputs be written as one name, too."""
    return {"anyOf": [{"type": "string"}, value], "description": value.get("description", "")} if many else value


def _or_variable(value: dict[str, Any]) -> dict[str, Any]:
    """Let any value be a `${...}` variable, but those by which the members of a union are told apart."""
    if "const" in value:
        return value
    return {"anyOf": [value, {"type": "string", "pattern": r"^\$\{.+\}$"}], "description": value.get("description", "")}
