"""Keys follow the code: what a step runs is in its key, and what only explains it is not."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import steps as rooms
from steps.frame import code as code_of_steps
from steps.frame import load_kind
from steps.frame.code import code_digest, code_modules, digest_modules
from steps.frame.keys import step_key
from steps.frame.kinds import kind_names
from tests.steps.test_frame import spec_of

Edit = Callable[[str, str, str], None]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """A copy of all steps whose code may be edited: file, old, new; with no old it is added at the end."""
    copy = tmp_path / "steps"
    shutil.copytree(rooms.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rooms, "__path__", [str(copy)])

    def change(name: str, old: str, new: str) -> None:
        path = copy / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text + new, encoding="utf-8")

    return change


def key_of(kind: str) -> str:
    declared = load_kind(kind)
    return step_key(declared, declared.config.model_construct(), {}, {})


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("train.sft", "train/sft.py"),
        ("train.sft", "lm/rows.py"),
        # Imported within a function, by a module that the step's own imports.
        ("train.grpo", "train/_held_out.py"),
        # A program that is run by its folder, whose files know each other by their short names.
        ("train.grpo", "train/rewards/_confined/verifiers.py"),
        ("evaluate.compare", "lm/llama_cpp.py"),
        # A package's own start.
        ("train.sft", "train/__init__.py"),
    ],
)
def test_a_key_changes_with_any_code_that_the_step_runs(edit: Edit, kind: str, file: str) -> None:
    before = key_of(kind)
    edit(file, "", "MORE = 1\n")
    assert key_of(kind) != before


def test_one_character_in_a_string_that_looks_like_a_comment_or_a_blank_line_counts(edit: Edit) -> None:
    edit("lm/rows.py", "", 'TEXT = """one # two\n\n  three  \n"""\n')
    seen = {code_digest("steps.train.sft")}
    for old, new in (("one # two", "one # 2"), ("\n\n  three", "\n  three"), ("three  \n", "three\n")):
        edit("lm/rows.py", old, new)
        seen.add(code_digest("steps.train.sft"))
    assert len(seen) == 4


def test_comments_docstrings_blank_lines_and_what_runs_every_step_do_not_count(edit: Edit) -> None:
    before = {name: code_digest(f"steps.{name}") for name in kind_names()}
    edit("lm/rows.py", "", "# Why: 'because'.\n\n\n")
    edit("lm/rows.py", '"""', '"""Another sentence, and more of it:\n\n    x = 1\n\n')
    edit("frame/runner.py", "", "MORE = 1\n")
    edit("runtime/proof.py", "", "MORE = 1\n")
    assert {name: code_digest(f"steps.{name}") for name in kind_names()} == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('A = (b"#", 1)', 'A = (b"#", 2)'),
        ('A = b"##"', 'A = b"#!"'),
        ('A = f"{1}#a"', 'A = f"{1}#b"'),
        ("A = rb'''\n# 1\n'''", "A = rb'''\n# 2\n'''"),
        ('def f(r): "Scores."; return [1.0]', 'def f(r): "Scores."; return [0.0]'),
        ('class E(Exception): """x"""; limit = 5', 'class E(Exception): """x"""; limit = 6'),
        ('"""What\nit does"""; LIMIT = 5', '"""What\nit does"""; LIMIT = 6'),
        ('A = x.startswith(b"#### ") and x > 3', 'A = x.startswith(b"#### ") and x > 99'),
        ('A = "é#"; B = 1  # é', 'A = "é#"; B = 2  # é'),
    ],
)
def test_what_stands_in_a_line_after_a_string_counts(tmp_path: Path, before: str, after: str) -> None:
    assert essence(tmp_path, before) != essence(tmp_path, after)


def test_the_essence_of_a_module_is_one_text_on_every_version_of_python() -> None:
    """Written out, since each version finds the places of nested strings in its own way."""
    text = '''"""Why."""  # noqa

import re  # for `#`
def f(x: str) -> str:  "Says # it."; return x   # done
class A:
    """More
    # of it"""; size = 1
    name = f"{x!r:>{len('#')}} #" f"#{'#' + y['#']}"  # comment

    text = f"""
  {x['#']} # no comment
    {y}

 #"""  # comment
    joined = ("a#"  # stays: it is within the string's own lines
        "b#")
"""é#"""; z = "é#"  # é
'''
    kept = '''import re
def f(x: str) -> str:  ; return x
class A:
; size = 1
    name = f"{x!r:>{len('#')}} #" f"#{'#' + y['#']}"
    text = f"""
  {x['#']} # no comment
    {y}

 #"""
    joined = ("a#"  # stays: it is within the string's own lines
        "b#")
; z = "é#"'''
    assert code_of_steps._essence(text, list(code_of_steps._running(ast.parse(text)))) == kept


def essence(folder: Path, text: str) -> str:
    path = folder / f"m{abs(hash(text))}.py"
    path.write_text(f"{text}\n", encoding="utf-8")
    return digest_modules({"m": path})


def test_a_kind_is_not_changed_by_code_that_it_does_not_run(edit: Edit) -> None:
    before = {name: key_of(name) for name in ("data.mix", "train.sft", "quantize.gguf")}
    edit("quantize/_importance.py", "", "MORE = 1\n")
    changed = {name for name, key in before.items() if key_of(name) != key}
    assert changed == {"quantize.gguf"}


@pytest.mark.slow
def test_what_a_step_imports_while_it_runs_is_in_its_key(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    spec = tmp_path / "spec.json"
    spec.write_text(spec_of(tmp_path).model_dump_json())
    program = (
        "import json, sys; from steps.__main__ import main; code = main(); "
        "print(json.dumps([code, sorted(name for name in sys.modules if name.split('.')[0] == 'steps')]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(spec)], capture_output=True, text=True, check=True)
    code, imported = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    run = {name for name in imported if code_of_steps._own_file(name)}
    assert run <= code_modules("steps.model.pico").keys()
    assert "steps.lm.checkpoint" in run


def test_no_step_imports_our_modules_by_a_name_that_is_made_up_as_it_runs() -> None:
    """The digest sees import statements only."""
    for name in kind_names():
        for path in code_modules(f"steps.{name}").values():
            content = path.read_text(encoding="utf-8")
            assert 'import_module(f"steps' not in content and 'import_module("steps' not in content
