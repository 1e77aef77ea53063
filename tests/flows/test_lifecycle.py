"""The pico recipe through the real command line, Prefect and MLflow: cached, changed, damaged, killed."""

import json
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Store
from tests.flows.command import Command

# The whole graph of the pico recipe, a little smaller.
SMALLER = (
    "--set=base.pretrain_steps=20",
    "--set=steps.sft.max_steps=24",
    "--set=steps.sft.checkpoint_steps=4",
    "--set=steps.quality.rows=12",
    "--set=steps.quality.generate_rows=4",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, dict[str, Any]]:
    """A home in which the recipe ran once, and what the run said."""
    command = Command(tmp_path_factory.mktemp("undisturbed") / "home")
    ended = command("run", "pico", *SMALLER, "--json")
    assert ended.code == 0, ended.err
    return command, ended.json


def outputs(summary: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {name: step["outputs"] for name, step in summary["steps"].items()}


def outcomes(summary: dict[str, Any]) -> dict[str, str]:
    return {name: step["outcome"] for name, step in summary["steps"].items()}


def test_run_publishes_the_family(undisturbed: tuple[Command, dict[str, Any]]) -> None:
    command, summary = undisturbed
    assert set(outcomes(summary).values()) == {"finished"}
    family = command("show", "pico", "--json").json
    assert {member["selector"] for member in family["releases"][0]["members"]} == {
        "hf", "adapter", "gguf:Q4_K_M", "gguf:Q8_0", "gptq-int4", "package",
    }  # fmt: skip
    assert family["aliases"]["champion"] == family["releases"][0]["version"]
    assert Path(summary["report"]).read_text().count("<svg") > 2


def test_second_run_does_nothing(undisturbed: tuple[Command, dict[str, Any]]) -> None:
    command, first = undisturbed
    server_log = command.home / "prefect" / "server.log"
    before, launched = server_log.stat().st_mtime_ns, command.launches()
    summary = command("run", "pico", *SMALLER, "--json").json
    assert set(outcomes(summary).values()) == {"cached"}
    assert outputs(summary) == outputs(first)
    assert (summary["notes"], summary["report"]) == (first["notes"], first["report"])
    assert command.launches() == launched
    assert server_log.stat().st_mtime_ns == before, "a server was started for nothing"


def test_a_changed_parameter_runs_its_branch_only(undisturbed: tuple[Command, dict[str, Any]]) -> None:
    plan = undisturbed[0]("plan", "pico", *SMALLER, "--set=steps.gptq.group_size=32", "--json").json
    status = {step["step"]: step["status"] for step in plan["steps"]}
    assert {name for name, each in status.items() if each != "cached"} == {"gptq", "quality", "bundle"}
    predicted = {step["step"]: step["predicted"] for step in plan["steps"]}
    assert predicted["gptq"] is None, "nothing like it ever ran"
    assert predicted["sft"]["seconds"] > 0


def test_a_flipped_bit_is_found_and_the_artifact_made_again(undisturbed: tuple[Command, dict[str, Any]]) -> None:
    command, first = undisturbed
    digest = first["steps"]["gguf[Q8_0]"]["outputs"][""]
    store = Store(command.home / "artifacts")
    file = store.path(digest) / "model-Q8_0.gguf"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(damaged)
    assert store.fault(digest) == "model-Q8_0.gguf was changed"
    summary = command("run", "pico", *SMALLER, "--json").json
    # The package holds the same file by a link, so it was damaged with it.
    made = {name for name, outcome in outcomes(summary).items() if outcome == "finished"}
    assert made == {"gguf[Q8_0]", "bundle"}
    assert set(outcomes(summary).values()) == {"finished", "cached"}
    assert store.fault(digest) is None
    assert outputs(summary) == outputs(first)


def test_killed_in_training_in_quantization_and_before_the_record(undisturbed: Any, tmp_path: Path) -> None:
    """SIGKILL of the whole tree at three moments of one home; it ends in the same digests, no finished step again."""
    command = Command(tmp_path / "home")
    arguments = ("run", "pico", *SMALLER, "--json")

    def training() -> bool:
        work = command.work("sft")
        return work is not None and any((work / "scratch" / "checkpoints").glob("checkpoint-*/trainer_state.json"))

    def quantizing() -> bool:
        work = command.work("gptq")
        return work is not None and (work / "log.txt").exists() and (work / "log.txt").stat().st_size > 200

    def made_but_not_recorded() -> bool:
        work = command.work("quality")
        if work is None or not (work / "result.json").exists():
            return False
        key = json.loads((work / "spec.json").read_text())["key"]
        return not (command.home / "index" / "keys" / f"{key}.json").exists()

    finished: dict[str, int] = {}
    for moment in (training, quantizing, made_but_not_recorded):
        command.run_and_kill(moment, *arguments)
        for name, count in finished.items():
            assert command.launches()[name] == count, f"{name} had finished and ran again"
        finished |= {name: command.launches()[name] for name in recorded(command)}
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    assert outputs(ended.json) == outputs(undisturbed[1])
    launches = command.launches()
    assert launches["quality"] == 1, "a finished step ran again because its record was lost"
    assert launches["sft"] == 2
    log = command.work("sft")
    assert log is not None
    assert "resuming from checkpoint-" in (log / "log.txt").read_text()


def recorded(command: Command) -> list[str]:
    return [json.loads(path.read_text())["step"] for path in (command.home / "index" / "keys").glob("*.json")]
