"""The JSON Schema of recipes: what an editor completes and checks while a recipe is written."""

from typing import Any

from flows.recipe import Recipe
from steps.frame import StepKind, all_kinds

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the schema: the recipe's own keys, and for each step the keys of the kind that `uses:` names."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions.pop("StepEntry", None)
    choices = []
    for kind in all_kinds():
        name = kind.name.replace(".", "_")
        definitions[name] = _step_schema(kind, definitions)
        condition = {"properties": {"uses": {"const": kind.name}}, "required": ["uses"]}
        choices.append({"if": condition, "then": {"$ref": f"#/$defs/{name}"}})
    names = [kind.name for kind in all_kinds()]
    definitions["StepEntry"] = {
        "type": "object",
        "properties": {"uses": {"enum": names, "description": "Step kind."}},
        "required": ["uses"],
        "allOf": choices,
    }
    extends = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = {**extends, "description": "Recipes that this one changes, relative to it."}
    schema["required"] = [name for name in schema.get("required", []) if name not in ("name", "steps")]
    return {"$schema": _DIALECT, "title": "posttrain recipe", **schema}


def _step_schema(kind: StepKind, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = kind.config.model_json_schema()
    for name, definition in schema.pop("$defs", {}).items():
        definitions[name] = definition
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
    """Let any value be a `${...}` variable."""
    return {"anyOf": [value, {"type": "string", "pattern": r"^\$\{.+\}$"}], "description": value.get("description", "")}
