"""Set-up where something was made before: by another that runs beside it, in another place, from other files."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.setup.__main__ import MADE_FROM
from tests.flows.command import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
import infra.setup.__main__ as set_up
def stand_in(stages):
    with open("order", "a") as order:
        order.write("in "); order.flush()
        while Path("hold").exists():
            time.sleep(0.02)
        order.write("out ")
set_up._set_up = stand_in
sys.exit(set_up.main())
"""
"""Set-up, all that takes long left out; it goes on for as long as a file `hold` is there."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without code: what `.venv` is made from, and the rule that says so."""
    for name in ("requirements.lock", "pyproject.toml", "Makefile", "infra/build.lock", "infra/deepspeed.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "infra" / "setup.sh").write_text("exit 1\n")
    return tmp_path


def set_up(checkout: Path) -> "subprocess.Popen[str]":
    """Start a set-up; return once it has said its first line."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(checkout / "cache")}
    command = [sys.executable, "-c", PROGRAM]
    started = subprocess.Popen(command, cwd=checkout, env=surroundings, stdout=subprocess.PIPE, text=True)
    assert started.stdout and started.stdout.readline().startswith("setting up")
    return started


def wait_for(path: Path, text: str) -> None:
    """Wait until a file has a text; the test's own time limit ends it."""
    while not path.exists() or path.read_text() != text:
        time.sleep(0.02)


def is_up_to_date(checkout: Path) -> bool:
    """Whether `make setup` has nothing to do."""
    return subprocess.run(["make", "-q", "setup"], cwd=checkout, capture_output=True).returncode == 0


def test_what_changes_while_set_up_runs_is_set_up_by_the_next(checkout: Path) -> None:
    (checkout / "hold").touch()
    running = set_up(checkout)
    wait_for(checkout / "order", "in ")
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# a pull came\n")
    (checkout / "hold").unlink()
    running.communicate()
    assert running.returncode == 0
    assert not is_up_to_date(checkout)
    set_up(checkout).communicate()
    assert is_up_to_date(checkout)


@pytest.mark.parametrize("changed", ["", "requirements.lock", "infra/deepspeed.lock"])
def test_of_two_set_ups_the_second_waits_and_does_only_what_the_first_did_not(checkout: Path, changed: str) -> None:
    (checkout / "hold").touch()
    first = set_up(checkout)
    wait_for(checkout / "order", "in ")
    second = set_up(checkout)
    assert second.stdout and "another set-up of this checkout runs" in second.stdout.readline()
    if changed:
        with (checkout / changed).open("a") as stream:
            stream.write("# another\n")
    (checkout / "hold").unlink()
    said = [first.communicate()[0], second.communicate()[0]]
    assert [first.returncode, second.returncode] == [0, 0]
    assert (checkout / "order").read_text() == ("in out in out " if changed else "in out ")
    assert said[0].startswith("ready ")
    assert said[1].startswith("ready " if changed else "the other one has made all of it")
    assert is_up_to_date(checkout)


def test_a_set_up_that_nobody_waited_for_does_everything_again(checkout: Path) -> None:
    for _ in range(2):
        set_up(checkout).communicate()
    assert (checkout / "order").read_text() == "in out in out "


def test_a_checkout_in_another_place_is_not_ready(checkout: Path) -> None:
    set_up(checkout).communicate()
    assert is_up_to_date(checkout)
    copy = checkout / "copy"
    for name in ("infra", ".venv"):
        shutil.copytree(checkout / name, copy / name)
    for name in ("requirements.lock", "pyproject.toml", "Makefile"):
        shutil.copy2(checkout / name, copy / name)
    assert not is_up_to_date(copy)


def test_the_makefile_names_what_the_environment_is_made_from() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    rule = next(line.partition(":")[2] for line in lines if line.startswith(".venv/.ready:"))
    assert tuple(re.sub(r"\$\(wildcard (.*)\)", r"\1", rule).split()) == MADE_FROM
