"""What set-up runs ends with it, even where it is killed and can end nothing itself."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.setup.stages import Stages
from tests.flows.command import ROOT
from tests.infra.test_setup import is_gone

PROGRAM = """
import sys
from pathlib import Path
import infra.setup.__main__ as set_up
def endless(stages):
    with stages.stage("endless") as log:
        log.{way}(["sh", "-c", "trap '' TERM HUP; sleep 600 & echo $$ $! > pids.partial; mv pids.partial pids; wait"])
set_up._set_up = endless
sys.exit(set_up.main())
"""
"""A set-up that runs a command with a child of its own, which for a build are ninja and a compiler."""


@pytest.mark.parametrize("way", ["run", "ask"])
def test_who_kills_set_up_ends_what_it_runs_and_only_then_may_another_begin(way: str, tmp_path: Path) -> None:
    for name in ("requirements.lock", "infra/build.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    running = subprocess.Popen([sys.executable, "-c", PROGRAM.format(way=way)], cwd=tmp_path, env=surroundings)
    while not (tmp_path / "pids").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.kill()
    running.wait()
    place = os.open(tmp_path, os.O_RDONLY)
    # As the next set-up would: this waits until nothing of the killed one can write any more.
    fcntl.flock(place, fcntl.LOCK_EX)
    os.close(place)
    for pid in (tmp_path / "pids").read_text().split():
        assert is_gone(int(pid))


def test_a_command_does_not_notice_its_guard(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    told = "import os, signal; print(os.listdir('/dev/fd'), signal.getsignal(15).name, os.environ['X'])"
    with stages.stage("asked") as log:
        log.run(["true"], X="1")
        done = log.ask([sys.executable, "-c", f"{told}; os.write(2, b'complaint'); exit(3)"], X="1")
        died = log.ask(["sh", "-c", "kill -9 $$"])
        piped = log.ask(["bash", "-c", "set -o pipefail; yes | head -n 1"])
        absent = log.ask(["nowhere-to-be-found"])
    assert (done.returncode, done.stdout) == (3, "['0', '1', '2', '3'] SIG_DFL 1\n")
    assert died.returncode == 128 + 9
    assert (piped.returncode, piped.stdout) == (128 + 13, "y\n"), "SIGPIPE ends who writes for nobody"
    assert absent.returncode == 127
    text = log.path.read_text()
    assert "complaint" in text and "nowhere-to-be-found: No such file or directory" in text


def test_the_lock_is_free_as_soon_as_set_up_has_ended_even_where_a_command_left_a_server_behind(tmp_path: Path) -> None:
    place = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_EX)
    stages = Stages(tmp_path / "logs", place)
    with stages.stage("a server") as log:
        log.run(["sh", "-c", f"setsid sleep 600 & echo $! > {tmp_path / 'pid'}"])
    os.close(place)
    try:
        again = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(again)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)
