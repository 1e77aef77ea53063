"""GPUs of one machine, claimed by runs that know nothing of each other."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import gpu_claims
from flows.execution import Slots
from flows.gpu_claims import claim, release
from steps.frame import Resources
from steps.runtime import gpus
from steps.runtime.gpus import physical_name

HOLD = """
import sys
from pathlib import Path
from flows import gpu_claims
from flows.execution import Slots
from steps.frame import Resources
gpu_claims._FOLDERS = (Path(sys.argv[1]),)
with Slots(2, ["0", "1"]).taken(Resources(cpus=1, gpus=1)) as devices:
    print(*devices, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that meet no real run's."""
    monkeypatch.setattr(gpu_claims, "_FOLDERS", (tmp_path / "gpus",))


def holder(**more: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-c", HOLD, str(gpu_claims._FOLDERS[0])]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **more})


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
    assert oct(gpu_claims._FOLDERS[0].stat().st_mode)[-4:] == "1777"


def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *minors: int, models: tuple[str, ...] = ()) -> None:
    """A container with these GPUs of its machine, as the driver tells them; their addresses go by their numbers."""
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    for place, minor in enumerate(minors):
        told = tmp_path / "driver" / "gpus" / f"0000:{minor:02x}:00.0" / "information"
        told.parent.mkdir(parents=True)
        model = models[place] if models else "NVIDIA H100"
        told.write_text(f"Model: \t\t {model}\nGPU UUID: \t GPU-{minor}f2ec0de-1111\nDevice Minor: \t {minor}\n")
        (tmp_path / "dev" / f"nvidia{minor}").touch()


def test_a_gpu_of_a_container_has_its_machines_lock_by_number_as_by_uuid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(tmp_path, monkeypatch, 4, 7)
    assert [physical_name(name) for name in ("0", "1", "GPU-4", "GPU-7f2ec0de-1111")] == ["4", "7", "4", "7"]
    held = claim(["1"], 1)
    assert held
    assert claim(["GPU-7f2ec0de"], 1) is None
    release(held)


def test_the_number_of_a_gpu_among_several_models_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(tmp_path, monkeypatch, 4, 7, models=("NVIDIA T4", "NVIDIA H100"))
    assert physical_name("0") == "0", "CUDA counts the fastest first"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert physical_name("0") == "4"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("GPU-4f2e,GPU-7", ["GPU-4f2e", "GPU-7"]),
        ("GPU-7,GPU-5,GPU-4", ["GPU-7"]),
        ("GPU-4f2e,GPU-4f2ec0de-1111", []),
        ("MIG-1,MIG-2", ["MIG-1", "MIG-2"]),
        ("1,4", ["1"]),
    ],
)
def test_a_list_ends_before_a_gpu_that_is_not_there_and_names_none_twice(
    chosen: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(tmp_path, monkeypatch, 4, 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.gpus() == names


def test_the_locks_lie_in_one_place_whatever_the_environment_says(tmp_path: Path) -> None:
    program = "from flows import gpu_claims; print(*gpu_claims._FOLDERS)"
    places = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        environment = {**os.environ, "TMPDIR": str(tmp_path / name), "XDG_RUNTIME_DIR": str(tmp_path / name)}
        line = [sys.executable, "-c", program]
        places.add(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert places == {"/tmp/posttrain-gpus /dev/shm/posttrain-gpus /var/lock/posttrain-gpus"}


def test_two_runs_with_temporary_folders_of_their_own_get_two_gpus(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = (holder(TMPDIR=str(tmp_path / name)) for name in ("one", "two"))
    assert sorted([granted(first), granted(second)]) == ["0", "1"]
    for each in (first, second):
        each.communicate("\n", timeout=30)


def test_a_lock_is_made_once_and_opened_without_making_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux lets nobody open another user's file in such a folder with O_CREAT."""
    release(claim(["0"], 1) or {})
    flags: list[int] = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flag, *more: flags.append(flag) or opened(path, flag, *more))
    release(claim(["0"], 1) or {})
    assert flags == [os.O_RDWR]


def test_a_lock_that_cannot_be_opened_is_one_sentence() -> None:
    gpu_claims._FOLDERS[0].write_text("a file in the folder's place")
    with pytest.raises(OSError, match="the lock of GPU 0 cannot be opened"):
        claim(["0"], 1)


def test_a_claim_leaves_the_umask_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other threads write meanwhile would be open to all."""
    looked: list[int] = []
    monkeypatch.setattr(os, "umask", looked.append)
    release(claim(["0"], 1) or {})
    assert not looked
    (lock,) = gpu_claims._FOLDERS[0].iterdir()
    assert oct(lock.stat().st_mode)[-4:] == "0666"


def test_locks_lie_in_the_first_place_that_can_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = tmp_path / "nowhere" / "gpus", tmp_path / "second", tmp_path / "third"
    monkeypatch.setattr(gpu_claims, "_FOLDERS", places)
    release(claim(["0"], 1) or {})
    assert [place.is_dir() for place in places] == [False, True, False]
    # Whoever can make the first later still looks where the others do.
    places[0].parent.mkdir()
    release(claim(["0"], 1) or {})
    assert [place.is_dir() for place in places] == [False, True, False]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("0, 1", ["0", "1"]),
        (" 1 ,00", ["1", "0"]),
        ("GPU-8f2e , GPU-1", ["GPU-8f2e", "GPU-1"]),
        ("GPU-8f2e,1", ["GPU-8f2e"]),
        ("0,-1,1", ["0"]),
        ("0,GPU-8f2e", ["0"]),
        ("1st,+0,x", ["1", "0"]),
        ("0,5,1", ["0"]),
        ("7", []),
        ("0,0", []),
        ("1,5,01", []),
        ("GPU-8f2e,GPU-8f2e", []),
        ("", []),
        ("-1", []),
    ],
)
def test_a_gpu_has_one_name_however_the_list_is_written(
    chosen: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "device_files", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.gpus() == names
