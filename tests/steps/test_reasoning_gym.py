"""`reasoning-gym://`: the same tasks everywhere, rows that keep what verifiers need, verdicts that agree."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steps.frame import UserError
from steps.lm.rows import read_jsonl
from steps.lm.tasks import Rollout, Task, read_tasks
from steps.sources import check, fetch_model, fingerprint, read_rows
from steps.sources import reasoning_gym as source
from steps.train.rewards import REWARDS, Scorer
from tests.flows.command import Command

# What is special about each: answers evaluated as code, a config in the verdict, tuples in the metadata, no single
# reference, numbers within a tolerance, and sets or unseeded draws in the making.
NAMES = (
    "chain_sum", "n_queens", "countdown", "decimal_arithmetic", "arc_agi", "graph_color", "power_function",
    "ransom_note", "list_functions", "knights_knaves",
)  # fmt: skip


def tasks(uri: str) -> list[Task]:
    """The tasks of a URI, made in this process and brought through JSON as in a file."""
    uri = f"reasoning-gym://{uri}"
    found = []
    for row in source.rows(source.parse(uri), uri):
        values = json.loads(json.dumps(row))
        messages = [
            {"role": "user", "content": values["question"]},
            {"role": "assistant", "content": values["answer"]},
        ]
        found.append(Task.of({"id": "1", "messages": messages, "source": uri, "task": values["task"]}))
    return found


def verdicts(given: Sequence[Task], answers: Sequence[str], **settings: Any) -> list[float]:
    scorer = Scorer(REWARDS["reasoning_gym"].spec.model_validate(settings))
    return scorer([Rollout(task, answer, 1) for task, answer in zip(given, answers, strict=True)])


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        check(f"reasoning-gym://{uri}", Path.cwd(), Path.cwd())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_read_from_the_sources_is_what_the_library_has() -> None:
    import reasoning_gym  # noqa: F401 - registers the data sets
    from reasoning_gym.factory import DATASETS

    assert set(source.declared()) == set(DATASETS) - {"composite"}
    for name in source.declared():
        assert list(source.config_types(name)) == [field.name for field in dataclasses.fields(DATASETS[name][1])]


def test_verifiers_agree_with_their_own_answers() -> None:
    given = [task for name in NAMES for task in tasks(f"{name}?size=3&seed=5")]
    assert verdicts(given, [task.answer for task in given]) == [1.0] * (3 * len(NAMES))
    tagged = [f"<think>so</think> <answer> {task.answer}</answer>" for task in given]
    assert verdicts(given, tagged) == [1] * len(given)
    assert max(verdicts(given, ["nothing of the kind"] * len(given), partial=False)) == 0


def test_answers_that_are_evaluated_reach_nothing(tmp_path: Path) -> None:
    target = tmp_path / "written"
    given = tasks("n_queens?size=1") * 3
    hostile = [f"open({str(target)!r}, 'w')", "__import__('time').sleep(60)", "9**9**9**9"]
    began = time.monotonic()
    assert verdicts(given, hostile, seconds=1, partial=False) == [0, 0, 0]
    assert not target.exists()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["list_functions", "word_ladder"])
def test_rows_are_the_same_in_every_process(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        rows = read_rows(f"reasoning-gym://{name}?size=5&seed=3", tmp_path / seed, tmp_path)
        made.append([row.values for row in rows])
    assert made[0] == made[1]
    other = [task.prompt[0]["content"] for task in tasks(f"{name}?size=5&seed=4")]
    assert not set(other) & {row["question"] for row in made[0]}


def test_fingerprint_is_known_without_the_library() -> None:
    root = Path.cwd()
    first = fingerprint("reasoning-gym://chain_sum?size=5&min_terms=2", root)
    assert first == fingerprint("reasoning-gym://chain_sum?min_terms=2&size=5&seed=0", root)
    assert first != fingerprint("reasoning-gym://chain_sum?min_terms=2&size=6", root)
    assert "0.1.25" in first
    program = (
        "import sys\nfrom pathlib import Path\nfrom steps.sources import fingerprint\n"
        "fingerprint('reasoning-gym://chain_sum?size=5', Path())\n"
        "print(sorted({'reasoning_gym', 'sympy', 'numpy', 'torch'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_values() -> None:
    config = source.parse(
        "reasoning-gym://basic_arithmetic?operators=+,-&min_terms=3&allow_parentheses=false&format_style=simple"
    ).config
    assert config == {
        "seed": 0,
        "operators": ["+", "-"],
        "min_terms": 3,
        "allow_parentheses": False,
        "format_style": "simple",
    }
    for uri, key, value in [
        ("aiw?task_type_weights=0.5,0.25,0.25", "task_type_weights", [0.5, 0.25, 0.25]),
        ("figlet_font?static_word=a%26b%2Cc", "static_word", "a&b,c"),
        ("time_intervals?min_time=10:30", "min_time", "10:30"),
    ]:
        assert source.parse(f"reasoning-gym://{uri}").config[key] == value


@pytest.mark.parametrize(
    "uri",
    ["word_sorting?transformation=uppercase&size=2", "time_intervals?min_time=10:30:00&min_date=2001-02-03&size=2"],
)
def test_texts_become_the_librarys_types(uri: str) -> None:
    given = tasks(uri)
    assert verdicts(given, [task.answer for task in given]) == [1, 1]


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("chain_sums", "has no data set `chain_sums`; did you mean `chain_sum`?"),
        ("chain-sum?size=3", "did you mean `chain_sum`?"),
        ("", "has no data set ``"),
        ("composite", "has no data set `composite`"),
        ("chain_sum?min_term=2", "has no key `min_term`; did you mean `min_terms`?"),
        ("chain_sum?min_terms=two", "`min_terms` takes a value of type int, not `two`"),
        ("chain_sum?allow_negation=3", "`allow_negation` takes a value of type bool, not `3`"),
        ("chain_sum?size=true", "`size` takes a value of type int, not `true`"),
        ("chain_sum?seed=null", "`seed` must be a number"),
        ("chain_sum?size=2026-13-45", "`size` takes a value of type int, not `2026-13-45`"),
        ("chain_sum?size==", "`size` takes a value of type int, not `=`"),
        ("complex_arithmetic?operations=[!!int '']", "`operations` takes a value of type tuple[str, ...], not `[!!int"),
        ("complex_arithmetic?operations=[%2B", "`operations` takes a value of type tuple[str, ...], not `[+`"),
        ("chain_sum?size", "write `size=VALUE` once"),
        ("chain_sum?size=1&size=2", "write `size=VALUE` once"),
    ],
)
def test_refusals(uri: str, sentence: str) -> None:
    assert sentence in refusal(uri)


def test_what_the_library_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reasoning-gym refuses it: max_terms must be >= min_terms") as caught:
        list(read_rows("reasoning-gym://chain_sum?min_terms=5&max_terms=2", tmp_path, tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="gives no reference answers"):
        tasks("rush_hour?size=1")
    with pytest.raises(UserError, match="this is a data set"):
        fetch_model("reasoning-gym://chain_sum", tmp_path, tmp_path)


def test_other_tasks_are_named() -> None:
    with pytest.raises(UserError, match=r"row 1 \(sums\) is no task of reasoning-gym"):
        verdicts([Task("1", (), "42", "sums")], ["42"])


def test_prepared_rows_keep_their_tasks(bench: Any) -> None:
    uri = "reasoning-gym://chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=60&seed=1"
    sides = bench.run("data.prepare", source=uri, near_dedup=None, eval_fraction=0.2)
    given = read_tasks(sides["train"]) + read_tasks(sides["eval"])
    assert 50 < len(given) <= 60
    assert verdicts(given, [task.answer for task in given], partial=False) == [1] * len(given)
    row = next(read_jsonl(sides["train"].rows_file))
    assert row["task"]["dataset"] == "chain_sum"
    assert row["task"]["entry"]["answer"] == row["messages"][-1]["content"]
    assert row["source"] == uri


def test_a_task_column_of_any_source_is_kept_where_it_is_an_object(bench: Any, tmp_path: Path) -> None:
    rows = [
        {"question": "one?", "answer": "1", "task": {"tests": ["assert True"]}},
        {"question": "and two?", "answer": "2", "task": "arithmetic"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = bench.run("data.prepare", source=str(file), eval_fraction=0)["train"]
    assert sorted(str(row.get("task")) for row in read_jsonl(train.rows_file)) == ["None", "{'tests': ['assert True']}"]


RECIPE = """
name: sums
base: {uses: model.pico, pretrain_steps: 4}
steps:
  data: {uses: data.prepare, source: "reasoning-gym://chain_sum?max_terms=3&size=50&seed=1"}
  sft: {uses: train.sft, model: base, data: data.train, max_steps: 4}
"""


def test_plan(tmp_path: Path) -> None:
    recipe = tmp_path / "sums.yaml"
    recipe.write_text(RECIPE)
    posttrain = Command(tmp_path / "home")
    ended = posttrain("plan", str(recipe), "--json")
    assert ended.code == 0, ended.err
    recipe.write_text(RECIPE.replace("max_terms", "max_term"))
    ended = posttrain("plan", str(recipe))
    assert ended.code == 2
    assert "chain_sum has no key `max_term`; did you mean `max_terms`?" in ended.err


@pytest.mark.skipif(os.getloadavg()[0] > 1.5, reason="other work would be measured too")
def test_plan_is_quick(tmp_path: Path) -> None:
    recipe = tmp_path / "sums.yaml"
    recipe.write_text(RECIPE)
    posttrain = Command(tmp_path / "home")
    took = []
    for _ in range(3):
        began = time.monotonic()
        posttrain("plan", str(recipe))
        took.append(time.monotonic() - began)
    assert min(took) < 2
