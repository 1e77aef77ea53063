"""An error that nobody foresaw is told in one sentence: what, at which row, in which file of ours, in which log."""

import json
from pathlib import Path
from typing import Any

import pytest

from steps.frame.row_place import placed, row_place


def test_the_row_is_known_while_somebody_works_on_it_and_not_after() -> None:
    rows = [(1, "a line 1"), (2, "a line 2")]
    seen = [(row, row_place()) for row in placed(rows)]
    assert seen == [(1, "a line 1"), (2, "a line 2")] and row_place() == ""
    outer = placed(rows)
    next(outer)
    assert [(row_place(), inner) for inner in placed([(3, "b line 1")])] == [("b line 1", 3)]
    assert row_place() == "a line 1"
    outer.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert row_place() == ""


def test_an_error_of_a_step_names_its_row_and_its_log(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that the user wrote is code that may fail in any way; so a step's own is asked here."""
    asked = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "."}]
    rows: list[dict[str, Any]] = [{"messages": asked}, {"messages": asked}]
    # The deepest that the JSON module reads and no other walk of ours does.
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    rows[1]["task"] = {"deep": deep}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = bench.attempt("data.prepare", {}, source=str(tmp_path / "rows.jsonl"), eval_fraction=0)
    assert "\n" not in result.message
    if result.status == "failed":
        assert "rows.jsonl line 2" in result.message and "; its log is /" in result.message
