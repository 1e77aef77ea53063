"""The command line as a user runs it: in a process of its own, with a home of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


class Command:
    """`posttrain` with its home."""

    def __init__(self, home: Path, cwd: Path = ROOT) -> None:
        self.home = home
        self.cwd = cwd
        dropped = {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"}
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment = {**kept, "POSTTRAIN_HOME": str(home), "PYTHONPATH": str(ROOT)}

    def __call__(self, *arguments: str) -> Ended:
        """Run to the end."""
        done = subprocess.run(self.line(arguments), cwd=self.cwd, env=self.environment, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    def line(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line."""
        return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]

    def run_and_kill(self, when: Callable[[], bool], *arguments: str, patience: float = 240) -> None:
        """Start it, wait for a moment, then SIGKILL the whole tree at once, servers and steps included."""
        log = (self.home.parent / f"{self.home.name}-killed.log").open("ab")
        process = subprocess.Popen(
            self.line(arguments), cwd=self.cwd, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + patience
        try:
            while not when():
                assert process.poll() is None, "it ended before the moment came"
                assert time.monotonic() < deadline, "the moment did not come"
                time.sleep(0.002)
        finally:
            kill_tree(process.pid)
            process.wait()
            log.close()

    def work(self, name: str) -> Path | None:
        """Return the work directory of a step of the recipe, once it has one."""
        for spec in (self.home / "work").glob("*/spec.json"):
            try:
                if json.loads(spec.read_text())["name"] == name:
                    return spec.parent
            except ValueError:
                continue
        return None

    def launches(self) -> dict[str, int]:
        """How often each step's function was started, by name."""
        found = {}
        for spec in (self.home / "work").glob("*/spec.json"):
            log = spec.parent / "log.txt"
            text = log.read_text() if log.exists() else ""
            found[json.loads(spec.read_text())["name"]] = text.count("posttrain.frame: begins:")
        return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it, parents first so that nobody cleans up."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=20)
