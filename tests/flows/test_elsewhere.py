"""What one machine made, another publishes and goes on from: a real MLflow server on loopback, and two homes."""

import hashlib
import itertools
import re
from pathlib import Path

import pytest

from flows.execution import Execution
from flows.plan import PlannedStep
from flows.prepare import plan_recipe
from flows.publication import Publication, is_current, publish_release
from registry.errors import Lost
from registry.family import publish, rollback
from registry.gates import GateDecision
from registry.home import Home
from registry.pull import pull
from steps.artifacts import MANIFEST_NAME
from tests.flows.test_publication import BOUND, NOT_WORSE, Nights, found
from tests.registry.conftest import migrated  # noqa: F401 - a fixture
from tests.registry.test_server import server, server_root  # noqa: F401 - fixtures
from tests.registry.workshop import Workshop

_SEEDS = itertools.count(1)
"""All tests share a server: each has steps of its own."""


def lose(server_root: Path, step: PlannedStep, output: str, *names: str) -> str:  # noqa: F811
    """Remove an output's files from the server, all of them or those of these names; return its digest."""
    assert step.entry
    digest = step.entry.outputs[output]
    for manifest in list((server_root / "artifacts").rglob(MANIFEST_NAME)):
        if hashlib.sha256(manifest.read_bytes()).hexdigest() == digest:
            for path in [manifest.parent / name for name in names] or manifest.parent.iterdir():
                path.unlink(missing_ok=True)
    return digest


class Machines:
    """The one has run the recipe's steps and published nothing; the other has an empty home."""

    def __init__(self, one: Nights, other: Nights) -> None:
        self.one = one
        self.other = other
        self.recipe = one.recipe(BOUND, "sft, gguf", next(_SEEDS), "Q8_0")
        one.run(self.recipe, {})

    def publish(self) -> Publication:
        """Publish on the other machine what all is made."""
        execution = self.plan()
        for name in execution.plan.steps:
            execution.run(name)
        publication = publish_release(execution)
        execution.close(ok=True)
        return publication

    def plan(self) -> Execution:
        """Plan on the other machine, every byte of what it has looked at."""
        return self.other.plan(self.recipe, thorough=True)


@pytest.fixture
def machines(
    server: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machines:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    one, other = (Nights(Home.at(tmp_path / name, server), tmp_path) for name in ("one", "other"))
    return Machines(one, other)


def test_what_was_all_made_elsewhere_is_published_fetched_in_part_and_mended(machines: Machines) -> None:
    home = machines.other.home
    execution = machines.plan()
    assert {(step.status, step.reason) for step in execution.plan.steps.values()} == {("cached", "made elsewhere")}
    assert not is_current(execution), "there is no such family yet"
    assert {execution.run(name).outcome for name in execution.plan.steps} == {"cached"}
    release = found(publish_release(execution))
    execution.close(ok=True)
    assert [member.role for member in release.members] == ["sft", "gguf[Q8_0]"]
    assert not any(home.store.has(member.digest) for member in release.members), "nobody asked for their bytes"
    assert machines.other.champion == release.version

    data = execution.plan.steps["data"].entry
    assert data
    here = data.outputs["eval"]
    execution.recorder.fetch(here, data)
    assert {step.status for step in machines.plan().plan.steps.values()} == {"cached"}

    damaged = home.store.path(here) / "model.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    execution = machines.plan()
    assert not execution.plan.todo
    assert "the server has it" in execution.plan.steps["data"].reason
    assert execution.run("data").outcome == "cached"
    assert home.store.fault(here) is None
    assert not home.store.has(data.outputs["train"])


def test_what_is_lost_here_and_on_the_server_is_made_again_where_it_is_needed(
    machines: Machines,
    server_root: Path,  # noqa: F811
) -> None:
    planned = machines.plan().plan.steps
    lose(server_root, planned["data"], "eval")
    base = lose(server_root, planned["base"], "", "model.safetensors")
    assert {step.status for step in machines.plan().plan.steps.values()} == {"cached"}, "nothing needs them"

    # Another report on the same models needs the rows, and those that make the rows need the base.
    text = machines.recipe.read_text(encoding="utf-8")
    fewer = re.sub(r"data: data\.eval, rows: \d+", "data: data.eval, rows: 7", text)
    assert fewer != text
    machines.recipe.write_text(fewer, encoding="utf-8")
    execution = machines.plan()
    steps = execution.plan.steps
    assert {name: step.status for name, step in steps.items()} == {
        "base": "run",
        "data": "run",
        "sft": "cached",
        "gguf[Q8_0]": "cached",
        "quality": "run",
    }
    assert "made before, but `artifact.json` cannot be fetched from http" in steps["data"].reason
    assert "(the server answers 404 Not Found)" in steps["data"].reason
    assert steps["base"].reason.startswith(
        f"made before, but MLflow no longer holds `model.safetensors` of artifact {base[:12]}"
    )
    assert all("\n" not in step.reason for step in steps.values())
    lost = planned["base"].entry
    assert lost
    with pytest.raises(Lost, match=r"`model\.safetensors` cannot be fetched from http.*404 Not Found\)$"):
        execution.recorder.fetch(base, lost)

    assert execution.run("base").outcome == "finished", "not taken for one that was made meanwhile"
    execution.close(ok=True)
    made = execution.states["base"].entry
    assert made and not execution.recorder.lost(made.outputs[""], made), "the server has it again"
    assert machines.plan().plan.steps["base"].status == "cached"


def test_a_champion_that_moves_while_a_run_waits_is_taken_as_it_was_planned(
    server: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    one, other = Workshop(Home.at(tmp_path / "one", server)), Home.at(tmp_path / "other", server)

    def release(seed: bytes) -> str:
        execution = one.begin("moving")
        model = one.model(seed)
        members = [("m", model.digest, execution.record(one.step("m", model)))]
        publish(execution, "moving", members, GateDecision(promote=True, sentence="Promoted."))
        execution.finish()
        return model.digest

    first = release(b"first")
    recipe = tmp_path / "goes-on.yaml"
    recipe.write_text(
        "name: goes-on\nbase: registry://moving\nsteps:\n  q: {uses: quantize.gguf, model: base, scheme: F16}\n",
        encoding="utf-8",
    )
    execution = Execution(plan_recipe(str(recipe), (), thorough=False, home=other), other, 1)
    assert release(b"second") != first
    # What the step then says of weights that are made up does not matter here.
    execution.run("base")
    execution.close(ok=False)
    assert other.store.has(first)


def test_a_member_that_the_server_lost_is_made_or_given_again_before_it_is_published(
    machines: Machines,
    server_root: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    old = machines.plan().plan.steps["sft"]
    digest = lose(server_root, old, "", "model.safetensors")
    lose(server_root, machines.plan().plan.steps["gguf[Q8_0]"], "", MANIFEST_NAME)
    planned = machines.plan().plan.steps
    assert {name: step.status for name, step in planned.items() if step.status != "cached"} == {
        "sft": "run",
        "gguf[Q8_0]": "run",
    }
    assert planned["sft"].reason.startswith("made before, but MLflow no longer holds `model.safetensors` of artifact")

    # The machine that made them gives them again, in their place.
    execution = machines.one.plan(machines.recipe, thorough=True)
    assert {step.status for step in execution.plan.todo} == {"record"}
    assert "it is here, and given again" in execution.plan.steps["sft"].reason
    assert {execution.run(name).outcome for name in execution.plan.steps} == {"cached", "finished"}
    execution.close(ok=True)
    assert machines.plan().plan.steps["sft"].entry == old.entry
    assert not machines.plan().plan.todo

    # What was made again in another run is found by who has the older one in the index.
    assert old.entry
    machines.other.workshop.recorder.tracking.client.delete_logged_model(old.entry.models[""])
    execution = machines.one.plan(machines.recipe, thorough=True)
    assert [step.name for step in execution.plan.todo] == ["sft"]
    assert {execution.run(name).outcome for name in execution.plan.steps} == {"cached", "finished"}
    execution.close(ok=True)
    new = machines.plan().plan.steps["sft"]
    assert new.status == "cached" and new.entry and new.entry.run_id != old.entry.run_id
    release = found(machines.publish())
    assert release.members[0].model_id == new.entry.models[""]
    assert pull(machines.other.home, "nights", "hf", tmp_path / "pulled").digest == digest


def test_a_champion_that_is_lost_blocks_the_night_and_says_what_to_do(
    machines: Machines,
    server_root: Path,  # noqa: F811
) -> None:
    for _ in range(2):
        machines.recipe = machines.one.recipe(BOUND, "sft, gguf", next(_SEEDS), "Q8_0")
        machines.one.run(machines.recipe, {})
        machines.publish()
    lost = machines.plan().plan.steps["sft"]
    machines.recipe = machines.one.recipe(NOT_WORSE, "sft, gguf", next(_SEEDS), "Q8_0")
    assert machines.plan().plan.steps["champion"].status == "run"
    lose(server_root, lost, "", "model.safetensors")
    step = machines.plan().plan.steps["champion"]
    assert step.status == "blocked"
    assert "MLflow no longer holds `model.safetensors` of artifact" in step.reason
    assert step.reason.endswith("; `posttrain rollback nights` makes the release before it champion")
    assert machines.one.plan(machines.recipe).plan.steps["champion"].status == "run", "it is here"
    rollback(machines.other.workshop.recorder, "nights")
    assert machines.plan().plan.steps["champion"].status == "run"
