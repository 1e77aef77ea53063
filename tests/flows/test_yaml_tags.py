"""Values under explicit tags, `!!int ''`: read, or refused in one sentence, in a recipe and in `--set`."""

from pathlib import Path

import pytest

from tests.flows.test_recipe_fuzz import read

TAGS = ["int", "float", "bool", "timestamp", "null", "binary", "str", "map", "seq", "set", "omap", "pairs", "merge", ""]
"""Kinds that YAML knows by a tag, and one that it does not."""
TAGGED = ["''", "'-'", "'+'", "'.'", "'_'", "x", "0x", "0b", "':'", "'1:x'", "2026-13-45", "9e9999", "[a]", "{a: b}"]
"""Values that are none of most kinds."""


@pytest.mark.parametrize("tag", TAGS)
def test_a_value_under_a_tag_is_read_or_refused_in_a_sentence(tag: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for value in TAGGED:
        for text in (f"vars: {{a: !!{tag} {value}}}", f"seed: !!{tag} {value}", f"? !!{tag} {value}\n: 1"):
            path.write_text(f"name: x\n{text}\nsteps: {{a: {{uses: model.pico}}}}\n", encoding="utf-8")
            said = read(path)
            assert not said or said.startswith(str(path)), said
        path.write_bytes(b"name: x\nvars: {a: 1}\nsteps: {a: {uses: model.pico}}\n")
        said = read(path, overrides=(f"vars.a=!!{tag} {value}",))
        assert not said or "vars" in said, said


def test_a_value_that_is_none_of_its_kind_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for kind, value in (("int", ""), ("timestamp", "x"), ("bool", "foo")):
        path.write_text(f"name: x\nseed: !!{kind} '{value}'\nsteps: {{a: {{uses: model.pico}}}}\n", encoding="utf-8")
        assert f":2: not valid YAML: '{value}' is no {kind}; in quotes, without a tag, it is a text" in read(path)
