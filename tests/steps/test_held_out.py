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
