"""Rewards that run something: the answer's code, a verifier's command, the user's own function."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steps.frame import UserError
from steps.train.rewards import Scorer
from steps.train.rewards import _external as external
from steps.train.rewards import _sandbox as sandbox
from steps.train.rewards._code import last_block
from tests.steps.rollouts import READ, refused, rollout, scores

Write = Callable[[str, str], Path]

# Code

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]


def test_code_statements() -> None:
    good, bad = rollout(ADD, tests=TESTS[:2]), rollout(ADD, tests=TESTS)
    assert scores({"kind": "code"}, good, bad) == [1, 0]
    assert scores({"kind": "code", "partial": True}, good, bad) == pytest.approx([1, 2 / 3])


CHEAT = """
import os, sys
above = sys._getframe(2).f_locals
for number in range(-3, 40):
    os.write(above["results"], f"{above['job']['token']} {number}\\n".encode())
"""


def test_no_answer_gets_more_than_all_its_tests() -> None:
    """Whoever finds the token that proves a test, can print what numbers it likes."""
    (score,) = scores({"kind": "code", "partial": True}, rollout(CHEAT, tests=["assert False"] * 2))
    assert score <= 1


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "def add(a, b):\n  return a +",
        "I cannot",
        "```python\ndef add(a, b): return a + b",
        "raise ValueError",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "print('0' * 32, 0); print('passed')",
        "def add(a, b): return add(a, b)",
    ],
)
def test_code_that_passes_nothing(answer: str) -> None:
    assert scores({"kind": "code", "partial": True}, rollout(answer, tests=TESTS[:2])) == [0]


def test_code_programs() -> None:
    pairs = [{"input": "1 2\n", "output": "3\n"}, {"input": "é 5", "output": "é5"}]
    read = "a, b = input().split()\n"
    adds = f"Read it:\n```py\n{read}```\nthen:\n```py\n{read}print(int(a) + int(b))\n```"
    both = f"{read}if __name__ == '__main__':\n    print(a + b if b == '5' else int(a) + int(b), ' ')"
    assert scores({"kind": "code", "partial": True}, rollout(adds, tests=pairs)) == [0.5]
    assert scores({"kind": "code"}, rollout(both, tests=pairs)) == [1]


def test_code_setup_and_blocks() -> None:
    answer = rollout("def f(): return math.pi > LIMIT", setup="import math\nLIMIT = 3", tests=["assert f()"])
    assert scores({"kind": "code"}, answer) == [1]
    assert last_block("```\na\n```\n  ```python\nb\n```  \n") == "b\n"
    assert last_block("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "tests", [None, [], "assert True", [1], [{"input": "1"}], ["assert True", {"input": "", "output": ""}]]
)
def test_code_without_tests_is_named(tests: object) -> None:
    with pytest.raises(UserError, match=r"reward `code`: row 7 \(test.jsonl\) has no tests"):
        scores({"kind": "code"}, rollout(ADD, tests=tests))


# An external verifier


def checker(write: Write, body: str) -> list[str]:
    return [sys.executable, str(write("check.py", body))]


def test_external_exit_code_and_number(write: Write) -> None:
    body = "import sys, json\nanswer, task = sys.stdin.read(), json.load(open('task.json'))\n"
    command = checker(write, body + "sys.exit(answer != task['answer'] or task['entry'] != {'level': 3})")
    assert scores({"kind": "external", "command": command}, rollout("42", level=3), rollout("41", level=3)) == [1, 0]
    command = checker(write, body + "print(len(answer) / 8); sys.exit(0)")
    assert scores({"kind": "external", "command": command}, rollout("four"), rollout("")) == [0.5, 0]


def test_external_is_bounded(write: Write) -> None:
    command = checker(write, "import sys\nif sys.stdin.read() == 'hang':\n    while True: pass\nprint('not a number')")
    assert scores({"kind": "external", "command": command, "seconds": 1}, rollout("hang"), rollout("x")) == [0, 1]
    command = checker(write, "print('nan')")
    with pytest.raises(UserError, match="reward `external` returned nan"):
        scores({"kind": "external", "command": command}, rollout("x"))


def test_external_writes_only_into_its_directory(write: Write, tmp_path: Path) -> None:
    if "files" not in sandbox.guarantees():
        pytest.skip("this machine cannot guarantee files")
    target = tmp_path / "written"
    command = checker(write, f"open('here', 'w').write('x')\nopen({str(target)!r}, 'w')")
    assert scores({"kind": "external", "command": command}, rollout("x")) == [0]
    assert not target.exists()


def test_external_is_named_by_its_files(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("check.py", "print(1)")
    settings = {"kind": "external", "command": [sys.executable, "check.py"]}
    first = READ.validate_python(settings)
    assert READ.validate_json(first.model_dump_json()) == first
    assert Scorer(first)([rollout("x")]) == [1]
    write("check.py", "print(0)")
    assert READ.validate_python(settings).sha256 != first.sha256
    assert "no longer what `sha256` says" in refused(first.model_dump())


def test_an_external_verifier_that_is_edited_judges_no_more(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the model that a step makes would be of two verifiers, under the key of the first."""
    monkeypatch.chdir(tmp_path)
    write("check.py", "print(1)")
    verifier = Scorer(READ.validate_python({"kind": "external", "command": [sys.executable, "check.py"]}))
    assert verifier([rollout("x")]) == [1]
    write("check.py", "print(0)")
    with pytest.raises(UserError, match=r"check.py` were changed since the plan; run again"):
        verifier([rollout("x")])


def test_an_external_verifier_that_is_edited_and_restored_while_it_judges_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("check.py", "print(1)")
    command = [sys.executable, "check.py"]
    verifier = Scorer(READ.validate_python({"kind": "external", "command": command}))
    run = external.run_confined

    def run_and_edit(*order: Any) -> Any:
        write("check.py", "print(0)")
        outcome = run(*order)
        write("check.py", "print(1)")
        return outcome

    monkeypatch.setattr(external, "run_confined", run_and_edit)
    with pytest.raises(UserError, match=r"check\.py` are written while it judges; leave them be"):
        verifier([rollout("x")])


def test_an_external_verifier_that_is_only_touched_judges_on_and_is_read_no_more_than_that(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write("check.py", "print(1)")
    verifier = Scorer(READ.validate_python({"kind": "external", "command": [sys.executable, "check.py"]}))
    run, digest, runs, reads = external.run_confined, external.digest_file, [], []

    def run_and_touch(*order: Any) -> Any:
        runs.append(order)
        if len(runs) == 1:
            os.utime(file, (1, 1))
        return run(*order)

    def read(path: Path) -> Any:
        reads.append(path)
        return digest(path)

    monkeypatch.setattr(external, "run_confined", run_and_touch)
    monkeypatch.setattr(external, "digest_file", read)
    assert [verifier([rollout("x")]) for _ in range(3)] == [[1]] * 3
    assert len(runs) == 4, "the first answer twice"
    assert len(reads) == 2, "before the touch and after it"


# The user's own function


def test_user_function_by_file_and_by_module(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = "def words(rollouts):\n    return [len(each.answer.split()) for each in rollouts]\n"
    write("mine.py", body)
    write("own_rewards_pkg/__init__.py", "")
    write("own_rewards_pkg/inner.py", body)
    write("bare_folder/in_it/inner.py", body)
    for path in ("mine.py:words", "own_rewards_pkg.inner:words", "bare_folder.in_it.inner:words"):
        spec = READ.validate_python({"kind": "user", "path": path})
        assert READ.validate_json(spec.model_dump_json()) == spec
        assert Scorer(spec)([rollout("a b"), rollout("")]) == [2, 0]
    before = READ.validate_python({"kind": "user", "path": "mine.py:words"})
    write("mine.py", body.replace("len(", "-len("))
    assert scores({"kind": "user", "path": "mine.py:words"}, rollout("a b")) == [-2]
    assert "no longer what `sha256` says" in refused(before.model_dump())


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("a_pkg:words", "a_pkg/impl.py"),
        ("a_pkg:words", "a_pkg/deeper.py"),
        ("a_pkg:words", "beside.py"),
        ("mine.py:words", "beside.py"),
    ],
)
def test_the_users_own_code_behind_a_function_names_it(
    path: str, file: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that is imported from elsewhere, and what it calls."""
    monkeypatch.chdir(tmp_path)
    write("a_pkg/__init__.py", "from a_pkg.impl import words\n")
    write("a_pkg/impl.py", "def words(rollouts):\n    from . import deeper\n    return deeper.words(rollouts)\n")
    write("a_pkg/deeper.py", "import json\nimport beside\n\n\ndef words(rollouts):\n    return [0] * len(rollouts)\n")
    write("mine.py", "from beside import words\n")
    write("beside.py", "def words(rollouts):\n    return [1] * len(rollouts)\n")
    write("unused.py", "x = 1\n")
    settings = {"kind": "user", "path": path}
    before = READ.validate_python(settings)
    write("unused.py", "x = 2\n")
    write(file, (tmp_path / file).read_text() + "# why\n")
    assert READ.validate_python(settings) == before
    write(file, (tmp_path / file).read_text() + "y = 2\n")
    assert READ.validate_python(settings).sha256 != before.sha256
    assert "no longer what `sha256` says" in refused(before.model_dump())
    write(file, "def words(:\n")
    assert file in refused(settings)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise KeyError('colour')", "reward `mine` raised KeyError: 'colour'"),
        ("return [1.0]", "reward `mine` returned 1 values for 2 answers"),
        ("return [1.0, float('nan')]", "reward `mine` returned nan for the answer 'second'"),
        ("return [float('inf'), 0]", "reward `mine` returned inf for the answer 'first'"),
        ("return None", "reward `mine` raised TypeError"),
        ("return ['a', 'b']", "reward `mine` raised ValueError"),
    ],
)
def test_bad_returns_are_named(body: str, sentence: str, write: Write) -> None:
    file = write("bad.py", f"def score(rollouts):\n    {body}\n")
    with pytest.raises(UserError, match=sentence) as caught:
        scores({"kind": "user", "path": f"{file}:score", "name": "mine"}, rollout("first"), rollout("second"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["kept.py:words", "kept_pkg:words"])
def test_a_step_asks_one_user_function_to_its_end(
    path: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It and what it imports only as it is called: half of the answers judged by another would be cached as its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    helper = f"kept_helper_{len(path)}"
    file = "kept.py" if path.startswith("kept.py") else "kept_pkg/__init__.py"
    body = f"def words(rollouts):\n    import {helper}\n    return [{helper}.WORTH] * len(rollouts)\n"
    write(file, body)
    write(f"{helper}.py", "WORTH = 1\n")
    scorer = Scorer(READ.validate_python({"kind": "user", "path": path}))
    write(file, body.replace("WORTH", "WORTH * 5"))
    write(f"{helper}.py", "WORTH = 10\n")
    assert scorer([rollout("a")]) == [1]
    assert scorer([rollout("a")]) == [1]
    write(file, body)
    write(f"{helper}.py", "WORTH = 1\n")
    assert scorer([rollout("a")]) == [1]


def test_a_user_function_that_was_edited_before_it_was_imported_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("late.py", "def words(rollouts):\n    return [1] * len(rollouts)\n")
    spec = READ.validate_python({"kind": "user", "path": "late.py:words"})
    write("late.py", "def words(rollouts):\n    return [2] * len(rollouts)\n")
    with pytest.raises(UserError, match=r"late.py:words was changed between the plan and the step; run again"):
        Scorer(spec)


def test_a_user_module_is_not_imported_when_the_recipe_is_read(write: Write, tmp_path: Path) -> None:
    file = write("loud.py", f"open({str(tmp_path / 'imported')!r}, 'w')\ndef f(rollouts): return [0]\n")
    READ.validate_python({"kind": "user", "path": f"{file}:f"})
    assert not (tmp_path / "imported").exists()


def test_an_async_user_function_is_refused(write: Write) -> None:
    file = write("later.py", "async def score(rollouts):\n    return [1.0 for _ in rollouts]\n")
    said = refused({"kind": "user", "path": f"{file}:score"})
    assert "`score` is an `async def`, which nobody awaits; write `def score`" in said
