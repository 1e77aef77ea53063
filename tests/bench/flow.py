"""The flow beside a plain script, the commands that people wait for, and the store beside `cp`."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from steps.artifacts import Manifest, Store, digest_tree
from tests.flows.command import ROOT, Command

T = TypeVar("T")
_GIGABYTE = 1 << 30


def add_flow(recipe: str, root: Path, table: Table) -> None:
    """Run the recipe as a plain script and through the flow; compare wall time and the cost of each step."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.bench.plain", recipe, str(root / "plain")]
    plain_seconds, done = _timed(
        lambda: subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    posttrain = Command(root / "home")
    if (root / "plain" / "cache").exists():
        shutil.copytree(root / "plain" / "cache", posttrain.home / "cache")
    flow_seconds, ended = _timed(lambda: posttrain("run", recipe, "--json"))
    assert ended.code == 0, ended.err
    table.add_row(
        "whole recipe",
        f"{flow_seconds:.1f} s",
        f"{plain_seconds:.1f} s",
        f"{flow_seconds / plain_seconds:.3f} x (goal 1.01 x)",
    )
    steps = ended.json["steps"]
    own = _own_seconds(posttrain.home, steps)
    table.add_row("overhead of a step, median", f"{statistics.median(own.values()):.2f} s", "", "goal under 1 s")
    first = max(own, key=lambda name: own[name])
    table.add_row("  largest (waits for the imports of all)", f"{own[first]:.2f} s", "", first)
    for name, seconds in plain.items():
        table.add_row(f"  {name}", f"{steps[name]['seconds']:.1f} s", f"{seconds:.1f} s", "")


def _own_seconds(home: Path, steps: Mapping[str, Any]) -> dict[str, float]:
    """Return for each step what it took beyond its own function: start, inputs, digests, publishing, record."""
    own = {}
    for path in (home / "work").glob("*/result.json"):
        result = json.loads(path.read_text())
        name = json.loads((path.parent / "spec.json").read_text())["name"]
        own[name] = steps[name]["seconds"] - result["seconds"] + result["load_seconds"]
    return own


def add_commands(recipe: str, posttrain: Command, table: Table) -> None:
    """Time the commands that people wait for."""
    bare, _ = _timed(lambda: subprocess.run([sys.executable, "-c", "import typer"], check=True))
    for arguments, goal in ((["--help"], 0.5), (["plan", recipe], 2.0), (["run", recipe], 3.0)):
        seconds, ended = _timed(lambda given=arguments: posttrain(*given))
        assert ended.code == 0, ended.err
        name = "run, all cached" if arguments[0] == "run" else arguments[0]
        table.add_row(
            f"posttrain {name}", f"{seconds:.2f} s", f"{bare:.2f} s (Python, typer)", f"goal under {goal:g} s"
        )


def add_store(root: Path, table: Table) -> None:
    """Digest and publish a gibibyte in eight files, beside `cp` of the same."""
    source = root / "artifacts" / "staging"
    source.mkdir(parents=True)
    for index in range(8):
        (source / f"{index}.safetensors").write_bytes(os.urandom(_GIGABYTE // 8))
    copied, _ = _timed(lambda: subprocess.run(["cp", "-r", str(source), str(root / "copy")], check=True))
    digested, tree = _timed(lambda: digest_tree(source))
    manifest = Manifest(
        kind="Report",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="bench",
        output="",
        key="bench",
        config={},
        libraries={},
        facts={"metrics": {}},
    )
    published, _ = _timed(lambda: Store(root / "artifacts" / "store").publish(source, manifest))
    rate = _GIGABYTE / 1e6
    table.add_row(
        "digest 1 GiB", f"{rate / digested:.0f} MB/s", f"cp {rate / copied:.0f} MB/s", f"{copied / digested:.2f} x"
    )
    whole = digested + published
    table.add_row(
        "digest and publish", f"{rate / whole:.0f} MB/s", f"cp {rate / copied:.0f} MB/s", f"{copied / whole:.2f} x"
    )


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result
