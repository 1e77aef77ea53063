"""Rewards for the form of an answer: thinking tags, a regular expression, a JSON Schema."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from steps.lm.tasks import THINK_CLOSE, THINK_OPEN, Rollout
from steps.train.rewards._reward import reward
from steps.train.rewards._sandbox import verified


def _is_expression(text: str) -> str:
    import regex

    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


def _is_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(dict(schema))
    except SchemaError as error:
        raise ValueError(f"no JSON Schema: {error.message} (at {error.json_path})") from None
    return schema


@reward(reference="https://arxiv.org/abs/2501.12948")
def think_format(rollouts: Sequence[Rollout]) -> Sequence[float]:
    """1 where the text is `<think>...</think>` once, then an answer; else 0.

    A tag that the chat template itself writes at the end of the prompt counts as the answer's.
    """

    def well_formed(rollout: Rollout) -> bool:
        text = rollout.text.strip()
        once = text.count(THINK_OPEN) == text.count(THINK_CLOSE) == 1
        return once and text.startswith(THINK_OPEN) and not rollout.truncated and bool(rollout.answer)

    return [float(well_formed(rollout)) for rollout in rollouts]


@reward(reference="https://docs.python.org/3/library/re.html#regular-expression-syntax")
def pattern(
    rollouts: Sequence[Rollout],
    *,
    expression: Annotated[str, AfterValidator(_is_expression)],
    match: Literal["full", "search"] = "full",
    on: Literal["answer", "text"] = "answer",
    seconds: Annotated[float, Field(gt=0, le=60)] = 1.0,
) -> Sequence[float]:
    """1 where a regular expression matches, else 0; also 0 where matching takes too long.

    Args:
        rollouts: sampled answers.
        expression: the regular expression, in Python's syntax; a dot matches line ends too.
        match: all of the text, or some part of it.
        on: the answer after the thinking, or the whole text.
        seconds: time for one answer; some expressions take exponential time on some texts.
    """
    import regex

    compiled = regex.compile(expression, regex.DOTALL)
    find = compiled.fullmatch if match == "full" else compiled.search

    def matches(rollout: Rollout) -> bool:
        try:
            return find(rollout.answer if on == "answer" else rollout.text, timeout=seconds) is not None
        except TimeoutError:
            return False

    return [float(matches(rollout)) for rollout in rollouts]


@reward(reference="https://json-schema.org/draft/2020-12")
def json_schema(
    rollouts: Sequence[Rollout],
    *,
    against: Annotated[Mapping[str, Any], AfterValidator(_is_schema)],
    seconds: Annotated[float, Field(gt=0, le=60)] = 2.0,
) -> Sequence[float]:
    """1 where the answer is JSON that a JSON Schema accepts, else 0; also 0 where checking takes too long.

    Args:
        rollouts: sampled answers; a code fence around all of the answer is taken off.
        against: the schema.
        seconds: time for one answer.
    """
    return verified("json_schema", [({"schema": dict(against)}, rollout.answer) for rollout in rollouts], seconds)
