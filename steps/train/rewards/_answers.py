"""Rewards that compare the answer with the reference as text or as a number."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated

from pydantic import Field

from steps.frame.errors import UserError
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import reward

# A minus is a sign unless something is subtracted from: `= -3`, but `5-3`. Commas part thousands only.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d{1,4}(?!\d))?",
    re.ASCII,
)


_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@reward(reference="https://arxiv.org/abs/2501.12948")
def exact(rollouts: Sequence[Rollout], *, ignore_case: bool = False) -> Sequence[float]:
    """1 where the answer is the reference (white space at the ends aside), else 0.

    Args:
        rollouts: sampled answers.
        ignore_case: let capital and small letters count as the same.
    """

    def same(rollout: Rollout) -> bool:
        given, wanted = rollout.answer.strip(), rollout.task.answer.strip()
        return given.casefold() == wanted.casefold() if ignore_case else given == wanted

    return [float(same(rollout)) for rollout in rollouts]


def stated_answer(text: str) -> str:
    """Return what a text gives as its answer: in `<answer>` tags, in the last `\\boxed{}`, its last number, or all."""
    for pattern in (_TAGGED, _BOXED):
        if found := pattern.findall(text):
            stated = found[-1].strip()
            return number_in(stated) if _NUMBER.fullmatch(stated) else stated
    return number_in(text)


def number_in(text: str) -> str:
    """Return the last number in a text as equal numbers are written alike; the text where there is none."""
    found = last_number(text)
    return text.strip() if found is None else f"{found.normalize():f}"


@reward(reference="https://arxiv.org/abs/2110.14168", answer_in=number_in)
def numeric(
    rollouts: Sequence[Rollout],
    *,
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    relative: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Sequence[float]:
    """1 where the last number of the answer equals the last number of the reference, else 0.

    Args:
        rollouts: sampled answers.
        tolerance: largest difference that still counts as equal.
        relative: the same as a share of the reference; the larger of the two holds.

    Raises:
        UserError: a reference has no number.
    """

    def same(rollout: Rollout) -> bool:
        wanted, given = last_number(rollout.task.answer), last_number(rollout.answer)
        if wanted is None:
            raise UserError(
                f"reward `numeric`: the reference {rollout.task.answer[:60]!r} of {place(rollout)} is no number"
            )
        if given is None:
            return False
        return abs(given - wanted) <= max(Decimal(tolerance), Decimal(relative) * abs(wanted))

    return [float(same(rollout)) for rollout in rollouts]


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, `1,234.5` and `6e-3` included; None where there is none."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    return None if found is None else Decimal(found[0].replace(",", "").replace("−", "-"))


def place(rollout: Rollout) -> str:
    """Say for an error message where a rollout's task stands."""
    return f"row {rollout.task.id} ({rollout.task.source})"
