"""data.label_steps: the label of a step is what the model makes of it, and a process reward learns from such labels."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from steps.artifacts import Samples, SamplesFacts
from steps.data.label_steps import Answer, LabelSteps, labels_of
from steps.frame import Resources
from steps.frame.errors import UserError
from steps.lm.chat import render, token_ids
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.generate import Decoding, questions
from steps.lm.reward_model import RewardScorer, beginnings, split_steps
from steps.lm.rows import read_jsonl
from steps.lm.tasks import EMPTY_THINKING, Rollout, Task
from tests.conftest import Bench
from tests.steps.conftest import better, curve, publish

SAMPLING: dict[str, Any] = {"max_new_tokens": 8, "dtype": "float32", "seed": 11}
LABELLING: dict[str, Any] = {"step_separator": " ", "max_new_tokens": 8, "dtype": "float32", "seed": 5}
GREEDY: dict[str, Any] = {**LABELLING, "temperature": 0, "completions": 1}


@pytest.fixture(scope="session")
def tried(bench: Bench, sorting: Any, sorting_model: Any) -> dict[str, Samples]:
    """Four answers to each of 800 tasks, and of 200 held-out ones."""
    settings = {**SAMPLING, "samples": 4}
    return {
        name: bench.run("data.sample", {"model": sorting_model, "data": sorting[name]}, **settings)[""]
        for name in ("train", "eval")
    }


@pytest.fixture(scope="session")
def labelled(bench: Bench, sorting_model: Any, tried: dict[str, Samples]) -> dict[str, Samples]:
    return {
        name: bench.run("data.label_steps", {"model": sorting_model, "data": data}, batch_size=256, **LABELLING)[""]
        for name, data in tried.items()
    }


def answers_of(samples: Samples) -> list[tuple[Task, str, list[int]]]:
    """Task, text and labels of every answer; the steps must be those that a reward model sees."""
    found = []
    for row in read_jsonl(samples.rows_file):
        for each in row["samples"]:
            assert [step["text"] for step in each["steps"]] == split_steps(each["text"], " ")
            assert all(step.keys() == {"text", "label"} for step in each["steps"])
            found.append((Task.of(row), each["text"], [step["label"] for step in each["steps"]]))
    return found


def with_texts(bench: Bench, name: str, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Samples:
    """Tasks with one given answer each, which nothing has verified."""
    given = [
        {**row, "samples": [{"text": text, "tokens": 6, "truncated": False, "score": None}]}
        for row, text in zip(rows, texts, strict=True)
    ]
    return publish(bench, Samples, name, given, SamplesFacts(rows=len(given), samples=len(given)))


@pytest.fixture(scope="session")
def greedy(bench: Bench, sorting: Any, sorting_model: Any) -> list[dict[str, Any]]:
    """Held-out tasks with the model's greedy answer."""
    settings = {**SAMPLING, "temperature": 0, "rewards": [{"kind": "exact"}]}
    found = bench.run("data.sample", {"model": sorting_model, "data": sorting["eval"]}, samples=1, **settings)[""]
    return list(read_jsonl(found.rows_file))


def test_a_greedy_answer_goes_on_as_it_did(bench: Bench, sorting_model: Any, greedy: list[dict[str, Any]]) -> None:
    """From any of its steps a greedy model finds its own answer again: all steps share the verdict on it."""
    texts = [row["samples"][0]["text"] for row in greedy]
    inputs = {"model": sorting_model, "data": with_texts(bench, "greedy", greedy, texts)}
    made = bench.run("data.label_steps", inputs, **GREEDY)[""]
    right = [row["samples"][0]["score"] == 1 for row in greedy]
    assert 20 < sum(right) < 180
    assert [labels for *_, labels in answers_of(made)] == [
        [int(good)] * len(text.split()) for good, text in zip(right, texts, strict=True)
    ]
    assert made.facts.pass_rate == sum(right) / len(right)


def test_a_spoilt_step_spoils_itself_and_what_follows(
    bench: Bench, sorting_model: Any, greedy: list[dict[str, Any]]
) -> None:
    right = [row for row in greedy if row["samples"][0]["score"] == 1]
    spoilt = []
    for row in right:
        first, second, third = row["samples"][0]["text"].split()
        spoilt.append(f"{first} {(int(second) + 1) % 10} {third}")
    data = with_texts(bench, "spoilt", right, spoilt)
    made = bench.run("data.label_steps", {"model": sorting_model, "data": data}, **GREEDY)[""]
    assert [labels for *_, labels in answers_of(made)] == [[1, 0, 0]] * len(right)
    # And the last step's label is the answer's own verdict, whatever the model would have done.
    wrong = [row for row in greedy if row["samples"][0]["score"] == 0]
    data = with_texts(bench, "references", wrong, [row["messages"][-1]["content"] for row in wrong])
    made = bench.run("data.label_steps", {"model": sorting_model, "data": data}, **GREEDY)[""]
    assert [labels[-1] for *_, labels in answers_of(made)] == [1] * len(wrong)
    assert 0 in [labels[0] for *_, labels in answers_of(made)]


def test_labels_follow_the_models_distribution(sorting_model: Any, labelled: dict[str, Samples]) -> None:
    """A completion is right by the chance of the reference's remaining tokens; where that is left, never."""
    import torch

    tokenizer, model = load_tokenizer(sorting_model.path), load_model(sorting_model.path, "float32").eval()
    stop = tokenizer.eos_token_id
    chances: dict[tuple[str, str], float] = {}
    labels: dict[tuple[str, str], int] = {}
    answers = answers_of(labelled["train"])
    before = {task.id: render(tokenizer, task.prompt, prompt=True) for task, *_ in answers}
    whole = {task.id: [*token_ids(tokenizer, before[task.id] + task.answer), stop] for task, *_ in answers}
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(list(whole.values()))).logits.double().log_softmax(-1)
    sure = {
        identity: [float(row[at - 1, token]) for at, token in enumerate(whole[identity])]
        for identity, row in zip(whole, logits, strict=True)
    }
    for task, text, found in answers:
        for begun, label in zip(beginnings(tokenizer, task.prompt, text, " "), found[:-1], strict=True):
            labels[task.id, begun] = label
            left = sure[task.id][len(token_ids(tokenizer, before[task.id] + begun)) :]
            chances[task.id, begun] = math.exp(sum(left)) if task.answer.startswith(begun) else 0.0
    hopeless = [place for place, chance in chances.items() if not chance]
    assert len(hopeless) > 100
    assert not any(labels[place] for place in hopeless)
    hopeful = [place for place, chance in chances.items() if chance]
    wanted = [1 - (1 - chances[place]) ** 4 for place in hopeful]
    off = sum(labels[place] for place in hopeful) - sum(wanted)
    assert len(hopeful) > 100
    assert abs(off) < 4 * math.sqrt(sum(each * (1 - each) for each in wanted))
    # Each label follows its own chance, not their mean alone.
    surprise = [(labels[place] - each) ** 2 for place, each in zip(hopeful, wanted, strict=True)]
    expected = [each * (1 - each) for each in wanted]
    spread = math.sqrt(sum(each * (1 - each) * (1 - 2 * each) ** 2 for each in wanted))
    assert abs(sum(surprise) - sum(expected)) < 4 * spread
    statistics = labelled["train"].facts.statistics
    assert statistics["beginnings"] == len(chances)
    deviation = math.sqrt(sum(each * (1 - each) / 4 for each in chances.values())) / len(chances)
    assert abs(statistics["completions_right"] - sum(chances.values()) / len(chances)) < 4 * deviation


def test_statistics_are_those_of_the_labels(labelled: dict[str, Samples], tried: dict[str, Samples]) -> None:
    facts = labelled["train"].facts
    found = answers_of(labelled["train"])
    assert (facts.rows, facts.samples) == (800, 3200) == (tried["train"].facts.rows, len(found))
    ends = [text == task.answer for task, text, _ in found]
    # An answer may be empty, and has no step then.
    assert [bool(labels) and labels[-1] for *_, labels in found] == ends
    assert facts.pass_rate == sum(ends) / 3200
    every = [label for *_, labels in found for label in labels]
    early = [0 in labels[:-1] for *_, labels in found]
    with_steps = sum(bool(labels) for *_, labels in found)
    wanted = {
        "right_steps": sum(every) / len(every),
        "steps_per_answer": len(every) / with_steps,
        "wrong_before_last": sum(early) / with_steps,
    }
    assert {name: facts.statistics[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert 0.2 < facts.statistics["right_steps"] < 0.5
    # What was sampled is as it was.
    assert [
        {**row, "samples": [{k: v for k, v in each.items() if k != "steps"} for each in row["samples"]]}
        for row in read_jsonl(labelled["train"].rows_file)
    ] == list(read_jsonl(tried["train"].rows_file))


def test_each_step_is_labelled_on_its_own() -> None:
    task = Task("t", (), "", "test")
    begun = [Task("t", (), "", "test", begun=text) for text in ("a\n", "a\nb\n", "a\nb\nc\n")]
    answer = Answer(Rollout(task, "a\nb\nc\nd", 7), ["a", "b", "c", "d"], begun)
    shares = {each.place: share for each, share in zip(begun, (0.25, 0.0, 0.75), strict=True)}
    assert labels_of(answer, False, shares, "hard") == [1, 0, 1, 0]
    assert labels_of(answer, True, shares, "majority") == [0, 0, 1, 1]
    assert labels_of(Answer(Rollout(task, "", 1), [], []), False, {}, "hard") == []


def test_rows_and_answers_bound_what_is_labelled(bench: Bench, sorting_model: Any, tried: dict[str, Samples]) -> None:
    inputs = {"model": sorting_model, "data": tried["train"]}
    made = bench.run("data.label_steps", inputs, rows=5, answers=2, **LABELLING)[""]
    kept = [[each["text"] for each in row["samples"]] for row in read_jsonl(made.rows_file)]
    given = [[each["text"] for each in row["samples"]] for row in read_jsonl(tried["train"].rows_file)]
    assert kept == [texts[:2] for texts in given[:5]]
    assert (made.facts.rows, made.facts.samples) == (5, 10)


def test_labels_repeat_and_resume_to_the_same_bytes(
    sorting_model: Any, tried: dict[str, Samples], fresh: Callable[[], Bench]
) -> None:
    inputs = {"model": sorting_model, "data": tried["train"]}
    settings = {**LABELLING, "rows": 30, "batch_size": 64}
    first, second, disturbed, shared = fresh(), fresh(), fresh(), fresh()
    undisturbed = first.run("data.label_steps", inputs, **settings)[""]
    assert second.run("data.label_steps", inputs, **settings)[""].digest == undisturbed.digest
    scratch = f"work/{undisturbed.manifest.key[:16]}/scratch/completions"
    lines = (first.root / scratch / "0.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) >= 4
    half = len(lines) // 2
    (disturbed.root / scratch).mkdir(parents=True)
    (disturbed.root / scratch / "0.jsonl").write_text("".join(lines[:half]) + lines[half][:30])
    assert disturbed.run("data.label_steps", inputs, **settings)[""].digest == undisturbed.digest
    two = Resources(processes=2, cpus=2)
    assert shared.run("data.label_steps", inputs, resources=two, **settings)[""].digest == undisturbed.digest
    # What is kept is not sampled again: completions that were all spoilt leave no step right but last ones.
    spoilt = fresh()
    (spoilt.root / scratch).mkdir(parents=True)
    written = [(number, [["x", *rest] for _, *rest in batch]) for number, batch in map(json.loads, lines)]
    (spoilt.root / scratch / "0.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    found = answers_of(spoilt.run("data.label_steps", inputs, **settings)[""])
    assert not any(label for *_, labels in found for label in labels[:-1])
    assert any(labels[-1] for *_, labels in found)


def test_a_process_reward_learns_from_the_labels(
    bench: Bench, sorting_model: Any, labelled: dict[str, Samples]
) -> None:
    """Of each held-out task one step: its label is told better than by the commoner one, and than before training."""
    inputs = {"model": sorting_model, "data": labelled["train"], "eval": labelled["eval"]}
    model = bench.run(
        "train.reward",
        inputs,
        process=True,
        step_separator=" ",
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=80,
        learning_rate=1e-3,
        dtype="float32",
        seed=3,
    )[""]
    accuracy = curve(bench, model, "eval_step_accuracy")
    assert accuracy[80] > accuracy[0] + 0.1
    commoner = labelled["train"].facts.statistics["right_steps"] > 0.5
    held_out = answers_of(labelled["eval"])[::4]
    assert len({task.id for task, *_ in held_out}) == len(held_out) == 200
    scores = RewardScorer(model.path).step_scores([Rollout(task, text, 1) for task, text, _ in held_out])
    chosen = [number % len(labels) for number, (*_, labels) in enumerate(held_out)]
    wanted = [bool(labels[step]) for step, (*_, labels) in zip(chosen, held_out, strict=True)]
    told = [(own[step] > 0.5) == label for step, own, label in zip(chosen, scores, wanted, strict=True)]
    assert better([label == commoner for label in wanted], told) < 0.01


@pytest.mark.parametrize(
    ("separator", "wanted"),
    [
        ("\n", ["The first is\n\n", "The first is\n\n  so the second\n", "The first is\n\n  so the second\nand \n"]),
        ("\n\n", ["The first is\n\n"]),
        (" ", ["The", "The first", "The first is\n\n ", "The first is\n\n  so", "The first is\n\n  so the"]),
    ],
)
def test_a_beginning_has_the_tokens_of_the_whole(pico: Any, separator: str, wanted: list[str]) -> None:
    tokenizer = load_tokenizer(pico.path)
    prompt = [{"role": "user", "content": "Which?"}]
    answer = "The first is\n\n  so the second\nand \nthe third"
    found = beginnings(tokenizer, prompt, answer, separator)
    assert len(found) == len(split_steps(answer, separator)) - 1
    before = render(tokenizer, prompt, prompt=True)
    whole = token_ids(tokenizer, before + answer)
    for beginning in found:
        ids = token_ids(tokenizer, before + beginning)
        assert ids == whole[: len(ids)]
    assert found[: len(wanted)] == wanted


def test_a_begun_answer_follows_the_prompt_it_was_sampled_from(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)

    def prompt(begun: str, thinking: bool | None) -> str:
        task = Task("t", ({"role": "user", "content": "What is it?"},), "", "test", begun=begun)
        (question,) = questions(tokenizer, [task], Decoding(thinking=thinking), 1)
        assert question.opened == begun
        return str(tokenizer.decode(list(question.ids))).rpartition("assistant\n")[2]

    assert prompt("It is", None) == "It is"
    assert prompt("It is", False) == f"{EMPTY_THINKING}It is"
    for thinking in (None, True):
        assert prompt("<think>\nWell,\n", thinking) == "<think>\nWell,\n"
    for begun, thinking, said in (("It is", True, "begins without thinking"), ("<think>\n", False, "begins with thin")):
        with pytest.raises(UserError, match=f"task t: its answer {said}"):
            prompt(begun, thinking)


def test_each_beginning_has_random_numbers_of_its_own(pico: Any) -> None:
    prompt = ({"role": "user", "content": "What?"},)
    tasks = [Task("t", prompt, "", "test", begun=begun) for begun in ("", "a", "b", "answer")]
    asked = questions(load_tokenizer(pico.path), tasks, Decoding(), 2)
    keys = [each.key(0) for each in asked]
    assert keys[:2] == ["0/t/0", "0/t/1"], "as where nothing is begun"
    assert len({*keys, *(f"{key}/answer" for key in keys)}) == 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0}, "completions: 4 greedy ones are all the same"),
        ({"judge": "base"}, "`judge` is given, but no reward of kind `judge` asks it"),
        ({"verifier": {"kind": "reward_model"}}, "asks the step's input `reward_model`, which is not given"),
        ({"step_separator": ""}, "at least 1 character"),
        ({"estimate": "soft"}, "'hard' or 'majority'"),
    ],
)
def test_bad_settings_are_refused_before_the_run(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LabelSteps.model_validate({"model": "base", "data": "tries", **settings})


def test_what_cannot_be_labelled_is_refused(bench: Bench, sorting_model: Any, tried: dict[str, Samples]) -> None:
    inputs = {"model": sorting_model, "data": tried["eval"]}
    for settings, said in (
        (
            {"step_separator": "\n"},
            "step `label_steps`: none of 800 answers in `data` has two steps; set `step_separator` (now '\\n')",
        ),
        ({"thinking": True}, "its answer begins without thinking, and cannot be gone on with by `thinking: true`"),
        ({"max_new_tokens": 60}, "do not fit the model's context of 64"),
    ):
        result = bench.attempt("data.label_steps", inputs, **{**LABELLING, **settings})
        assert result.status == "refused", result
        assert said in result.message
