"""A small verifiable task, and a pico model that has half learned it: where every method of post-training starts."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from steps.artifacts import Artifact, Dataset, DatasetFacts, Facts, Manifest, digest_tree
from steps.frame.launch import Launcher
from steps.frame.spec import StepResult
from steps.lm.rows import read_jsonl, write_jsonl
from steps.runtime import verdicts
from steps.train._checkpoints import last_checkpoint
from tests.conftest import Bench


def publish(bench: Any, kind: type[Artifact[Any]], name: str, rows: Iterable[Mapping[str, Any]], facts: Facts) -> Any:
    """Publish rows that a test made as an artifact, as a step would."""
    staging = bench.root / "made" / name
    staging.mkdir(parents=True)
    write_jsonl(staging / "rows.jsonl", rows)
    tree = digest_tree(staging)
    manifest = Manifest(
        kind=kind.kind,
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test",
        output="",
        key=f"{name}-{tree.sha256[:16]}",
        config={},
        libraries={},
        facts=facts.as_plain(),
    )
    return bench.store.publish(staging, manifest)


def sum_row(left: int, right: int) -> dict[str, Any]:
    """One sum as a row of a Dataset."""
    messages = [
        {"role": "user", "content": f"{left}+{right}"},
        {"role": "assistant", "content": str(left + right)},
    ]
    return {"id": f"{left:02}+{right:02}", "messages": messages, "source": "sums"}


@pytest.fixture(scope="session")
def sums(bench: Any) -> dict[str, Dataset]:
    """Sums of two numbers below 50: 2,300 to learn from and 200 held out."""
    pairs = [(left, right) for left in range(50) for right in range(50)]
    random.Random(7).shuffle(pairs)
    parts = {"train": pairs[200:], "eval": pairs[:200]}
    return {
        name: publish(bench, Dataset, f"sums-{name}", (sum_row(*pair) for pair in part), DatasetFacts(rows=len(part)))
        for name, part in parts.items()
    }


def sort_row(digits: Sequence[int], *, upward: bool = True) -> dict[str, Any]:
    """One sorting task as a row of a Dataset."""
    given, wanted = (" ".join(map(str, each)) for each in (digits, sorted(digits, reverse=not upward)))
    messages = [{"role": "user", "content": f"sort {given}"}, {"role": "assistant", "content": wanted}]
    return {"id": given, "messages": messages, "source": "sorting"}


@pytest.fixture(scope="session")
def sorting(bench: Any) -> dict[str, Dataset]:
    """Three digits to sort upward: 800 tasks, 200 held out, and demonstrations two thirds of which sort downward."""
    tasks = list(itertools.product(range(10), repeat=3))
    random.Random(7).shuffle(tasks)
    chance = random.Random(3)
    rows = {
        "train": [sort_row(task) for task in tasks[200:]],
        "eval": [sort_row(task) for task in tasks[:200]],
        "mixed": [sort_row(task, upward=chance.random() < 0.35) for task in tasks[200:]],
    }
    return {
        name: publish(bench, Dataset, f"sorting-{name}", each, DatasetFacts(rows=len(each)))
        for name, each in rows.items()
    }


@pytest.fixture(scope="session")
def sorting_model(bench: Any, sorting: dict[str, Dataset]) -> Any:
    """A pico model that imitates demonstrations of mixed quality: it can sort, but mostly sorts the wrong way."""
    blank = bench.run("model.pico", hidden=128, layers=2, vocabulary=320, context=64, pretrain_steps=0, seed=5)[""]
    return bench.run(
        "train.sft",
        {"model": blank, "data": sorting["mixed"]},
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=350,
        learning_rate=3e-3,
        schedule="constant_with_warmup",
        dtype="float32",
        seed=5,
    )[""]


def solved(bench: Any, model: Any, data: Dataset, new_tokens: int = 6) -> list[bool]:
    """Whether a model's greedy answer to each held-out task is right."""
    samples = bench.run(
        "data.sample",
        {"model": model, "data": data},
        samples=1,
        temperature=0,
        max_new_tokens=new_tokens,
        rewards=[{"kind": "exact"}],
    )[""]
    return [row["samples"][0]["score"] == 1 for row in read_jsonl(samples.rows_file)]


def better(before: list[bool], after: list[bool]) -> float:
    """Return the p-value of `after` being no better than `before`: McNemar's exact test, one-sided."""
    gained = sum(now and not then for then, now in zip(before, after, strict=True))
    lost = sum(then and not now for then, now in zip(before, after, strict=True))
    return float(binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue) if gained + lost else 1.0


def curve(bench: Any, artifact: Any, metric: str) -> dict[int, float]:
    """Return a metric by step as a step logged it."""
    lines = (bench.root / "work" / artifact.manifest.key[:16] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["values"][metric] for row in rows if metric in row["values"] and row["step"] is not None}


def run_and_kill(bench: Bench, kind: str, inputs: Any, settings: Any, beyond: int = 0) -> StepResult:
    """Start a training and kill its process at the first complete checkpoint after optimizer step `beyond`."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bench.attempt, kind, inputs, **settings)
        while not running.done():
            for work in bench.root.glob("work/*"):
                last = last_checkpoint(work / "scratch" / "checkpoints")
                if last and int(last.name.rpartition("-")[2]) > beyond:
                    for pid in _processes_that_write(work / "log.txt"):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return running.result()


def _processes_that_write(log: Path) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "fd" / "1").readlink() == log:
                yield int(process.name)


@pytest.fixture
def fresh(bench: Any, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Bench]:
    """Make a bench with work directories of its own on the session's store: nothing is found half-done there."""

    def make() -> Bench:
        root = tmp_path_factory.mktemp("bench")
        (root / "cache").mkdir()
        made = Bench(root, launcher)
        made.store = bench.store
        return made

    return make


@pytest.fixture
def own_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of verdicts of the test's own."""
    monkeypatch.setattr(verdicts, "folder", lambda: tmp_path / "doctor")
    return tmp_path / "doctor"
