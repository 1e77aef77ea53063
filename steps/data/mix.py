"""`data.mix`: several data sets in given shares, with thinking or without."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from steps.artifacts import Dataset, DatasetFacts, Draft
from steps.data._conversations import row_id
from steps.data._hashing import different_ids, uniform
from steps.frame import Input, Job, Resources, Seed, StepConfig, UserError, step
from steps.lm.rows import read_jsonl, write_jsonl
from steps.lm.tasks import EMPTY_THINKING, THINK_OPEN, final_answer

Row = dict[str, Any]
Mode = Literal["keep", "strip"]


class MixData(StepConfig):
    """Mix data sets in given shares; a part's thinking can be kept or struck out, for models that switch."""

    parts: list[Input[Dataset]] = Field(min_length=1)
    """What is mixed; a set that is named twice is two parts, say one with its thinking and one without."""
    weights: list[float] | None = None
    """Share of each part, relative to one another; equal shares when unset."""
    thinking: list[Mode] | None = None
    """What becomes of each part's thinking; `strip` puts an empty `<think>` block before every answer instead."""
    flags: bool = False
    """End the last user's turn with ` /think` or ` /no_think`, by which the model can then be switched."""
    rows: int | None = Field(default=None, ge=1)
    """Rows in all; when unset, as many as the shares allow, which cuts every part to the one that is short. No row of a
    part is taken twice."""
    union: bool = False
    """Take every row of every part, each once, in place of shares; of equal rows the one that has a task."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_for_each_part(self) -> "MixData":
        for key in ("weights", "thinking"):
            given = getattr(self, key)
            if given is not None and len(given) != len(self.parts):
                raise ValueError(f"{key}: {len(given)} entries for {len(self.parts)} parts; give one for each part")
        if self.weights is not None and min(self.weights) <= 0:
            raise ValueError("weights: each must be above 0; leave out a part that is not wanted")
        if self.union and (self.weights is not None or self.rows is not None):
            raise ValueError("union: it takes every row; leave `weights` and `rows` out, or `union`")
        return self


@step("data.mix", produces=Dataset, reference="https://arxiv.org/abs/2505.09388", resources=Resources(cpus=1))
def mix_data(config: MixData, job: Job) -> Draft:
    """Draw each part's share by hash, shuffle, write."""
    weights = config.weights or [1.0] * len(config.parts)
    modes: list[Mode] = config.thinking or ["keep"] * len(config.parts)
    parts = [_usable(part, mode, config.flags) for part, mode in zip(config.parts, modes, strict=True)]
    for number, (part, usable) in enumerate(zip(config.parts, parts, strict=True), start=1):
        if lost := part.facts.rows - len(usable):
            job.note(f"{lost} of {part.facts.rows} rows of part {number} were left out: they answer by thoughts alone")
    available = [len(part) for part in parts]
    counts = available if config.union else shares(weights, available, config.rows)
    _check_counts(config, job.name, counts, parts)
    drawn = [
        (uniform(config.seed, "order", number, row["id"]), number, row)
        for number, (count, part) in enumerate(zip(counts, parts, strict=True), start=1)
        for row in _sample(part, count, config.seed, number)
    ]
    rows = [row for _, _, row in sorted(drawn, key=lambda each: each[:2])]
    if config.union:
        rows = _each_once(rows)
    ids = different_ids((row["id"], row_id(row)) for row in rows)
    rows = [{**row, "id": own} for row, own in zip(rows, ids, strict=True)]
    _tell_left_out(job, counts, available)
    out = job.output()
    write_jsonl(out / "rows.jsonl", rows)
    statistics = {f"part_{number}": float(count) for number, count in enumerate(counts, start=1)}
    statistics["thinking"] = float(sum(thinks(row) for row in rows))
    job.log_metrics({"rows": len(rows), **statistics})
    return Dataset.draft(out, DatasetFacts(rows=len(rows), statistics=statistics))


def _each_once(rows: Sequence[Row]) -> list[Row]:
    """Return equal rows once: those of the same messages, of which the same are learned, and of the same task.

    A row without a task is left out where another has the same messages and a task: that can be verified too.
    """

    def said(row: Row) -> str:
        return f"{row_id(row)} {[message.get('learn') is not False for message in row['messages']]}"

    verified = {said(row) for row in rows if row.get("task")}
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        task = row.get("task") or None
        if task is not None or said(row) not in verified:
            found.setdefault((said(row), json.dumps(task, sort_keys=True)), row)
    return list(found.values())


def _tell_left_out(job: Job, counts: Sequence[int], available: Sequence[int]) -> None:
    left = {number: have - count for number, (count, have) in enumerate(zip(counts, available, strict=True), start=1)}
    job.log_metrics({f"left_out_{number}": float(rows) for number, rows in left.items()})
    if any(left.values()):
        told = ", ".join(f"{rows} of {available[number - 1]} of part {number}" for number, rows in left.items() if rows)
        job.note(f"by their shares these rows are left out: {told} (`union: true` takes all)")


def shares(weights: Sequence[float], available: Sequence[int], rows: int | None) -> list[int]:
    """Divide `rows` by weight, the largest remainders rounded up; without `rows`, the most that `available` allows.

    >>> shares([3, 1], [100, 100], 10)
    [8, 2]
    >>> shares([3, 1], [90, 100], None)
    [90, 30]
    """
    total = sum(weights)
    if rows is None:
        most = min(have / weight for have, weight in zip(available, weights, strict=True))
        return [min(have, round(most * weight)) for have, weight in zip(available, weights, strict=True)]
    exact = [rows * weight / total for weight in weights]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: rows - sum(counts)]:
        counts[index] += 1
    return counts


def without_thinking(row: Row) -> Row:
    """Return a row's twin that does not think: every answer begins with the empty block."""
    messages = [
        {**message, "content": EMPTY_THINKING + final_answer(message["content"])}
        if message["role"] == "assistant" and not _only_calls(message)
        else message
        for message in row["messages"]
    ]
    return {**row, "id": f"{row['id']}:no_think", "messages": messages}


def _only_calls(message: Mapping[str, Any]) -> bool:
    """Whether a message calls tools and says nothing: there is no answer before which not to think."""
    return bool(message.get("tool_calls")) and not message["content"].strip()


def _answers(message: Mapping[str, Any]) -> bool:
    return bool(final_answer(message["content"]) or message.get("tool_calls"))


def thinks(row: Row) -> bool:
    """Whether the last answer has a thought in it."""
    content = row["messages"][-1]["content"]
    return THINK_OPEN in content and not content.startswith(EMPTY_THINKING)


def _check_counts(config: MixData, name: str, counts: Sequence[int], parts: Sequence[Sequence[Row]]) -> None:
    for number, (count, part) in enumerate(zip(counts, parts, strict=True), start=1):
        if count > len(part):
            raise UserError(
                f"step `{name}`: rows: {config.rows} asks for {count} rows of part {number}, which has {len(part)}; "
                "lower `rows` or its weight, or leave `rows` out"
            )
    if not sum(counts):
        short = min(range(len(parts)), key=lambda index: len(parts[index])) + 1
        raise UserError(f"step `{name}`: part {short} has too few rows with an answer for its weight; leave it out")


def _sample(part: Sequence[Row], count: int, seed: int, number: int) -> list[Row]:
    return sorted(part, key=lambda row: uniform(seed, number, row["id"]))[:count]


def _usable(part: Dataset, mode: Mode, flags: bool) -> list[Row]:
    """Read a part's rows in the form they are given out; a row whose answer is all thinking cannot be stripped."""
    rows = list(read_jsonl(part.rows_file))
    if mode == "strip":
        rows = [without_thinking(row) for row in rows if _answers(row["messages"][-1])]
    return [_flagged(row) for row in rows] if flags else rows


def _flagged(row: Row) -> Row:
    flag = " /think" if thinks(row) else " /no_think"
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "user")
    messages = [
        {**message, "content": message["content"] + flag} if index == last else message
        for index, message in enumerate(row["messages"])
    ]
    return {**row, "messages": messages}
