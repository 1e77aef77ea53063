"""Mixing: shares as asked, the same rows every time, thinking kept or struck out."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from steps.artifacts import Dataset, DatasetFacts
from steps.data.mix import shares
from steps.frame import load_kind
from steps.lm.rows import read_jsonl
from steps.lm.tasks import EMPTY_THINKING
from tests.conftest import Bench
from tests.steps.conftest import publish


def row(number: int, answer: str, source: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": answer}]
    return {"id": f"{source}-{number:03}", "messages": messages, "source": source}


@pytest.fixture(scope="session")
def thoughts(bench: Bench) -> Dataset:
    rows = [row(number, f"<think>\nabout {number}\n</think>\n\nIt is {number}.", "thoughts") for number in range(60)]
    # Its thinking never ends: there is no answer to keep.
    rows.append(row(60, "<think>\nendless", "thoughts"))
    return publish(bench, Dataset, "thoughts", rows, DatasetFacts(rows=len(rows)))


@pytest.fixture(scope="session")
def plain(bench: Bench) -> Dataset:
    return publish(bench, Dataset, "plain", [row(n, f"Just {n}.", "plain") for n in range(40)], DatasetFacts(rows=40))


def rows_of(artifact: Any) -> list[dict[str, Any]]:
    return list(read_jsonl(artifact.rows_file))


def test_shares_are_exact_and_no_row_comes_twice(bench: Bench, thoughts: Dataset, plain: Dataset) -> None:
    mixed = bench.run("data.mix", {"parts": [thoughts, plain]}, weights=[3, 1], rows=42)[""]
    rows = rows_of(mixed)
    assert len({each["id"] for each in rows}) == mixed.facts.rows == 42
    # 31.5 and 10.5: the first of equal remainders is rounded up.
    assert [sum(each["source"] == source for each in rows) for source in ("thoughts", "plain")] == [32, 10]
    assert mixed.facts.statistics["part_1"] == 32
    # Shuffled: the parts do not stand one behind the other.
    assert sum(one["source"] != other["source"] for one, other in itertools.pairwise(rows)) > 5


def test_without_rows_the_scarcest_part_decides(bench: Bench, thoughts: Dataset, plain: Dataset) -> None:
    mixed = bench.run("data.mix", {"parts": [thoughts, plain]}, weights=[1, 1])[""]
    assert [mixed.facts.statistics[f"part_{number}"] for number in (1, 2)] == [40, 40]
    assert shares([3, 1], [90, 100], None) == [90, 30]


def test_it_is_the_same_every_time(bench: Bench, thoughts: Dataset, plain: Dataset, fresh: Callable[[], Bench]) -> None:
    inputs = {"parts": [thoughts, plain]}
    first, again = (each.run("data.mix", inputs, rows=30, seed=2)[""] for each in (bench, fresh()))
    other = bench.run("data.mix", inputs, rows=30, seed=3)[""]
    assert first.digest == again.digest
    assert {each["id"] for each in rows_of(first)} != {each["id"] for each in rows_of(other)}


def test_a_row_and_its_twin_that_does_not_think(bench: Bench, thoughts: Dataset) -> None:
    mixed = bench.run("data.mix", {"parts": [thoughts, thoughts]}, thinking=["keep", "strip"], flags=True)[""]
    rows = {each["id"]: [message["content"] for message in each["messages"]] for each in rows_of(mixed)}
    assert rows["thoughts-007"] == ["What is 7? /think", "<think>\nabout 7\n</think>\n\nIt is 7."]
    assert rows["thoughts-007:no_think"] == ["What is 7? /no_think", EMPTY_THINKING + "It is 7."]
    assert "thoughts-060:no_think" not in rows
    assert mixed.facts.statistics["thinking"] == 60


def test_without_flags_questions_stay_as_they_are(bench: Bench, thoughts: Dataset) -> None:
    rows = rows_of(bench.run("data.mix", {"parts": [thoughts]}, thinking=["strip"], rows=60)[""])
    assert all(each["messages"][0]["content"].endswith("?") for each in rows)
    assert all(each["messages"][1]["content"].startswith("<think>\n\n</think>\n\nIt is") for each in rows)


def test_more_rows_than_there_are_is_refused(bench: Bench, thoughts: Dataset, plain: Dataset) -> None:
    result = bench.attempt("data.mix", {"parts": [thoughts, plain]}, weights=[1, 1], rows=100)
    assert result.status == "refused"
    assert "asks for 50 rows of part 2, which has 40" in result.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": [1]}, "weights: 1 entries for 2 parts"),
        ({"weights": [1, 0]}, "weights: each must be above 0"),
        ({"thinking": ["keep"]}, "thinking: 1 entries for 2 parts"),
    ],
)
def test_a_list_of_another_length_is_refused_at_plan_time(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        load_kind("data.mix").config.model_validate({"parts": ["one", "two"], **settings})


def test_a_union_takes_every_row_once_and_a_mix_says_what_it_left_out(
    bench: Bench, thoughts: Dataset, plain: Dataset
) -> None:
    lone = publish(bench, Dataset, "lone", [row(999, "Only I.", "lone")], DatasetFacts(rows=1))
    joined = bench.run("data.mix", {"parts": [thoughts, lone, thoughts]}, union=True)[""]
    ids = [each["id"] for each in rows_of(joined)]
    assert sorted(ids) == sorted({each["id"] for each in [*rows_of(thoughts), *rows_of(lone)]})
    cut = bench.run("data.mix", {"parts": [plain, lone]})[""]
    assert len(rows_of(cut)) == 2
    assert bench.last and bench.last.metrics["left_out_1"] == 39
    log = (bench.root / "work" / cut.manifest.key[:16] / "log.txt").read_text()
    assert "these rows are left out: 39 of 40 of part 1 (`union: true` takes all)" in log
    with pytest.raises(ValidationError, match="union: it takes every row"):
        load_kind("data.mix").config.model_validate({"parts": ["a", "b"], "union": True, "rows": 3})


def test_a_union_keeps_the_task_of_a_row_and_tells_two_tasks_apart(bench: Bench) -> None:
    def part(name: str, **more: Any) -> Dataset:
        return publish(bench, Dataset, name, [{**row(7, "Just 7.", name), **more}], DatasetFacts(rows=1))

    bare, seven, eight = part("bare"), part("seven", task={"is": 7}), part("eight", task={"is": 8})
    unlearned = row(7, "Just 7.", "unlearned")
    unlearned["messages"][1]["learn"] = False
    other = publish(bench, Dataset, "unlearned", [unlearned], DatasetFacts(rows=1))
    for parts, tasks in (
        ([bare, seven], [7]),
        ([seven, bare], [7]),
        ([seven, bare, eight, seven], [7, 8]),
        ([bare, other, bare], [0, 0]),
    ):
        rows = rows_of(bench.run("data.mix", {"parts": parts}, union=True)[""])
        assert sorted(each.get("task", {}).get("is", 0) for each in rows) == tasks
        assert len({each["id"] for each in rows}) == len(rows)


def test_an_empty_part_is_refused_before_anything_is_read(bench: Bench, plain: Dataset) -> None:
    empty = publish(bench, Dataset, "empty", [], DatasetFacts(rows=0))
    result = bench.attempt("data.mix", {"parts": [plain, empty]}, union=True)
    assert result.status == "refused"
    assert result.message == "step `mix`: entry 2 of `parts` (from test) has no rows; name a set that has some"
