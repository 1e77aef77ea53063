"""Looks at held-out tasks that fail: what is resumed afterwards is the run that would have been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts
from steps.frame.spec import StepResult
from tests.conftest import Bench
from tests.steps.conftest import publish, sum_row
from tests.steps.untrained import untrained

VERIFIER = """
from pathlib import Path

def check(rollouts):
    flag = Path({flag!r})
    if len(rollouts) == 12 and flag.exists():
        left = int(flag.read_text())
        if not left:
            flag.unlink()
            raise OSError("the checker is away")
        flag.write_text(str(left - 1))
    return letters(rollouts)

def letters(rollouts):
    return [each.text.count("e") + len(each.text) / 100 for each in rollouts]
"""


@pytest.mark.parametrize("updates", [1, 2])
def test_a_look_that_fails_is_made_up_for_and_changes_nothing(
    bench: Bench, fresh: Callable[[], Bench], tmp_path: Path, updates: int
) -> None:
    """The second look fails; with two updates to a batch of rollouts, the first step of a batch is no checkpoint."""
    flag = tmp_path / "away"
    (tmp_path / "verifier.py").write_text(VERIFIER.format(flag=str(flag)))
    rows = [sum_row(left, right) for left in range(8) for right in range(8)]
    model = untrained(bench, 51)
    data, held = (
        publish(bench, Dataset, f"looked-{updates}-{len(part)}", part, DatasetFacts(rows=len(part)))
        for part in (rows[:52], rows[52:])
    )

    def attempt(place: Bench) -> StepResult:
        return place.attempt(
            "train.grpo",
            {"model": model, "data": data, "eval": held},
            adapter={"kind": "lora", "rank": 4},
            rewards=[{"kind": "user", "path": f"{tmp_path}/verifier.py:letters"}],
            verifier={"kind": "user", "path": f"{tmp_path}/verifier.py:check"},
            batch_size=8,
            group_size=4,
            max_new_tokens=6,
            max_steps=6,
            eval_steps=3 if updates == 2 else 2,
            updates_per_rollout=updates,
            checkpoint_steps=50,
            dtype="float32",
            learning_rate=2e-2,
            warmup=0,
            schedule="constant_with_warmup",
        )

    def looks(place: Bench) -> Any:
        return json.loads(next(place.root.glob("work/*/scratch/best/history.json")).read_text())

    calm, disturbed = fresh(), fresh()
    expected = attempt(calm)
    flag.write_text("1")
    assert "the checker is away" in attempt(disturbed).message
    assert not flag.exists()
    found = attempt(disturbed)
    assert looks(disturbed) == looks(calm)
    assert found.outputs == expected.outputs


SCRIPTED = """
from pathlib import Path

def check(rollouts):
    script = Path({script!r})
    if len(rollouts) != 12:
        return letters(rollouts)
    score, *rest = script.read_text().split()
    if score == "fail":
        raise OSError("the checker is away")
    script.write_text(" ".join(rest))
    return [float(score)] * 12

def letters(rollouts):
    return [each.text.count("e") + len(each.text) / 100 for each in rollouts]
"""
"""A verifier that scores each look as a file says: as if looks came out otherwise when made again, as on a GPU."""


@pytest.fixture
def scripted(bench: Bench, tmp_path: Path) -> Callable[..., StepResult]:
    """Train at a place, its looks scored by a script."""
    script = tmp_path / "script"
    (tmp_path / "verifier.py").write_text(SCRIPTED.format(script=str(script)))
    rows = [sum_row(left, right) for left in range(6) for right in range(6)]
    model = untrained(bench, 52)
    data, held = (
        publish(bench, Dataset, f"{tmp_path.name}-{len(part)}", part, DatasetFacts(rows=len(part)))
        for part in (rows[:24], rows[24:])
    )

    def attempt(place: Bench, scores: str, **config: Any) -> StepResult:
        script.write_text(scores)
        return place.attempt(
            "train.grpo",
            {"model": model, "data": data, "eval": held},
            adapter={"kind": "lora", "rank": 4},
            rewards=[{"kind": "user", "path": f"{tmp_path}/verifier.py:letters"}],
            verifier={"kind": "user", "path": f"{tmp_path}/verifier.py:check"},
            **{"batch_size": 8, "group_size": 4, "max_new_tokens": 6, "dtype": "float32", "warmup": 0},
            **{"learning_rate": 2e-2, "schedule": "constant_with_warmup"},
            **config,
        )

    return attempt


def test_after_a_restart_the_weights_are_those_of_the_best_look_that_still_counts(
    fresh: Callable[[], Bench], scripted: Callable[..., StepResult]
) -> None:
    """Look 4 was the best, but training goes on from step 3, and then look 4 comes out worse than look 2 did."""
    calm, disturbed = fresh(), fresh()
    settings = {"max_steps": 6, "eval_steps": 1, "updates_per_rollout": 3, "checkpoint_steps": 3}
    expected = scripted(calm, "0.1 0.2 0.5 0.3 0.4 0.3 0.3", **settings)
    assert "the checker is away" in scripted(disturbed, "0.1 0.2 0.5 0.3 0.6 fail", **settings).message
    best = next(disturbed.root.glob("work/*/scratch/best"))
    assert sorted(file.name for file in best.glob("weights*")) == ["weights-2.safetensors", "weights-4.safetensors"]
    assert scripted(disturbed, "0.4 0.3 0.3", **settings).outputs == expected.outputs
    assert [file.name for file in best.glob("weights*")] == ["weights-2.safetensors"]


@pytest.mark.parametrize("lost", ["history", "weights"])
def test_a_restart_at_the_end_without_a_history_looks_once_more(
    fresh: Callable[[], Bench], scripted: Callable[..., StepResult], lost: str
) -> None:
    place = fresh()
    settings = {"max_steps": 3, "eval_steps": 4, "checkpoint_steps": 3}
    assert "the checker is away" in scripted(place, "0.5 fail", **settings).message
    best = next(place.root.glob("work/*/scratch/best"))
    if lost == "history":
        (best / "history.json").write_text("[[0, 0.5], [3")
    else:
        (best / "weights-0.safetensors").unlink()
    result = scripted(place, "0.25", **settings)
    assert result.status == "finished", result.message
    assert json.loads((best / "history.json").read_text()) == [[3, 0.25]]
