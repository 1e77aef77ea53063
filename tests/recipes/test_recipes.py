"""The recipes that ship: each is whole as it stands, and each runs from its data to its score in its pico profile."""

import html
import json
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build_graph
from flows.prepare import recipe_path
from flows.recipe import load_recipe
from steps.frame.config import choices_of
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
    "tina": 2,
    "verifier-and-generator": 3,
}
"""How many models each story scores; a matrix counts each of its members."""
MEMBERS = [f"rl[{rank},{loss}]" for rank in (4, 16) for loss in ("grpo", "dr_grpo")]
"""What Tina's matrix runs through in its pico profile."""
EXAMS = {"dpo": "quality", "tina": "verdict"}
"""The step that holds the exam, where it is not `score`."""
FIRST_AND_LAST = {
    "deepseek-r1": ("start", "policy"),
    "dpo": ("start", "dpo[2]"),
    "instructgpt": ("sft", "policy"),
    "minimax-cispo": ("start", "rl[cispo]"),
    "prover-expert-iteration": ("start", "policy"),
    "qwen3-four-stage": ("start", "final"),
    "tina": ("start", "tuned"),
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


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("profile", ["", "pico"])
def test_what_is_quoted_is_measured_on_rows_that_no_choice_saw(name: str, profile: str) -> None:
    """Every report on models, but for those by which one is chosen."""
    loaded = load_recipe(recipe_path(name), profile="" if "profiles:" not in recipe_path(name).read_text() else profile)
    with elsewhere():
        nodes = build_graph(loaded).nodes
    deciding = {str(node.edges["report"][0]) for node in nodes.values() if node.kind.name == "evaluate.best"}

    def choosers(step: str, seen: set[str]) -> set[str]:
        """The rows by which a step or one before it chose."""
        if step in seen:
            return set()
        seen.add(step)
        node = nodes[step]
        found = {str(ref) for field in choices_of(node.kind.config) for ref in node.edges.get(field, ())}
        # A choice by a report is one by the rows that it is about.
        rows = {str(ref) for name in found & deciding for ref in nodes[name].edges["data"]}
        parents = [ref.step for refs in node.edges.values() for ref in refs]
        return (found - deciding) | rows | {each for parent in parents for each in choosers(parent, seen)}

    for node in nodes.values():
        if node.kind.name.startswith("evaluate.") and "data" in node.edges and node.name not in deciding:
            (rows,) = node.edges["data"]
            models = [ref.step for field in ("candidates", "reference") for ref in node.edges.get(field, ())]
            assert str(rows) not in {each for model in models for each in choosers(model, set())}, node.name


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
    # What a mixture leaves out by its shares is the story's own; nothing else is noted, of the exam above all.
    notes = [note for note in ended.json["notes"] if "by their shares these rows are left out" not in note]
    assert [note for note in notes if name != "tina" or not note.startswith("score: ")] == []
    first, last = FIRST_AND_LAST[name]
    metrics = scores(ended.json["steps"][EXAMS.get(name, "score")], posttrain.home)
    accuracy = {name.rpartition("/")[0]: value for name, value in metrics.items() if name.endswith("/accuracy")}
    assert accuracy[last] > accuracy[first], accuracy
    assert metrics[f"{last}/p_value"] < 0.01, metrics
    if name == "tina":
        looked = scores(ended.json["steps"]["score"], posttrain.home)
        members = {member: looked[f"{member}/accuracy"] for member in MEMBERS}
        best = posttrain.home / "artifacts" / ended.json["steps"]["best"]["outputs"][""]
        assert (
            members[json.loads((best / "choice.json").read_text())["chosen"]]
            == max(members.values())
            > looked["start/accuracy"]
        )
    page = Path(ended.json["report"]).read_text(encoding="utf-8")
    assert len(accuracy) == STAGES[name]
    assert [stage for stage in accuracy if html.escape(stage) not in page] == []
    assert [stage for stage, value in accuracy.items() if f"{100 * value:.1f} %" not in page] == []


def scores(step: dict[str, Any], home: Path) -> dict[str, float]:
    """Read the metrics of an evaluation of tasks: `CANDIDATE/METRIC`."""
    manifest = home / "artifacts" / step["outputs"][""] / "artifact.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["facts"]["metrics"]
