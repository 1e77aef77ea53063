"""What is shown on a terminal is the text as it is: names, paths and last words are no markup of rich."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console, RenderableType

from flows.cli.app import console
from flows.cli.tables import families_table, plan_table, status_tables
from flows.execution import StepState
from flows.graph import Graph
from flows.plain_table import PlainTable
from flows.plan import make_plan
from flows.terminal import Board
from registry.home import Home

LAST_WORDS = "its process ended; it last said: [INST] hi [/INST] :smile: [red]"
MEMBER = "sft[last]"


def shown(what: RenderableType) -> str:
    """Return what any console prints, one that reads markup, too."""
    out = Console(file=io.StringIO(), width=300)
    out.print(what)
    return cast(io.StringIO, out.file).getvalue()


def ended(message: str) -> StepState:
    planned = SimpleNamespace(name=MEMBER)
    return cast(StepState, SimpleNamespace(planned=planned, outcome="failed", seconds=1.0, message=message, entry=None))


def test_a_failed_steps_last_words_and_a_members_name_are_shown_whole() -> None:
    out = Console(file=io.StringIO(), width=300)
    board = Board([MEMBER], {MEMBER: "train.sft"}, out)
    board.started(MEMBER)
    board.ended(ended(LAST_WORDS))
    said = cast(io.StringIO, out.file).getvalue()
    assert said == f"{MEMBER}: started\n{MEMBER}: failed in 1.0 s {LAST_WORDS}\n"
    assert MEMBER in shown(board.render()) and LAST_WORDS in shown(board.render())


def test_a_plan_over_paths_and_members_is_shown(recipe: Callable[..., Graph], home: Home, tmp_path: Path) -> None:
    rows = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in rows:
        path.write_text('{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n')
    more = (
        f"  own: {{uses: data.prepare, model: base, matrix: {{source: [{rows[0]}, {rows[1]}]}}}}\n"
        f"  mix: {{uses: data.mix, parts: ['own[{rows[0]}].train', 'own[{rows[1]}].train']}}\n"
        "  last: {uses: train.sft, model: base, data: data.train, matrix: {train_on: [last, all]}}\n"
        "  scores: {uses: evaluate.tasks, candidates: [last], data: data.eval}\npublish"
    )
    made = make_plan(recipe(("publish", more)), home, tmp_path, thorough=False)
    said = shown(plan_table(made))
    assert all(f"own[{path}]" in said for path in rows)
    assert "last[last], last[all]" in said


def test_no_table_reads_markup() -> None:
    row = {"family": "a", "aliases": {}, "releases": 1, "formats": ["[/x]", "gguf[b]"], "updated": None}
    assert "[/x], gguf[b]" in shown(families_table([row]))
    run = {"name": "r", "flow": "f", "state": "s", "started": "", "seconds": 1.0, "message": LAST_WORDS}
    tables = status_tables({"services": {}, "deployments": [], "runs": [run]})
    assert any(LAST_WORDS in shown(table) for table in tables)
    assert "a[/b]" in shown(PlainTable("a column", title="a[/b]"))


def test_the_commands_own_console_reads_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    said: Any = "[/x] sft[last] :smile:"
    console().print(said)
    assert capsys.readouterr().out == f"{said}\n"
