"""One step of a plan: what it reads is what its key speaks of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flows.execution import Execution
from flows.prepare import plan_recipe
from registry.home import Home
from steps.frame.code import StepCode

RECIPE = """
name: rows
steps:
  data: {uses: data.prepare, source: "SOURCE", near_dedup: null, eval_fraction: 0.2}
"""


@contextmanager
def planned(home: Home) -> Iterator[Execution]:
    execution = Execution(plan_recipe("rows.yaml", (), thorough=False, home=home), home, 1)
    try:
        yield execution
    finally:
        execution.close(ok=True)


def rows(word: str) -> str:
    return "".join(f'{{"question": "{word} {n}?", "answer": "{n}"}}\n' for n in range(40))


@pytest.mark.parametrize("source", ["rows.jsonl", "*.jsonl"])
def test_a_source_that_changes_between_plan_and_step_is_not_kept_under_the_old_key(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.yaml").write_text(RECIPE.replace("SOURCE", source), encoding="utf-8")
    Path("rows.jsonl").write_text(rows("old"), encoding="utf-8")
    with planned(home) as execution:
        if source == "rows.jsonl":
            Path("rows.jsonl").write_text(rows("new"), encoding="utf-8")
        else:
            Path("more.jsonl").write_text(rows("new"), encoding="utf-8")
        state = execution.run("data")
    assert (state.outcome, state.entry) == ("refused", None)
    assert state.message == f"step `data`: {source} changed between the plan and the end of the step; run again"
    assert not list(home.store.root.glob("*")), "nothing was published"

    Path("rows.jsonl").write_text(rows("old"), encoding="utf-8")
    Path("more.jsonl").unlink(missing_ok=True)
    with planned(home) as execution:
        assert execution.plan.steps["data"].status == "run"
        state = execution.run("data")
    assert state.entry
    assert "old" in (home.store.path(state.entry.outputs["train"]) / "rows.jsonl").read_text(encoding="utf-8")


def test_code_that_is_edited_between_plan_and_step_is_not_kept_under_the_old_key(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step imports while it works may be newer than its key; a file that was only touched is the same code."""
    monkeypatch.chdir(tmp_path)
    Path("rows.yaml").write_text(RECIPE.replace("SOURCE", "rows.jsonl"), encoding="utf-8")
    Path("rows.jsonl").write_text(rows("old"), encoding="utf-8")
    for edited in (True, False):
        with planned(home) as execution:
            now = execution.plan.code["data.prepare"]
            file = next(path for path in now.files if path.name == "prepare.py")
            before = StepCode("another" if edited else now.digest, {**now.files, file: now.files[file] - 1})
            plan = replace(execution.plan, code={"data.prepare": before})
            monkeypatch.setattr(execution, "plan", plan)
            state = execution.run("data")
        if edited:
            assert (state.outcome, state.entry) == ("refused", None)
            assert state.message == "step `data`: its code was changed between the plan and the step; run again"
        else:
            assert state.outcome == "finished"
