"""Profiles: the same recipe in another size, by a partial recipe that is merged over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import Graph, build_graph
from flows.lifecycle import lifecycle
from flows.prepare import plan_recipe
from flows.recipe import LoadedRecipe, load_recipe
from flows.team.deployments import form
from registry.home import Home
from steps.frame import UserError
from tests.flows.command import Command

BIG = """
name: big
base: {uses: model.pico, hidden: 512}
steps:
  data: {uses: data.prepare, source: python-stdlib-docs}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: lora, rank: 64}, resources: {gpus: 8}}
  merged: {uses: merge.adapter, adapter: sft}
  gptq: {uses: quantize.gptq, model: merged, calibration: data.train}
publish: {family: big, members: [merged, gptq]}
profiles:
  pico:
    base: {hidden: 128}
    steps:
      data: {limit: 40}
      sft: {adapter: {kind: full}, max_steps: 2, resources: null}
      merged: {uses: train.sft, model: sft, data: data.train}
      gptq: null
    publish: {members: [sft]}
  own: {publish: {family: other}}
"""
Write = Callable[[str, str], Path]


def loaded(write: Write, profile: str = "", *changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    text = BIG
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return load_recipe(write("big.yaml", text), overrides, profile)


def refusal(act: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_profile_is_merged_over_its_recipe(write: Write) -> None:
    graph: Graph = build_graph(loaded(write, "pico"))
    assert list(graph.nodes) == ["base", "data", "sft", "merged"]
    sft = graph.nodes["sft"]
    assert sft.config.model_dump()["adapter"] == {"kind": "full"}
    assert sft.resources.gpus == 0
    assert graph.nodes["merged"].kind.name == "train.sft"
    assert graph.nodes["base"].config.model_dump()["hidden"] == 128
    assert graph.nodes["base"].kind.name == "model.pico"


def test_without_a_profile_the_recipe_is_as_it_stands(write: Write) -> None:
    recipe = loaded(write)
    assert (recipe.name, recipe.profiles) == ("big", ("pico", "own"))
    assert "profiles" not in recipe.resolved
    assert build_graph(recipe).nodes["sft"].resources.gpus == 8


def test_a_profile_has_a_name_and_a_family_of_its_own(write: Write) -> None:
    for profile, name, family in (("", "big", "big"), ("pico", "big@pico", "big-pico"), ("own", "big@own", "other")):
        recipe = loaded(write, profile)
        assert recipe.recipe.publish is not None
        assert (recipe.name, recipe.recipe.publish.family) == (name, family)


def test_set_comes_after_the_profile(write: Write) -> None:
    recipe = loaded(write, "pico", overrides=("steps.sft.max_steps=5", "publish.family=mine"))
    assert build_graph(recipe).nodes["sft"].config.model_dump()["max_steps"] == 5
    assert recipe.recipe.publish is not None
    assert recipe.recipe.publish.family == "mine"


def test_an_unknown_profile(write: Write) -> None:
    assert "big.yaml: there is no profile `pcio`; did you mean `pico`?" in refusal(loaded, write, "pcio")
    plain = write("plain.yaml", "name: plain\nsteps:\n  one: {uses: model.pico}\n")
    assert "there is no profile `pico`; this recipe has no `profiles:`" in refusal(load_recipe, plain, (), "pico")


def test_an_error_in_a_profile_points_into_it(write: Write) -> None:
    change = ("limit: 40", "limt: 40")
    message = refusal(lambda: build_graph(loaded(write, "pico", change)))
    assert "big.yaml:14: steps.data.limt: unknown key; did you mean `limit`?" in message
    assert "big.yaml:19: sede: unknown key; did you mean `seed`?" in refusal(
        loaded, write, "own", ("own: {", "own: {sede: 1, ")
    )


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("limit: 40", "limt: 40", "profile `pico`: {path}:14: steps.data.limt: unknown key; did you mean `limit`?"),
        ("own: {", "own: {sede: 1, ", "profile `own`: {path}:19: sede: unknown key; did you mean `seed`?"),
        ("own: {", "own: {extends: x, ", "{path}:19: profiles.own: a profile cannot have `extends` of its own"),
        ("own: {", f"{'o' * 65}: {{", "a profile's name may have 64 letters"),
        ("own: {publish: {family: other}}", "own: 3", "{path}:19: profiles.own: a profile is a partial recipe"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_before_it_is_chosen(
    write: Write, home: Home, old: str, new: str, sentence: str
) -> None:
    path = write("big.yaml", BIG.replace(old, new))
    assert sentence.format(path=path) in refusal(plan_recipe, str(path), (), thorough=False, home=home)


def test_the_recipe_itself_is_checked_where_a_profile_hides_what_is_wrong(write: Write, home: Home) -> None:
    path = write("big.yaml", BIG.replace("model: merged, calibration", "model: mreged, calibration"))
    message = refusal(plan_recipe, str(path), (), thorough=False, profile="pico", home=home)
    assert f"without a profile: {path}:8: steps.gptq.model: there is no step `mreged`; did you mean" in message


def test_what_the_environment_says_is_asked_for_the_chosen_profile_only(write: Write, home: Home) -> None:
    path = write("big.yaml", BIG.replace("python-stdlib-docs}", '"${oc.env:POSTTRAIN_TEST_UNSET}"}'))
    small = ("steps.data.source=python-stdlib-docs",)
    assert plan_recipe(str(path), small, thorough=False, profile="pico", home=home).steps
    assert "POSTTRAIN_TEST_UNSET" in refusal(plan_recipe, str(path), (), thorough=False, home=home)


def test_profiles_of_a_recipe_that_extends_another(write: Write) -> None:
    write("big.yaml", BIG)
    head = "extends: big.yaml\nname: more\nprofiles:\n"
    path = write("more.yaml", f"{head}  pico: {{steps: {{data: {{limit: 9}}, merged: null}}}}\n  own: null\n")
    recipe = load_recipe(path, (), "pico")
    assert recipe.profiles == ("pico",)
    assert list(recipe.recipe.steps) == ["data", "sft"]
    assert build_graph(recipe).nodes["data"].config.model_dump()["limit"] == 9


def test_the_command_line_takes_a_profile(write: Write, tmp_path: Path) -> None:
    command, path = Command(tmp_path / "home"), write("big.yaml", BIG)
    plan = command("plan", str(path), "--profile", "pico", "--json").json
    assert plan["recipe"] == "big@pico"
    assert [step["step"] for step in plan["steps"]] == ["base", "data", "sft", "merged"]
    ended = command("run", str(path), "--profile", "pioc")
    assert ended.code == 2
    assert "did you mean `pico`?" in ended.err


def test_the_form_has_a_plain_field_for_it() -> None:
    fields = form(lifecycle)["properties"]
    assert list(fields) == ["recipe", "profile", "overrides", "publish"]
    assert (fields["profile"]["type"], fields["profile"]["default"]) == ("string", "")


def test_a_parents_variable_that_a_profile_does_not_use_need_not_be_set(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe itself reads nothing of the environment; what it extends does."""
    monkeypatch.delenv("POSTTRAIN_TEST_UNSET", raising=False)
    write("parent.yaml", BIG.replace("python-stdlib-docs}", '"${oc.env:POSTTRAIN_TEST_UNSET}"}'))
    path = write(
        "child.yaml", "extends: parent.yaml\nprofiles: {pico: {steps: {data: {source: python-stdlib-docs}}}}\n"
    )
    home = Home.at(tmp_path / "home")
    assert plan_recipe(str(path), (), thorough=False, profile="pico", home=home).steps.keys() >= {"data", "sft"}
    assert "POSTTRAIN_TEST_UNSET" in refusal(plan_recipe, str(path), (), thorough=False, home=home)
    # What can be checked without it, is.
    path = write("child.yaml", "extends: parent.yaml\nprofiles: {other: {steps: {sft: {rnak: 3}}}}\n")
    monkeypatch.setenv("POSTTRAIN_TEST_UNSET", "python-stdlib-docs")
    said = refusal(plan_recipe, str(path), (), thorough=False, profile="pico", home=home)
    assert "profile `other`" in said and "rnak: unknown key" in said
