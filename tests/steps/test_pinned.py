"""A step runs the code that its key speaks of, whatever is edited while it works."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steps as rooms
from steps.frame import UserError
from steps.frame.pinned import check_unedited, pin, pinned_spec

KIND = '''"""A step kind that edits its own code before it imports the rest of it."""

from pathlib import Path

from steps.artifacts import Dataset, DatasetFacts, Draft
from steps.data import _early
from steps.frame import Job, StepConfig, step
from steps.lm.rows import write_jsonl


class Late(StepConfig):
    """Says which code it ran."""

    edit: bool = False
    """Whether to edit it."""


@step("data.late", produces=Dataset, reference="https://example.org")
def late(config: Late, job: Job) -> Draft:
    """Say it."""
    (job.scratch / "checkpoint").touch()
    if config.edit:
        Path(__file__).with_name("_late.py").write_text("WORD = 'edited'")
    from steps.data._late import WORD

    out = job.output()
    write_jsonl(out / "rows.jsonl", [{"id": f"{_early.WORD} {WORD}"}])
    return Dataset.draft(out, DatasetFacts(rows=1, statistics={}))
'''

RUN = """
import json, os, sys
from pathlib import Path
from steps.frame.code import StepCode
from steps.frame.launch import Launcher
from steps.frame.spec import StepSpec

root = Path.cwd()
early, late = (root / "steps" / "data" / name for name in ("_early.py", "_late.py"))
launcher = Launcher(["steps.data.late"], root / "log")
told = []

def run(code, **config):
    spec = StepSpec(name="late", kind="data.late", key="0" * 64, config=config, inputs={}, work=root / "work",
                    store=root / "store", cache=root / "cache", code=code.digest if code else "",
                    code_files=code.files if code else {})
    result = launcher.run(spec)
    rows = root / "store" / result.outputs.get("", "none") / "rows.jsonl"
    told.append([result.status, result.message, json.loads(rows.read_text())["id"] if rows.exists() else None])
"""


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], list[Any]]:
    """What became of steps of a kind of our own, in a copy of all code."""
    shutil.copytree(rooms.__path__[0], tmp_path / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (("late", KIND), ("_early", "WORD = 'old'"), ("_late", "WORD = 'old'")):
        (tmp_path / "steps" / "data" / f"{name}.py").write_text(text)

    def run(story: str) -> list[Any]:
        program = f"{RUN}\n{story}\nlauncher.close()\nprint(json.dumps(told))"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        line = [sys.executable, "-c", program]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_an_edit_while_a_step_works_is_for_the_next_run(told: Callable[[str], list[Any]]) -> None:
    story = 'code = StepCode.of("steps.data.late"); run(code, edit=True); run(code)'
    first, second = told(story)
    assert first == ["finished", "", "old old"]
    changed = "step `late`: its code was changed between the plan and the step; run again"
    assert second == ["refused", changed, None]


def test_a_refusal_for_changed_code_keeps_the_checkpoints(told: Callable[[str], list[Any]], tmp_path: Path) -> None:
    told('code = StepCode.of("steps.data.late"); run(code); late.write_text("WORD = 2"); run(code)')
    assert (tmp_path / "work" / "scratch" / "checkpoint").exists()


def test_code_that_the_fork_server_imported_between_two_edits_is_not_run(told: Callable[[str], list[Any]]) -> None:
    story = """
code = StepCode.of("steps.data.late")
early.write_text("WORD = 'edited'")
run(None)
early.write_text("WORD = 'old'")
os.utime(early, ns=(1, 1))
run(code)
"""
    first, second = told(story)
    assert first == ["finished", "", "edited old"]
    assert second == ["finished", "", "old old"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Path]:
    """A package, whose name is the test's own, and a module in it."""
    name = f"pinned_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    files = {name: tmp_path / name / "__init__.py", f"{name}.part": tmp_path / name / "part.py"}
    for file in files.values():
        file.write_text("WORD = 'old'\n\n\nclass Here:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return files


@pytest.mark.parametrize("edit", ["edited", "gone"])
def test_what_is_pinned_is_imported_as_it_was(package: dict[str, Path], edit: str) -> None:
    pin(package)
    for file in package.values():
        if edit == "gone":
            file.unlink()
        else:
            file.write_text("WORD = 'edited'\n")
    room, part = package
    module = __import__(part, fromlist=["WORD"])
    assert module.WORD == sys.modules[room].WORD == "old"
    assert not list(package[room].parent.rglob("*.pyc")), "no bytecode of it is left for others"
    assert pinned_spec(room).submodule_search_locations == [str(package[room].parent)]


def test_what_was_imported_before_an_edit_is_not_pinned_as_it_is_after_it(package: dict[str, Path]) -> None:
    room, part = package
    pin(package)
    __import__(part)
    package[part].touch()
    pin(package)
    check_unedited(room)
    package[part].write_text("WORD = 'edited'\n")
    with pytest.raises(UserError, match=r"part.py was changed after it was imported; run again"):
        pin(package)
    with pytest.raises(UserError, match=r"part.py was changed while the step ran; run again"):
        check_unedited(room)
    check_unedited("another")
