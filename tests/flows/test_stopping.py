"""A run that is stopped, by Ctrl-C or because its Prefect server has gone, ends soon and in one sentence."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import servers
from registry.home import Home
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


class Answers(BaseHTTPRequestHandler):
    """A proxy, or a server: answers whatever it is asked as it stands."""

    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def answering(code: int, port: int = 0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Answering", (Answers,), {"code": code}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def away(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


def test_a_server_behind_a_proxy_is_there_while_the_proxy_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_ABSENCE", 0.2)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    lost = threading.Event()
    for code in (200, 401, 502):
        proxy = answering(code)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        with servers.watched("http://prefect.corp.internal:4200/api", lost.set):
            assert lost.wait(20 if code == 502 else 1) == (code == 502)
        away(proxy)


def test_a_server_of_our_own_is_reached_past_a_proxy(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.LocalServer, "start", lambda server: None)
    proxy = answering(403)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.setenv("NO_PROXY", "intranet")
    own = answering(200)
    url = f"http://127.0.0.1:{own.server_port}/api"
    assert not servers.is_healthy(url)
    with servers.prefect_api(home):
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet,127.0.0.1"
        assert servers.is_healthy(url)
    away(own)
    away(proxy)


def test_a_server_of_others_on_loopback_may_be_away_and_one_of_our_own_that_has_ended_is_lost_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = threading.Event()
    asked = threading.Event()
    absent = servers._is_absent
    monkeypatch.setattr(servers, "_is_absent", lambda url: absent(url) and not asked.set())
    server = answering(200)
    url = f"http://127.0.0.1:{server.server_port}/api"
    with servers.watched(url, lost.set):
        away(server)
        assert asked.wait(20), "the tunnel is down"
        assert not lost.wait(1), "and may come back"
        server = answering(200, server.server_port)
    with servers.watched(url, lost.set, lambda: False):
        away(server)
        assert not lost.wait(1), "a server of our own is there for as long as its process is"
    with servers.watched(url, lost.set, lambda: True):
        assert lost.wait(20)
