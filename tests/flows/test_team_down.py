"""`down`: whatever the home is called, what it started is stopped, and what cannot be stopped is not forgotten."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.team import processes
from flows.team.down import down, stop
from flows.team.state import WORKER, Running, Team, state_file
from registry.home import Home
from steps.frame import UserError

WITH_CHILD = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={}); time.sleep(600)"
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home whose team is a worker with a child that does not carry the home's mark."""
    home = Home.at(tmp_path / "home")
    running = processes.start([sys.executable, "-c", WITH_CHILD], {}, home, tmp_path / "log")
    while len(processes.tree([running])) < 2:
        assert running.alive
    Team(root=tmp_path, services={WORKER: running}).write(home)
    everything = processes.tree([running])
    yield home
    for process in everything:
        if process.is_running():
            process.kill()


def team(home: Home) -> Team:
    found = Team.read(home)
    assert found
    return found


def test_down_by_another_name_of_the_home_stops_everything(home: Home, tmp_path: Path) -> None:
    everything = processes.tree(team(home).services.values())
    (tmp_path / "link").symlink_to(home.root)
    down(Home.at(tmp_path / "link"))
    assert not any(process.is_running() for process in everything)
    assert not state_file(home).exists()


def test_what_was_started_by_another_name_is_found(home: Home, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home.root)
    environment = {processes.MARK: str(tmp_path / "link")}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment) as process:
        try:
            assert process.pid in {each.pid for each in processes.members(home)}
        finally:
            process.kill()


def test_a_moved_home_is_stopped_by_its_state_file(home: Home, tmp_path: Path) -> None:
    everything = processes.tree(team(home).services.values())
    home.root.rename(tmp_path / "moved")
    down(Home.at(tmp_path / "moved"))
    assert not any(process.is_running() for process in everything)


def test_what_may_not_be_stopped_is_said_and_not_forgotten(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process, _: int) -> None:
        raise psutil.AccessDenied(process.pid)

    worker = team(home).services[WORKER]
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "send_signal", denied)
        patch.setattr(processes, "_PATIENCE", 0.1)
        patch.setattr("flows.team.down._GRACE", 0.1)
        with pytest.raises(UserError, match=f"may not be stopped by this user: .*{worker.pid}"):
            down(home)
    assert team(home).services == {WORKER: worker}
    assert worker.alive
    stop(home)
    assert not worker.alive


def test_a_process_that_came_later_under_the_same_id_is_left_alone(home: Home) -> None:
    worker = team(home).services[WORKER]
    other = Running(pid=worker.pid, created=worker.created - 1, log=worker.log)
    assert processes.tree([other]) == set()


def test_runs_of_others_on_a_server_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket, time; kept = socket.create_connection(('127.0.0.1', {port})); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", code, "run", "a recipe.yaml"]) as process:
            try:
                connection, _ = server.accept()
                assert processes.runs_on(f"http://127.0.0.1:{port}") == ["run 'a recipe.yaml'"]
                connection.close()
            finally:
                process.kill()
        assert processes.runs_on("") == []
