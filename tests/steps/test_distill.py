"""A student learns from a teacher's distribution, on its own answers or on given ones, and only in one vocabulary."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts
from tests.conftest import Bench
from tests.steps.conftest import better, curve, publish, run_and_kill, solved, sort_row
from tests.steps.untrained import untrained

FIRST_LOSSES = {"on_policy": 0.025086, "logits": 0.026644}
SETTINGS = {
    "adapter": {"kind": "full"},
    "batch_size": 64,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "schedule": "constant_with_warmup",
    "warmup": 0.0,
    "dtype": "float32",
    "seed": 3,
}


@pytest.fixture(scope="session")
def teacher(bench: Bench, sorting: Any, sorting_model: Any) -> Any:
    """The session's model after more of the same fine-tuning."""
    return bench.run(
        "train.sft",
        {"model": sorting_model, "data": sorting["train"]},
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=100,
        learning_rate=1e-3,
        dtype="float32",
        seed=6,
    )[""]


@pytest.fixture(scope="module")
def strangers(bench: Bench) -> tuple[Any, Any]:
    """Two models that are the same on every processor, neither taught anything."""
    return untrained(bench, seed=21), untrained(bench, seed=22)


@pytest.mark.parametrize("settings", [{}, {"mode": "logits", "beta": 0.0}], ids=["on_policy", "logits"])
def test_a_student_approaches_its_teacher(
    bench: Bench, sorting: Any, sorting_model: Any, teacher: Any, settings: dict[str, Any]
) -> None:
    inputs = {"model": sorting_model, "teacher": teacher, "data": sorting["train"]}
    student = bench.run("train.distill", inputs, max_steps=50, **SETTINGS, **settings)[""]
    before, after = (solved(bench, model, sorting["eval"]) for model in (sorting_model, student))
    assert better(before, after) < 0.01
    losses = curve(bench, student, "loss")
    assert losses[max(losses)] < losses[1] / 2


@pytest.mark.parametrize("mode", FIRST_LOSSES)
def test_first_losses(bench: Bench, sorting: Any, strangers: tuple[Any, Any], mode: str) -> None:
    inputs = {"model": strangers[0], "teacher": strangers[1], "data": sorting["train"]}
    student = bench.run("train.distill", inputs, mode=mode, max_steps=1, **SETTINGS)[""]
    assert curve(bench, student, "loss")[1] == pytest.approx(FIRST_LOSSES[mode], abs=1e-5)


def test_a_teacher_of_itself_has_nothing_to_teach(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "teacher": sorting_model, "data": sorting["train"]}
    student = bench.run("train.distill", inputs, max_steps=1, **SETTINGS)[""]
    assert curve(bench, student, "loss")[1] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"on_policy_share": 0.5, "accumulation": 2}], ids=["on_policy", "mixed"])
def test_a_killed_distillation_resumes_to_the_same_bytes(
    sorting: Any, sorting_model: Any, teacher: Any, fresh: Callable[[], Bench], settings: dict[str, Any]
) -> None:
    inputs = {"model": sorting_model, "teacher": teacher, "data": sorting["eval"]}
    # 200 rows and 64 or 128 a step: the steps after the checkpoint are of another epoch.
    chosen = {**SETTINGS, "max_steps": 8, "checkpoint_steps": 3, **settings}
    undisturbed = fresh().run("train.distill", inputs, **chosen)[""]
    disturbed = fresh()
    assert "SIGKILL" in run_and_kill(disturbed, "train.distill", inputs, chosen).message
    resumed = disturbed.run("train.distill", inputs, **chosen)[""]
    log = (disturbed.root / "work" / resumed.manifest.key[:16] / "log.txt").read_text()
    assert "resuming from checkpoint-" in log
    assert resumed.digest == undisturbed.digest


def test_answers_are_the_datas_or_the_students(bench: Bench, sorting_model: Any, teacher: Any) -> None:
    # Answers of ten tokens, cut to eight; the student knows none longer than six.
    long = [sort_row([(index * step) % 10 for step in (1, 3, 7, 9, 2)]) for index in range(64)]
    data = publish(bench, Dataset, "long", long, DatasetFacts(rows=64))
    inputs = {"model": sorting_model, "teacher": teacher, "data": data}
    settings = {**SETTINGS, "max_steps": 1, "batch_size": 32}
    given = bench.run("train.distill", inputs, mode="logits", **settings)[""]
    own = bench.run("train.distill", inputs, **settings)[""]
    assert curve(bench, given, "completions/mean_length")[1] == 8
    assert curve(bench, own, "completions/mean_length")[1] < 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "logits", "on_policy_share": 0.5}, "the student answers nothing in `mode: logits`"),
        ({"beta": 1.5}, "beta"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_settings_are_refused_before_the_run(settings: dict[str, Any], said: str) -> None:
    from steps.train.distill import TrainDistill

    with pytest.raises(ValueError, match=re.escape(said)):
        TrainDistill.model_validate({"model": "sft", "teacher": "big", "data": "data.train", **settings})


def test_a_teacher_with_another_tokenizer_is_refused(bench: Bench, sorting: Any, sorting_model: Any, pico: Any) -> None:
    inputs = {"model": sorting_model, "teacher": pico, "data": sorting["train"]}
    result = bench.attempt("train.distill", inputs, student_name="small", teacher_name="big", **SETTINGS)
    assert result.status == "refused"
    assert "the teacher `big` has another tokenizer than the student `small`" in result.message
