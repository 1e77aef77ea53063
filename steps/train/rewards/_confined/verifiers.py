"""Verifiers of other libraries. A loader imports one; the function it returns reads a task once and gives a judge.

A judge takes an answer and returns its score; whatever it raises on an answer means 0. What a task raises is an error.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

Judge = Callable[[str], float]
Prepare = Callable[[dict[str, Any]], Judge]

_FENCED = re.compile(r"\s*```\w*\n(.*)\n```\s*", re.DOTALL)


def math_verify() -> Prepare:
    """Compare mathematics with math-verify; a reference that is no mathematics is compared as text."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    found_in_answers = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @cache
    def gold(reference: str) -> list[Any]:
        # A reference may be bare LaTeX, which is recognised only between dollars.
        bare = "$" not in reference and "\\boxed" not in reference
        return (parse(f"${reference}$", parsing_timeout=0) if bare else []) or parse(reference, parsing_timeout=0)

    def prepare(task: dict[str, Any]) -> Judge:
        reference: str = task["reference"]
        expected = gold(reference)

        def judge(answer: str) -> float:
            if "".join(answer.split()) == "".join(reference.split()):
                return 1.0
            given = parse(answer, found_in_answers, parsing_timeout=0)
            return float(bool(expected) and verify(expected, given, timeout_seconds=None))

        return judge

    return prepare


def reasoning_gym() -> Prepare:
    """Ask the data set that made the task; text in `<answer>` tags is the answer where there are any."""
    import reasoning_gym as gym
    from reasoning_gym.utils import extract_answer

    @cache
    def dataset(name: str, config: str) -> Any:
        # What verifiers read of a config are its numbers (bounds, tolerances); texts may stand for other types.
        numbers = {key: value for key, value in json.loads(config).items() if isinstance(value, int | float)}
        return gym.create_dataset(name, **{**numbers, "seed": 0, "size": 1})

    def prepare(task: dict[str, Any]) -> Judge:
        made_by = dataset(task["dataset"], json.dumps(task.get("config", {})))
        entry = task["entry"]
        # JSON has no tuples, and some verifiers compare with them: take the form in which the reference is right.
        if entry["answer"] is not None and made_by.score_answer(entry["answer"], entry) < 1:
            entry = _with_tuples(entry)
        return lambda answer: made_by.score_answer(extract_answer(answer) or answer, entry)

    return prepare


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def json_schema() -> Prepare:
    """Validate JSON with jsonschema; a code fence around all of it is taken off."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def prepare(task: dict[str, Any]) -> Judge:
        validator = validator_for(task["schema"], default=Draft202012Validator)(task["schema"])

        def judge(answer: str) -> float:
            fenced = _FENCED.fullmatch(answer)
            value = json.loads(fenced[1] if fenced else answer, parse_constant=refuse)
            return float(validator.is_valid(value))

        return judge

    return prepare


LOADERS: dict[str, Callable[[], Prepare]] = {
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "json_schema": json_schema,
}
