"""What one machine made, another publishes and goes on from: a real MLflow server on loopback, and two homes."""

from pathlib import Path

import pytest

from flows.execution import Execution
from flows.publication import publish_release
from registry.home import Home
from tests.flows.test_publication import BOUND, Nights, found
from tests.registry.conftest import migrated  # noqa: F401 - a fixture
from tests.registry.test_server import server, server_root  # noqa: F401 - fixtures


class Machines:
    """The one has run the recipe's steps and published nothing; the other has an empty home."""

    def __init__(self, one: Nights, other: Nights) -> None:
        self.one = one
        self.other = other
        self.recipe = one.recipe(BOUND, "sft, gguf", 1, "Q8_0")
        one.run(self.recipe, {})

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
