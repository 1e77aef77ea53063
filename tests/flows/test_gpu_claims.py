"""GPUs of one machine, claimed by runs that know nothing of each other."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flows import gpu_claims
from flows.execution import Slots
from flows.gpu_claims import claim, release
from steps.frame import Resources
from steps.runtime import gpus
from steps.runtime.gpus import physical_name

HOLD = """
import sys, time
from flows.execution import Slots
from steps.frame import Resources
with Slots(2, ["0", "1"]).taken(Resources(cpus=1, gpus=1)) as devices:
    print(*devices, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that meet no real run's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def holder() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def granted(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_two_runs_get_two_gpus_and_a_third_waits_for_a_dead_one() -> None:
    first, second = holder(), holder()
    assert sorted([granted(first), granted(second)]) == ["0", "1"]
    assert claim(["0", "1"], 1) is None
    third = holder()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert granted(third) in ("0", "1")
    for each in (second, third):
        each.communicate("\n", timeout=30)
    both = claim(["0", "1"], 2)
    assert both and list(both) == ["0", "1"]
    release(both)


def test_too_few_are_none_and_none_is_kept() -> None:
    one = claim(["0", "1"], 1)
    assert one
    assert claim(["0", "1"], 2) is None
    other = claim(["0", "1"], 1)
    assert other and list(other) == ["1"]
    release(one)
    release(other)


def test_a_step_that_asks_for_none_waits_for_nobody() -> None:
    held = claim(["0"], 1)
    assert held
    with Slots(2, ["0"]).taken(Resources(cpus=1)) as devices:
        assert devices == ()
    release(held)


def test_a_gpu_has_one_lock_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "driver" / "gpus" / "0000:01:00.0" / "information"
    told.parent.mkdir(parents=True)
    told.write_text("Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-8f2ec0de-1111\nDevice Minor: \t 3\n")
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "driver")
    assert physical_name("GPU-8f2ec0de-1111") == physical_name("GPU-8f2e") == physical_name("3") == "3"
    assert physical_name("GPU-0000") == "GPU-0000"
    held = claim(["GPU-8f2ec0de-1111"], 1)
    assert held
    assert claim(["3"], 1) is None
    release(held)
    assert oct((tmp_path / gpu_claims._FOLDER).stat().st_mode)[-4:] == "1777"
