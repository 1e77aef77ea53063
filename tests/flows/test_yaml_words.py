"""What `posttrain steps KIND` says of settings: YAML, and no word of Python."""

import re

import pytest
import yaml
from pydantic_core import to_jsonable_python

from flows.cli.tables import describe_kind
from flows.cli.yaml_words import example_of
from steps.frame import load_kind
from steps.frame.kinds import kind_names

PYTHON = re.compile(
    r"\b(None|True|False|Annotated|Union|Literal|Mapping|Sequence|collections|typing|steps\.)|<class|'="
)


@pytest.mark.parametrize("name", kind_names())
def test_no_key_is_described_in_python(name: str) -> None:
    row = describe_kind(load_kind(name))
    for key, told in row["keys"].items():
        for text in (told["type"], told["default"]):
            assert text and not PYTHON.search(text), f"{name}.{key}: {text}"
            assert "any" not in text.split(), f"{name}.{key}: {text}"


@pytest.mark.parametrize("name", kind_names())
def test_the_example_is_yaml_with_everything_that_is_required(name: str) -> None:
    kind = load_kind(name)
    written = yaml.safe_load(example_of(kind))
    assert written.pop("uses") == name
    required = {key for key, info in kind.config.model_fields.items() if info.is_required()}
    assert written.keys() == required


def test_words_and_defaults() -> None:
    keys = describe_kind(load_kind("train.sft"))["keys"]
    assert keys["adapter"]["type"] == "{kind: lora | qlora | dora | rslora | pissa | oft | full, ...}"
    assert keys["adapter"]["default"].startswith("{kind: lora, ")
    assert yaml.safe_load(keys["adapter"]["default"])["rank"] == 16
    assert keys["max_steps"] == {
        "type": "whole number | null",
        "default": "null",
        "meaning": "Stop after so many optimizer steps, whatever `epochs` says.",
    }
    assert keys["optimizer"]["type"] == "adamw | adamw_8bit | muon"
    assert keys["packing"]["type"] == "true | false"
    assert keys["early_stopping"]["type"] == "{patience, min_delta} | null"
    assert keys["data"]["type"] == "step that gives Dataset | Documents"
    rewards = describe_kind(load_kind("train.grpo"))["keys"]["rewards"]["type"]
    assert rewards.startswith("[{kind: ") and "math_verify" in rewards
    columns = describe_kind(load_kind("data.prepare"))["keys"]["columns"]["type"]
    assert columns == "{messages, system, user, assistant, text, prompt, completion: text}"


@pytest.mark.parametrize("name", kind_names())
def test_every_default_can_be_written_as_it_is_shown(name: str) -> None:
    kind = load_kind(name)
    for key, told in describe_kind(kind)["keys"].items():
        if told["default"] != "required" and key not in kind.edges:
            value = yaml.safe_load(told["default"])
            default = kind.config.model_fields[key].get_default(call_default_factory=True)
            assert value == to_jsonable_python(default), f"{name}.{key}"
