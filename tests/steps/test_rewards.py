"""Rewards: right, wrong and malformed answers, settings that are refused, and models that are asked."""

import json
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from steps.artifacts import Preferences, PreferencesFacts
from steps.frame import UserError
from steps.train.rewards import REWARDS, Models, Scorer, check_labels, check_tools, describe, total
from tests.steps.conftest import publish
from tests.steps.rollouts import READ, refused, rollout, scores

# Answers


@pytest.mark.parametrize(
    ("answer", "score"),
    [("42", 1), (" 42\n", 1), ("<think>6*7</think> 42", 1), ("042", 0), ("<think>42", 0), ("", 0)],
)
def test_exact(answer: str, score: float) -> None:
    assert scores({"kind": "exact"}, rollout(answer)) == [score]


def test_exact_may_ignore_case() -> None:
    answers = [rollout("STRASSE", "straße"), rollout("Yes", "no")]
    assert scores({"kind": "exact"}, *answers) == [0, 0]
    assert scores({"kind": "exact", "ignore_case": True}, *answers) == [1, 0]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("so it is 42.", "42", 1),
        ("\\boxed{1,234.50}", "#### 1234.5", 1),
        ("5-3 = 2 and −2", "-2", 1),
        ("from 10-3", "3", 1),
        ("6.02e23", "602000000000000000000000", 1),
        (".5", "0.50", 1),
        ("42 or 43", "42", 0),
        ("none", "42", 0),
        ("1" * 40 + "2", "1" * 40 + "3", 0),
        ("9" * 100_000, "1", 0),
        ("1e9999", "1", 0),
        ("1e-99999999999", "1", 0),
    ],
)
def test_numeric(answer: str, reference: str, score: float) -> None:
    assert scores({"kind": "numeric"}, rollout(answer, reference)) == [score]


def test_numeric_tolerances() -> None:
    assert scores({"kind": "numeric", "tolerance": 0.01}, rollout("3.14", "3.1415"), rollout("3.1", "3.1415")) == [1, 0]
    assert scores({"kind": "numeric", "relative": 0.1}, rollout("109", "100"), rollout("-109", "100")) == [1, 0]
    with pytest.raises(UserError, match=r"the reference 'one' of row 7 \(test.jsonl\) is no number"):
        scores({"kind": "numeric"}, rollout("1", "one"))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("0.5", "1/2", 1),
        ("The answer is $\\frac12$.", "\\frac{1}{2}", 1),
        ("First $7$, so \\boxed{\\sqrt{8}}", "$2\\sqrt{2}$", 1),
        ("$(x+1)^2$", "x^2+2x+1", 1),
        ("$\\{3, 2, 1\\}$", "\\{1,2,3\\}", 1),
        ("$(2, 1)$", "(1, 2)", 0),
        ("x**2 + 1", "x**2+1", 1),
        ("Paris", "Paris", 1),
        ("London", "Paris", 0),
        ("\\boxed{", "3", 0),
        ("$\\frac{" * 100, "3", 0),
        ("", "3", 0),
    ],
)
def test_math_verify(answer: str, reference: str, score: float) -> None:
    assert scores({"kind": "math_verify"}, rollout(answer, reference)) == [score]


def test_math_verify_is_bounded_and_works_in_threads() -> None:
    scorer = Scorer(READ.validate_python({"kind": "math_verify", "seconds": 1}))
    scorer([rollout("1")])
    found: list[float] = []
    answers = [rollout("$42$"), rollout("$9^{9^{9^{9}}}$"), rollout("$(10^{10^{10}})!$"), rollout("$6 \\cdot 7$")]
    began = time.monotonic()
    thread = threading.Thread(target=lambda: found.extend(scorer(answers)))
    thread.start()
    thread.join()
    assert found == [1, 0, 0, 1]
    assert time.monotonic() - began < 10


# Form


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>\nsix sevens\n</think>\n42", 1),
        ("  <think></think>42", 1),
        ("42", 0),
        ("<think>six sevens</think>", 0),
        ("<think>a</think><think>b</think> 42", 0),
        ("<think>a <think>b</think> 42", 0),
        ("well <think>a</think> 42", 0),
        ("<think>a</think> 42 </think>", 0),
        ("</think> 42 <think>", 0),
    ],
)
def test_think_format(text: str, score: float) -> None:
    assert scores({"kind": "think_format"}, rollout(text)) == [score]


def test_pattern() -> None:
    settings = {"kind": "pattern", "expression": r"answer: \d+"}
    assert scores(settings, rollout("<think>x</think>answer: 3"), rollout("the answer: 3")) == [1, 0]
    assert scores({**settings, "match": "search"}, rollout("the answer: 3!"), rollout("answer: x")) == [1, 0]
    assert scores({**settings, "match": "search", "on": "text"}, rollout("<think>answer: 3</think>")) == [1]


@pytest.mark.parametrize("bomb", ["(a+)+b", "(a|aa)+b", "(.*a){25}b"])
def test_pattern_bomb_is_bounded(bomb: str) -> None:
    began = time.monotonic()
    assert scores({"kind": "pattern", "expression": bomb, "seconds": 0.2}, rollout("a" * 60 + "!")) == [0]
    assert time.monotonic() - began < 5


def test_json_schema() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    answers = [
        '{"a": 1}',
        '```json\n{"a": 1}\n```',
        '{"a": "1"}',
        "{}",
        '{"a": 1} and',
        '{"a": NaN}',
        "",
        "[" * 200_000,
    ]
    found = scores({"kind": "json_schema", "against": schema}, *map(rollout, answers))
    assert found == [1, 1, 0, 0, 0, 0, 0, 0]


def test_json_schema_bomb_is_bounded() -> None:
    schema = {"type": "string", "pattern": "^(a+)+$"}
    settings = {"kind": "json_schema", "against": schema, "seconds": 0.5}
    assert scores(settings, rollout(json.dumps("a" * 60 + "!")), rollout('"aaa"')) == [0, 1]


# Length


def test_length() -> None:
    lengths = [rollout("", tokens=count) for count in (0, 50, 100, 150, 200, 900)]
    assert scores({"kind": "length", "target": 100}, *lengths) == [0, 0.5, 1, 0.5, 0, 0]
    assert scores({"kind": "length", "limit": 100}, *lengths) == [1, 1, 1, 0.5, 0, 0]


def test_forms_agree_with_trl() -> None:
    """TRL's own rewards are the yardstick where they compute the same thing from tokens."""
    from trl.rewards.accuracy_rewards import get_cosine_scaled_reward
    from trl.rewards.format_rewards import think_format_reward
    from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    lengths = [0, 79, 80, 81, 90, 99, 100, 101, 500]
    ids = [[1] * length for length in lengths]
    rollouts = [rollout("\\boxed{42}" if place % 2 else "\\boxed{41}", tokens=n) for place, n in enumerate(lengths)]
    theirs = get_soft_overlong_punishment(100, 20)(completion_ids=ids)
    assert scores({"kind": "overlong", "max_length": 100, "cache": 20}, *rollouts) == pytest.approx(theirs)

    completions = [[{"role": "assistant", "content": each.text}] for each in rollouts]
    theirs = get_cosine_scaled_reward(100)(completions=completions, solution=["$42$"] * len(ids), completion_ids=ids)
    ours = scores({"kind": "cosine", "max_length": 100, "correctness": "math_verify"}, *rollouts)
    assert ours == pytest.approx(theirs)

    texts = ["a b c d e f", "a b c d a b c d a b c d", "a a a a a a a a", "a b", ""]
    ids = [[ord(word) for word in text.split()] for text in texts]
    theirs = get_repetition_penalty_reward(3, -1.0)(completion_ids=ids)
    assert scores({"kind": "repetition", "size": 3}, *map(rollout, texts)) == pytest.approx(theirs)

    texts = ["<think>a</think>b", "<think>a", "a</think>b", "b"]
    theirs = think_format_reward([[{"content": text}] for text in texts])
    assert scores({"kind": "think_format"}, *map(rollout, texts)) == theirs


def test_repetition_sees_loops_without_spaces() -> None:
    loop, text = "哈" * 200, "天地玄黄宇宙洪荒日月盈昃辰宿列张"
    assert scores({"kind": "repetition"}, rollout(loop)) == [0]
    found = scores({"kind": "repetition", "unit": "characters"}, rollout(loop), rollout(text))
    assert found[0] < -0.9
    assert found[1] == 0


def test_cosine_takes_any_reward_as_its_correctness() -> None:
    settings = {"kind": "cosine", "max_length": 100, "correctness": {"kind": "numeric", "tolerance": 1}}
    spec = READ.validate_python(settings)
    assert READ.validate_json(spec.model_dump_json()) == spec
    assert Scorer(spec)([rollout("41.5", tokens=0), rollout("50", tokens=0)]) == [1, -1]


# Settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "pattern", "expression": "(a"}, "no regular expression: missing )"),
        ({"kind": "json_schema", "against": {"type": "objct"}}, "no JSON Schema: 'objct' is not valid"),
        ({"kind": "length"}, "give either `target` or `limit`"),
        ({"kind": "length", "target": 1, "limit": 2}, "give either `target` or `limit`"),
        ({"kind": "overlong", "max_length": 20, "cache": 20}, "`cache` (20) must be less than `max_length` (20)"),
        ({"kind": "cosine", "max_length": 5, "correctness": "exakt"}, "no reward `exakt`; did you mean `exact`?"),
        ({"kind": "cosine", "max_length": 5, "correctness": {"tolerance": 1}}, "settings with `kind`"),
        ({"kind": "external", "command": ["no-such-prover"]}, "there is no program `no-such-prover`"),
        ({"kind": "external", "command": []}, "`command` is empty"),
        ({"kind": "user", "path": "words"}, "write `package.module:function` or `file.py:function`"),
        ({"kind": "user", "path": "nowhere.py:words"}, "no such file"),
        ({"kind": "user", "path": "steps.nowhere:words"}, "there is no module `steps.nowhere`"),
        ({"kind": "user", "path": "steps.lm.tasks:read_task"}, "no function `read_task`; did you mean `read_tasks`?"),
        ({"kind": "exact", "weight": float("nan")}, "finite number"),
        ({"kind": "numeric", "tolerance": -1}, "greater than or equal to 0"),
        ({"kind": "exact", "case": True}, "Extra inputs are not permitted"),
        ({"kind": "exakt"}, "does not match any of the expected tags"),
    ],
)  # fmt: skip
def test_settings_are_refused_when_they_are_read(settings: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(settings)


def test_totals_and_labels() -> None:
    specs = [
        READ.validate_python({"kind": "exact", "weight": 2}),
        READ.validate_python({"kind": "length", "limit": 5, "weight": -0.5, "name": "short"}),
        READ.validate_python({"kind": "numeric", "weight": 0}),
    ]
    check_labels(specs)
    sums, parts = total([Scorer(spec) for spec in specs], [rollout("42", tokens=5), rollout("7", tokens=5)])
    assert sums == [1.5, -0.5]
    assert parts == {"exact": [1, 0], "short": [1, 1], "numeric": [1, 0]}
    with pytest.raises(ValueError, match="two rewards are called `exact`"):
        check_labels([specs[0], specs[0]])
    with pytest.raises(UserError, match="two rewards are called `exact`"):
        total([Scorer(specs[0]), Scorer(specs[0])], [rollout("42")])


def test_models_must_be_there_and_be_asked() -> None:
    judge, exact = READ.validate_python({"kind": "judge"}), READ.validate_python({"kind": "exact"})
    hidden = READ.validate_python({"kind": "cosine", "max_length": 9, "correctness": "reward_model"})
    check_tools([judge, exact], None, "ref")
    check_tools([hidden], "ref", None)
    for rewards, reward_model, asked, sentence in [
        ([judge], None, None, "the reward `judge` asks the step's input `judge`, which is not given"),
        ([exact, hidden], None, None, "the reward `reward_model` asks the step's input `reward_model`"),
        ([exact], "ref", None, "`reward_model` is given, but no reward of kind `reward_model` asks it"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_tools(rewards, reward_model, asked)
    with pytest.raises(UserError, match="needs the step's input `judge`"):
        Scorer(judge, Models())([rollout("42")])


# Models


def test_judge_is_the_probability_of_yes(pico: Any) -> None:
    import torch

    from steps.lm.chat import render, token_ids
    from steps.lm.checkpoint import load_model, load_tokenizer
    from steps.train.rewards._tools import judge_prompt

    question = "Is it {reference}?"
    answers = [rollout("42"), rollout("<think>long " * 20 + "</think> a longer answer"), rollout("")]
    scorer = Scorer(READ.validate_python({"kind": "judge", "question": question}), Models(judge=pico))
    found = scorer(answers)
    assert found == scorer(answers)
    model, tokenizer = load_model(pico.path, "float32"), load_tokenizer(pico.path)
    yes, no = (token_ids(tokenizer, word)[0] for word in ("Yes", "No"))
    for answer, score in zip(answers, found, strict=True):
        prompt = judge_prompt(answer, question)
        assert "Is it 42?" in prompt
        assert "long " not in prompt
        text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids(tokenizer, text)])).logits[0, -1]
        assert score == pytest.approx(torch.sigmoid(logits[yes] - logits[no]).item(), abs=0.02)


def test_reward_model_is_asked(bench: Any, pico: Any) -> None:
    from steps.lm.reward_model import RewardScorer

    prompt = [{"role": "user", "content": "What is it?"}]
    rows = [
        {"id": str(place), "prompt": prompt, "chosen": f"it is {place}", "rejected": "no", "source": "test"}
        for place in range(4)
    ]
    data = publish(bench, Preferences, "asked", rows, PreferencesFacts(rows=len(rows), paired=True))
    inputs = {"model": pico, "data": data}
    model = bench.run("train.reward", inputs, adapter={"kind": "full"}, max_steps=1, batch_size=4)[""]
    answers = [rollout("it is 3"), rollout("no")]
    found = Scorer(READ.validate_python({"kind": "reward_model"}), Models(reward_model=model))(answers)
    assert found == pytest.approx(RewardScorer(model.path).score(answers))
    assert found[0] != found[1]


# For humans


def test_every_reward_and_every_key_is_described() -> None:
    rows = describe()
    assert {row["name"] for row in rows} == set(REWARDS)
    for row in rows:
        assert row["summary"].endswith((".", "`."))
        for name, key in row["keys"].items():
            assert key.get("description"), f"{row['name']}.{name}"


def test_reading_settings_imports_nothing_heavy() -> None:
    program = (
        "import sys, steps.train.rewards\n"
        "print(sorted({'torch', 'sympy', 'regex', 'jsonschema', 'numpy', 'reasoning_gym'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
