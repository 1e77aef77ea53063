"""What was chosen by some rows says so wherever it goes, and a report on those rows tells its reader."""

import json
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts
from steps.evaluate._notes import chosen_on, more_stops
from steps.lm.rows import read_jsonl
from tests.steps.conftest import publish, sum_row

SHORT = {"batch_size": 16, "max_steps": 4, "dtype": "float32", "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def exam(bench: Any, sorting: Any) -> Dataset:
    """Rows that no choice saw."""
    rows = list(read_jsonl(sorting["eval"].rows_file))[:40]
    return publish(bench, Dataset, "unseen", rows, DatasetFacts(rows=len(rows)))


@pytest.fixture(scope="module")
def chosen(bench: Any, sorting: Any, sorting_model: Any) -> Any:
    return bench.run("train.sft", {"model": sorting_model, "data": sorting["train"], "eval": sorting["eval"]}, **SHORT)[
        ""
    ]


def test_the_choice_travels_into_what_is_made_of_it(bench: Any, sorting: Any, sorting_model: Any, chosen: Any) -> None:
    by = (sorting["eval"].rows_sha256,)
    plain = bench.run("train.sft", {"model": sorting_model, "data": sorting["train"]}, **SHORT)[""]
    assert (plain.facts.chosen_on, chosen.facts.chosen_on) == ((), by)
    merged = bench.run("merge.adapter", {"adapter": chosen, "base": sorting_model}, dtype="float32")[""]
    further = bench.run("train.sft", {"model": merged, "data": sorting["train"]}, **SHORT)[""]
    assert merged.facts.chosen_on == further.facts.chosen_on == by


def test_a_candidate_that_a_report_chose_was_chosen_by_its_rows(
    bench: Any, sorting: Any, sorting_model: Any, chosen: Any, exam: Dataset
) -> None:
    asked = {"rows": 20, "max_new_tokens": 6, "dtype": "float32"}
    candidates = {"candidates": [sorting_model, sorting_model], "data": exam}
    report = bench.run("evaluate.tasks", candidates, names=["one", "two"], **asked)[""]
    best = bench.run(
        "evaluate.best", {"candidates": [sorting_model, sorting_model], "report": report}, names=["one", "two"]
    )
    assert best[""].facts.chosen_on == (exam.rows_sha256,)


def test_a_report_on_the_rows_of_the_choice_says_so(
    bench: Any, sorting: Any, sorting_model: Any, chosen: Any, exam: Dataset
) -> None:
    def notes(data: Dataset) -> list[str]:
        inputs = {"candidates": [sorting_model, chosen], "data": data, "model": sorting_model}
        report = bench.run(
            "evaluate.tasks", inputs, names=["start", "tuned"], rows=20, max_new_tokens=6, dtype="float32"
        )[""]
        found = json.loads((report.path / "summary.json").read_text())["notes"]
        assert all(note in (report.path / "table.md").read_text() for note in found)
        return found

    (note,) = notes(sorting["eval"])
    assert note.startswith("`tuned` was chosen by these very rows")
    assert notes(exam) == []


def test_equal_rows_that_another_step_made_are_the_same_rows(bench: Any, sorting: Any, chosen: Any) -> None:
    again = publish(
        bench, Dataset, "again", read_jsonl(sorting["eval"].rows_file), DatasetFacts(rows=200, statistics={"made": 2.0})
    )
    assert again.digest != sorting["eval"].digest
    assert len(chosen_on({"a": chosen}, again)) == 1


def test_a_choice_is_told_of_rows_that_were_mixed_of_those_of_the_choice_or_the_other_way_round(bench: Any) -> None:
    held, exam = (
        publish(bench, Dataset, f"by {start}", [sum_row(start, n) for n in range(9)], DatasetFacts(rows=9))
        for start in (3, 5)
    )
    mixed = bench.run("data.mix", {"parts": [held]})[""]
    both = bench.run("data.mix", {"parts": [mixed, exam]}, union=True)[""]
    assert set(both.facts.made_of) == {held.rows_sha256, mixed.rows_sha256, exam.rows_sha256}
    model = bench.run("model.pico", hidden=32, layers=1, vocabulary=300, pretrain_steps=0)[""]
    for by, very, kin in ((held, (held,), (mixed, both)), (mixed, (mixed, held), (both,))):
        asked = {"names": ["one", "two"], "max_new_tokens": 2, "dtype": "float32"}
        report = bench.run("evaluate.tasks", {"candidates": [model, model], "data": by}, **asked)[""]
        inputs = {"candidates": [model, model], "report": report}
        best = {"a": bench.run("evaluate.best", inputs, names=["one", "two"])[""]}
        assert all("`a` was chosen by these very rows" in chosen_on(best, data)[0] for data in very)
        assert all("an origin in common with these" in chosen_on(best, data)[0] for data in kin)
        assert chosen_on(best, exam) == []


def test_notes_are_sentences_for_one_and_for_several(sorting: Any, chosen: Any, sorting_model: Any) -> None:
    both = {"a": chosen, "b": sorting_model, "c": chosen}
    assert chosen_on(both, sorting["eval"])[0].startswith("`a` and `c` were chosen")
    assert more_stops({"gguf": (3, 7), "hf": ()}) == [
        "`gguf`: its runtime by itself would stop at tokens 3, 7 too; here all stop at the same"
    ]
