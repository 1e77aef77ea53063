"""The recipes that ship: each is whole as it stands, and each runs from its data to its score in its pico profile."""

import html
import json
from pathlib import Path

import pytest

from flows.graph import build_graph
from flows.prepare import recipe_path
from flows.recipe import load_recipe
from steps.frame.hardware import elsewhere
from tests.flows.command import ROOT, Command

SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
STORIES = [
    "deepseek-r1",
    "dpo",
    "instructgpt",
    "minimax-cispo",
    "prover-expert-iteration",
    "qwen3-four-stage",
    "tina",
    "verifier-and-generator",
]
ALWAYS = ("dpo",)
"""Run in every test; the others at night, by `make test-recipes`."""

STAGES = {
    "deepseek-r1": 5,
    "dpo": 3,
    "instructgpt": 2,
    "minimax-cispo": 4,
    "prover-expert-iteration": 4,
    "qwen3-four-stage": 4,
    "tina": 5,
    "verifier-and-generator": 3,
}
"""How many models each story scores; a matrix counts each of its members."""
FIRST_AND_LAST = {
    "deepseek-r1": ("start", "policy"),
    "dpo": ("start", "dpo[2]"),
    "instructgpt": ("sft", "policy"),
    "minimax-cispo": ("start", "rl[cispo]"),
    "prover-expert-iteration": ("start", "policy"),
    "qwen3-four-stage": ("start", "final"),
    "tina": ("start", "rl[4,grpo]"),
    "verifier-and-generator": ("start", "policy[2]"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_is_whole(name: str) -> None:
    with elsewhere():
        assert build_graph(load_recipe(recipe_path(name))).nodes


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_says_what_it_needs_and_how_to_run_it(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    header = text.partition("\nname:")[0]
    assert "# yaml-language-server: $schema=recipe.schema.json" in header
    for word in ("Needs:", "Run:", "Expect:"):
        assert word in header
    assert all(len(line) <= 130 for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.recipes) for name in STORIES]
)
def test_the_story_runs_in_its_pico_profile(name: str, tmp_path: Path) -> None:
    posttrain = Command(tmp_path / "home")
    ended = posttrain("run", name, "--profile", "pico", "--json")
    assert ended.code == 0, ended.err + ended.out
    steps = ended.json["steps"].values()
    # Two steps that are the same in this profile (deepseek-r1's teacher and student) are made once.
    made = [step["outputs"] for step in steps if step["outcome"] == "finished"]
    assert all(step["outputs"] in made for step in steps)
    first, last = FIRST_AND_LAST[name]
    metrics = scores(posttrain.home)
    accuracy = {name.rpartition("/")[0]: value for name, value in metrics.items() if name.endswith("/accuracy")}
    assert accuracy[last] > accuracy[first], accuracy
    assert metrics[f"{last}/p_value"] < 0.01, metrics
    if name == "tina":
        members = {member: value for member, value in accuracy.items() if member.startswith("rl[")}
        assert len(members) == 4
        best = posttrain.home / "artifacts" / ended.json["steps"]["best"]["outputs"][""]
        assert (
            members[json.loads((best / "choice.json").read_text())["chosen"]]
            == max(members.values())
            > accuracy["start"]
        )
    page = Path(ended.json["report"]).read_text(encoding="utf-8")
    assert len(accuracy) == STAGES[name]
    assert [stage for stage in accuracy if html.escape(stage) not in page] == []
    assert [stage for stage, value in accuracy.items() if f"{100 * value:.1f} %" not in page] == []


def scores(home: Path) -> dict[str, float]:
    """Read the metrics of a run's evaluation of tasks: `CANDIDATE/METRIC`."""
    for manifest in (home / "artifacts").glob("*/artifact.json"):
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["step"] == "evaluate.tasks":
            return content["facts"]["metrics"]
    raise AssertionError(f"no report of tasks in {home}")
