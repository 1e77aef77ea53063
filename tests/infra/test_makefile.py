"""The Makefile hands what its user names to the commands as it is."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("target", "values", "words"),
    [
        (
            "pull",
            {"TO": "./my model", "FAMILY": "it's", "FORMAT": "gguf:Q4_K_M"},
            ["pull", "it's", "--format", "gguf:Q4_K_M", "--to", "./my model"],
        ),
        ("run", {"RECIPE": "my recipes/$HOME.yaml".replace("$", "$$")}, ["run", "my recipes/$HOME.yaml"]),
        ("plan", {"RECIPE": "a b", "PROFILE": "c d"}, ["plan", "a b", "--profile", "c d"]),
        ("plan", {}, ["plan", "quickstart"]),
    ],
)
def test_a_value_with_spaces_is_one_word(target: str, values: dict[str, str], words: list[str]) -> None:
    given = [f"{name}={value}" for name, value in values.items()]
    # Not as a part of the make that may run this test: that one would say which directory it is in.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-n", target, *given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout.splitlines()[-1])[1:] == words
