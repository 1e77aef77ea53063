"""SFT and GRPO beside bare TRL: the same model, rows and settings, in turns, each in a process of its own.

What is timed is all that a user waits for once the libraries are imported: loading, training, saving; for posttrain
also its audits, digests and the artifact. The tokens are the rows' own and those sampled; padding counts for nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from steps.artifacts import Store
from steps.frame import Resources
from steps.frame.kinds import all_kinds, modules_of
from steps.frame.launch import Launcher
from tests.conftest import Bench
from tests.flows.command import ROOT

_TURNS = 2
_COMMON = {"schedule": "constant_with_warmup", "warmup": 0.0, "seed": 3}
_SFT = {**_COMMON, "epochs": 1, "batch_size": 16, "max_tokens": 512, "learning_rate": 1e-3}
_GRPO = {**_COMMON, "max_steps": 16, "batch_size": 128, "group_size": 8, "max_new_tokens": 24, "learning_rate": 1e-4}
_OURS = {"adapter": {"kind": "full"}, "dtype": "float32"}
"""What bare TRL does unasked: every weight is trained, in the precision in which it was loaded."""


def add_training(root: Path, table: Table) -> None:
    """Add a row for each method: tokens per second of ours, of bare TRL, and their ratio."""
    launcher = Launcher(modules_of(all_kinds()), root / "forkserver.txt")
    try:
        bench = _bench(root, launcher)
        model = bench.run("model.pico", hidden=512, layers=4, context=512, pretrain_steps=0)[""]
        rows, tasks = (
            bench.run("data.prepare", {"model": model}, source=source, near_dedup=None, max_tokens=512, limit=300)[
                "train"
            ]
            for source in ("python-stdlib-docs", "recipes/data/sorting-thinking.jsonl")
        )
        # Most rows are a line, some are a page: in a padded batch the longest sets the price of all.
        short = bench.run("data.mix", {"parts": [tasks, rows]}, weights=[5, 1], seed=3)[""]
        inputs = {"model": model, "data": rows}
        _add(table, "SFT", *_pair(root, launcher, "sft", inputs, {**_SFT, "packing": False}), goal=1.0)
        shorter = {"model": model, "data": short}
        plain = _pair(root, launcher, "sft", shorter, {**_SFT, "packing": False})
        packed = _pair(root, launcher, "sft", shorter, {**_SFT, "packing": True, "batch_size": 2})
        _add(table, "SFT, short rows", *plain, goal=1.0)
        _add(table, "SFT, short rows packed; bare unpacked", packed[0], plain[1], goal=1.5)
        _add(table, "the same; bare packed, its rows see each other", *packed, goal=1.0)
        _add(table, "GRPO", *_pair(root, launcher, "grpo", {"model": model, "data": tasks}, _GRPO), goal=1.0)
    finally:
        launcher.close()


def _bench(root: Path, launcher: Launcher, turn: str = "made") -> Bench:
    """Work directories of a turn's own, on one store: nothing is found half done."""
    (root / turn / "cache").mkdir(parents=True)
    bench = Bench(root / turn, launcher)
    bench.store = Store(root / "store")
    return bench


def _pair(
    root: Path, launcher: Launcher, method: str, inputs: dict[str, Any], settings: dict[str, Any]
) -> tuple[float, float]:
    """Return tokens per second of posttrain and of bare TRL: the best of some turns, one after the other."""
    ours, bare = [], []
    for turn in range(_TURNS):
        name = f"{method}-{inputs['data'].digest[:8]}-{settings.get('packing', '')}-{turn}"
        extra = {"rewards": [{"kind": "exact"}], "loss": "dapo"} if method == "grpo" else {}
        bench = _bench(root, launcher, name)
        # All cores, as bare TRL takes; a test's step has one.
        result = bench.attempt(f"train.{method}", inputs, resources=Resources(), **settings, **extra, **_OURS)
        assert result.status == "finished", result.message
        tokens = result.metrics["num_tokens" if method == "grpo" else "tokens"]
        ours.append(tokens / result.seconds)
        done = _bare(root / f"{name}-bare", method, inputs, settings)
        # SFT sees the same rows on both sides; TRL's own count includes what packing repeats.
        bare.append((done["tokens"] if method == "grpo" else tokens) / done["seconds"])
    return max(ours), max(bare)


def _bare(out: Path, method: str, inputs: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    given = {
        "method": method,
        "model": str(inputs["model"].path),
        "rows": str(inputs["data"].rows_file),
        "out": str(out),
        "settings": settings,
    }
    command = [sys.executable, "-m", "tests.bench.bare", json.dumps(given)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _add(table: Table, what: str, ours: float, bare: float, goal: float) -> None:
    table.add_row(what, f"{ours:.0f} tokens/s", f"{bare:.0f} tokens/s", f"{ours / bare:.2f} x (goal {goal:g} x)")
