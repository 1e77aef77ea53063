"""A template that opens the thoughts and takes them out of what was said: every training and the merge go through."""

from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts, Preferences, PreferencesFacts
from steps.lm.checkpoint import load_tokenizer
from steps.train.sft import labelled
from tests.steps.conftest import publish
from tests.steps.test_given_template import make_base

TEMPLATE = Path(__file__).parent / "masks" / "r1-distill.jinja"
SMALL = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "dtype": "float32"}


def thinking(number: int, thoughts: str = "\nTwice it.\n") -> str:
    """An answer with its thoughts."""
    return f"<think>{thoughts}</think>\n\n{2 * number}"


@pytest.fixture(scope="module")
def base(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of that kind."""
    small = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=128, pretrain_steps=5)[""]
    folder = make_base(small.path, tmp_path_factory.mktemp("base") / "base")
    return bench.run("model.source", uri=f"file://{folder}", template=str(TEMPLATE))[""]


@pytest.fixture(scope="module")
def rows(bench: Any) -> Dataset:
    """Conversations of two turns, both with thoughts."""
    talks = [
        [
            {"role": "user", "content": f"double {number}"},
            {"role": "assistant", "content": thinking(number)},
            {"role": "user", "content": "and again"},
            {"role": "assistant", "content": thinking(2 * number)},
        ]
        for number in range(12)
    ]
    made = [{"id": f"{number:016}", "messages": talk, "source": "doubles"} for number, talk in enumerate(talks)]
    return publish(bench, Dataset, "doubles", made, DatasetFacts(rows=len(made)))


@pytest.fixture(scope="module")
def tuned(bench: Any, base: Any, rows: Dataset) -> Any:
    """The adapter of two steps, on all turns."""
    return bench.run("train.sft", {"model": base, "data": rows}, adapter={"kind": "lora"}, **SMALL)[""]


def test_every_turn_of_every_row_is_learned_with_its_thoughts(bench: Any, base: Any, rows: Dataset) -> None:
    result = bench.attempt("train.sft", {"model": base, "data": rows}, adapter={"kind": "lora"}, **SMALL)
    assert result.status == "finished", result.message
    assert result.metrics["rows"] == 24 and result.metrics["rows_without_answer"] == 0
    assert any("12 of 12 rows of `data` are learned turn by turn" in note for note in result.notes)
    tokenizer = load_tokenizer(base.path)
    talk = [{"role": "user", "content": "double 3"}, {"role": "assistant", "content": thinking(3)}]
    ((ids, labels),) = labelled(talk, tokenizer, base.facts.stop_token_ids, "all")
    learned = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
    assert learned == "Twice it.\n</think>\n\n6<|endoftext|>"
    assert tokenizer.decode(ids).count("<think>") == 1


def test_the_merge_is_what_was_trained(bench: Any, base: Any, rows: Dataset, tuned: Any) -> None:
    merged = bench.run("merge.adapter", {"adapter": tuned, "base": base, "data": rows})[""]
    assert merged.facts.template_sha256 == base.facts.template_sha256


def test_preferences_and_distillation_go_through(bench: Any, base: Any, rows: Dataset) -> None:
    prompt = [{"role": "user", "content": "double 4"}]
    pairs = [
        {
            "id": f"{number}",
            "prompt": prompt,
            "chosen": thinking(number),
            "rejected": thinking(number, "\nNo.\n"),
            "source": "x",
        }
        for number in range(8)
    ]
    data = publish(bench, Preferences, "thoughts", pairs, PreferencesFacts(rows=8, paired=True))
    tuned = bench.attempt("train.dpo", {"model": base, "data": data}, adapter={"kind": "lora"}, **SMALL)
    assert tuned.status == "finished" and tuned.metrics["rows"] == 8, tuned.message
    student = bench.attempt(
        "train.distill", {"model": base, "teacher": base, "data": rows}, adapter={"kind": "lora"}, **SMALL
    )
    assert student.status == "finished", student.message
    assert not any("left out" in note for note in student.notes)
