"""A run that is stopped, by Ctrl-C or because its Prefect server has gone, ends soon and in one sentence."""

import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows import servers
from steps.frame.launch import Launcher
from tests.flows.command import Command, kill_tree

LONG = """
name: long
base: {uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 1000000}
seed: 5
steps:
  data: {uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.2}
"""
SOON = 45
"""Seconds on a busy machine; Prefect's clients alone try for more than a minute to reach a server that is gone."""


@pytest.fixture
def long(tmp_path: Path) -> Command:
    """A command whose recipe `long.yaml` does not end by itself."""
    rows = "".join(f'{{"question": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "long.yaml").write_text(LONG)
    return Command(tmp_path / "home", tmp_path)


def stopped(command: Command, stop: Callable[[psutil.Process], None]) -> tuple[int, str, str]:
    """Run the recipe until its step works under Prefect, stop it, and return how it ended and what it printed."""
    out, err = command.cwd / "out.txt", command.cwd / "err.txt"
    with out.open("wb") as to_out, err.open("wb") as to_err:
        process = subprocess.Popen(
            command.line(["run", "long.yaml"]),
            cwd=command.cwd,
            env=command.environment,
            stdout=to_out,
            stderr=to_err,
            # A test run in the background ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 150
        while not ("base: started" in out.read_text() and command.launches().get("base")):
            assert process.poll() is None and time.monotonic() < deadline, out.read_text() + err.read_text()
            time.sleep(0.1)
        tree = psutil.Process(process.pid).children(recursive=True)
        stop(psutil.Process(process.pid))
        code = process.wait(SOON)
        assert psutil.wait_procs(tree, timeout=15)[1] == []
    finally:
        kill_tree(process.pid)
    return code, out.read_text(), err.read_text()


def interrupt(process: psutil.Process) -> None:
    process.send_signal(signal.SIGINT)


def kill_server(process: psutil.Process) -> None:
    (server,) = (child for child in process.children() if "uvicorn" in " ".join(child.cmdline()))
    server.kill()


@pytest.mark.slow
def test_ctrl_c_ends_a_run_soon_and_says_how_to_go_on(long: Command) -> None:
    code, out, err = stopped(long, interrupt)
    assert code == 130
    assert err == "stopped; run the same command again to go on\n"
    assert "fork server" not in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_run_whose_server_has_gone_ends_soon_in_one_sentence(long: Command) -> None:
    code, out, err = stopped(long, kill_server)
    assert code == 1
    why = r"error: the Prefect server at http://127\.0\.0\.1:\d+/api has gone; what had finished is kept, "
    assert re.fullmatch(why + "run the same command again to go on\n", err)
    assert "Traceback" not in out


def test_a_launcher_that_was_closed_starts_nothing_more(tmp_path: Path) -> None:
    launcher = Launcher([], tmp_path / "forkserver.log")
    launcher.close()
    launcher.warm_up()
    assert not (tmp_path / "forkserver.log").exists()


def test_a_server_that_listens_is_not_lost_however_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_ABSENCE", 0.2)
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as busy:
        url = f"http://127.0.0.1:{busy.getsockname()[1]}/api"
        with servers.watched(url, lost.set):
            assert not lost.wait(1.5), "it listens, though it answers nothing"
            busy.close()
            assert lost.wait(20)
