"""A recording and publishing process that is killed: what is there is whole, and the next call completes the rest."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from registry.family import load, publish
from registry.home import Home
from registry.record import Recorder
from tests.registry.recording_process import YES, record
from tests.registry.workshop import Workshop

LAST_COMMIT = 120
"""A child that nobody kills commits about this often, see the test that says so."""

Kill = Callable[[Home, int], int]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    """Run the work in a child that is killed before its n-th database commit; return its exit code."""
    command = [sys.executable, "-m", "tests.registry.recording_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def run(home: Home, commits: int) -> int:
            print(f"{commits} {home.root}", file=stdin, flush=True)
            return int(stdout.readline())

        yield run
        stdin.close()


def test_the_kills_reach_from_the_first_to_the_last_commit(home: Home, kill: Kill) -> None:
    assert kill(home, LAST_COMMIT + 20) == 0
    assert load(home, "pico").aliases["champion"]


@pytest.mark.parametrize("commits", range(3, LAST_COMMIT + 1, 9))
def test_a_killed_process_loses_nothing_and_is_completed(workshop: Workshop, kill: Kill, commits: int) -> None:
    assert kill(workshop.home, commits) == -signal.SIGKILL
    before = {entry.key: entry for entry in Recorder(workshop.home).index.entries()}

    execution = workshop.begin()
    members = record(workshop, execution)
    release = publish(execution, "pico", members, YES)
    execution.finish()

    tracking = workshop.recorder.tracking
    runs = list(tracking.runs("tags.`posttrain.role` = 'step'"))
    assert sorted(run.info.run_id for run in runs) == sorted(entry.run_id for _, _, entry in members)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.status for run in tracking.runs("tags.`posttrain.role` = 'execution'")} <= {"KILLED", "FINISHED"}
    for _, digest, entry in members:
        assert before.get(entry.key, entry) == entry, "a step that was recorded is not recorded twice"
        assert len(tracking.client.get_metric_history(entry.run_id, "loss")) == 1500
        for path in workshop.home.store.path(digest).rglob("*"):
            links = 3 if path.name == "artifact.json" else 2  # the manifest lies in the run and with the model
            assert path.is_dir() or path.stat().st_nlink == links, "no link is missing, none is left of the killed"
    assert not list((workshop.home.index / "pending").iterdir())

    versions = tracking.client.search_model_versions("name = 'pico'")
    assert sorted(version.tags["posttrain.selector"] for version in versions) == ["gguf:Q4_K_M", "gguf:Q8_0", "hf"]
    assert set(release.aliases) == {"candidate", "champion"}
    assert load(workshop.home, "pico").releases == (release,)
