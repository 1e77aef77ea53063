"""The sandbox of answers: what hostile programs try, and that nothing of them is left."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from steps.lm.tasks import Rollout, Task
from steps.train.rewards import REWARDS, Scorer
from steps.train.rewards import _sandbox as sandbox
from tests.steps.hostile import ALWAYS_HELD, HELD_BY_THE_KERNEL, OUTSIDE


def run(program: str, seconds: float) -> sandbox.Outcome:
    return sandbox.run_confined("program", {"code": program, "input": ""}, sandbox.Limits(seconds))


def mentioning(text: str) -> list[Any]:
    """Processes anywhere on the machine with a text in their command line."""
    return [each for each in psutil.process_iter(["cmdline"]) if text in str(each.info["cmdline"])]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working directories of this test, by which its processes are known among others on the machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def leftovers(tmp_path: Path) -> list[Any]:
    """Programs of this test that are still alive."""
    return [each for each in mentioning(str(tmp_path)) if "_confined" in str(each.info["cmdline"])]


@pytest.mark.parametrize("attempt", ALWAYS_HELD)
def test_hostile_programs_are_held(attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    code, program = ALWAYS_HELD[attempt]
    began = time.monotonic()
    outcome = run(program, 1.0 if code == sandbox.TIMED_OUT else 10.0)
    assert outcome.code == code
    assert outcome.output == "held\n" or code != 0
    assert len(outcome.output) <= 8 << 20
    assert time.monotonic() - began < 9
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("attempt", HELD_BY_THE_KERNEL)
def test_hostile_programs_are_held_by_the_kernel(attempt: str, tmp_path: Path) -> None:
    guarantee, program = HELD_BY_THE_KERNEL[attempt]
    if guarantee not in sandbox.guarantees():
        pytest.skip(f"this machine cannot guarantee {guarantee}")
    outcome = run(program, 10.0)
    assert (outcome.code, outcome.output) == (0, "held\n")
    assert not OUTSIDE.exists()
    assert not leftovers(tmp_path)


def outside_namespaces(job: str, content: Any, folder: Path) -> str:
    """Run a job as in a container, as root without the right to make namespaces; return its first two lines."""
    order = sandbox._order(job, sandbox.Limits(20.0, memory_mb=4096), str(folder), verifier="json_schema")
    process = subprocess.Popen(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", *sandbox._command(order, packages=job == "verify")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=sandbox._environment(str(folder)),
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(content) + "\n")
    process.stdin.flush()
    if job != "verify":  # a server lives as long as somebody may ask it
        process.stdin.close()
    lines = process.stdout.readline() + process.stdout.readline()
    process.stdin.close()
    process.wait(timeout=10)
    return lines


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_without_namespaces_an_audit_hook_stands_in(tmp_path: Path) -> None:
    assert "network" not in json.loads(outside_namespaces("probe", {}, tmp_path))
    for attempt in ("socket.socket()", "subprocess.run(['true'])", "os.system('true')"):
        code = f"import os, socket, subprocess\ntry: {attempt}\nexcept PermissionError: print('held')"
        assert outside_namespaces("program", {"code": code, "input": ""}, tmp_path) == "held\n", attempt
    outside_namespaces("program", {"code": HELD_BY_THE_KERNEL["leave the group"][1], "input": ""}, tmp_path)
    assert not leftovers(tmp_path)
    answer = outside_namespaces("verify", [{"schema": {"type": "integer"}}, "7", 5], tmp_path)
    assert answer == "ready\n1.0\n"


def test_answers_run_beside_each_other() -> None:
    task = Task("1", (), "", "test", {"tests": ["assert True"]})
    scorer = Scorer(REWARDS["code"].spec.model_validate({"seconds": 1.5}))
    count = 2 * sandbox.cores()
    began = time.monotonic()
    assert scorer([Rollout(task, "while True: pass", 4)] * count) == [0] * count
    assert sandbox.cores() == 1 or time.monotonic() - began < 1.5 * count


def test_an_answer_that_cannot_be_confined_is_not_scored(tmp_path: Path) -> None:
    """Where confining fails, the answer is not blamed for it."""
    order = sandbox._order("program", sandbox.Limits(5.0), str(tmp_path / "absent"))
    ended = subprocess.run(sandbox._command(order, packages=False), input=b"{}", capture_output=True, check=False)
    assert ended.returncode == 125
    assert b"absent" in ended.stderr


def test_verifiers_end_with_who_asked_them(tmp_path: Path) -> None:
    """Also where that process is killed: a step ends without any of Python's own tidying."""
    program = (
        "import os, signal, sys\nfrom steps.train.rewards import _sandbox as sandbox\n"
        "assert sandbox.verified('json_schema', [({'schema': {}}, '1')], 5) == [1]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    patience = time.monotonic() + 10
    while (left := [*tmp_path.iterdir(), *mentioning(str(tmp_path))]) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left
