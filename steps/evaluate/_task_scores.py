"""Judged answers to tasks, and the figures that come of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps.lm.scoring import share_interval
from steps.lm.tasks import Rollout, has_passed
from steps.train.rewards import Scorer

_DIGITS = 6
"""Decimals kept in the files."""


@dataclass(frozen=True)
class Solved:
    """The answers to one task, and which of them are right."""

    rollouts: Sequence[Rollout]
    right: Sequence[bool]
    votes: Sequence[str]
    """What each answer gives, without the prose around it."""

    @property
    def share(self) -> float:
        """Share of right answers: this task's pass@1."""
        return sum(self.right) / len(self.right)

    @property
    def majority(self) -> bool:
        """Whether the most frequent answer is right; of equally frequent ones, the one given first (maj@n)."""
        return self.right[self.votes.index(Counter(self.votes).most_common(1)[0][0])]


Answers = Sequence[Solved]
"""What one candidate answered, task by task."""


def judge(rollouts: Sequence[Sequence[Rollout]], scorer: Scorer, passed: float) -> Answers:
    """Say which answers are right."""
    flat = scorer([rollout for answers in rollouts for rollout in answers])
    scores = iter(flat)
    return [
        Solved(answers, [has_passed(next(scores), passed) for _ in answers], [*map(scorer.answer_in, answers)])
        for answers in rollouts
    ]


def metrics_of(answers: Answers, first: Answers | None = None) -> dict[str, float]:
    """Return a candidate's figures.

    Args:
        answers: the candidate's.
        first: those of the candidate that it is tested against.

    Returns:
        `accuracy` (pass@1, the mean over tasks) with its 95 % interval `accuracy_low` and `accuracy_high`,
        `majority` where tasks have several answers, `mean_tokens`, `truncated` (share of answers), and `p_value` of
        being no different from the first.
    """
    shares = [each.share for each in answers]
    low, high = share_interval(shares)
    every = [rollout for each in answers for rollout in each.rollouts]
    metrics = {"accuracy": sum(shares) / len(shares), "accuracy_low": low, "accuracy_high": high}
    if len(every) > len(answers):
        metrics["majority"] = sum(each.majority for each in answers) / len(answers)
    metrics["mean_tokens"] = sum(each.tokens for each in every) / len(every)
    metrics["truncated"] = sum(each.truncated for each in every) / len(every)
    if first is not None:
        metrics["p_value"] = sign_test([each.share for each in first], shares)
    return {name: round(value, _DIGITS) if name != "p_value" else value for name, value in metrics.items()}


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for that several were looked at (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        found[index] = largest
    return found


def corrected(measured: Mapping[str, Mapping[int | None, dict[str, float]]]) -> None:
    """Correct the p-values of candidates at the same budget for how many there are, in place."""
    budgets = dict.fromkeys(budget for own in measured.values() for budget in own)
    for budget in budgets:
        tested = [own[budget] for own in measured.values() if "p_value" in own.get(budget, {})]
        for metrics, value in zip(tested, holm([metrics["p_value"] for metrics in tested]), strict=True):
            metrics["p_value"] = value


def sign_test(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the two-sided exact p-value of paired values having no direction.

    With one answer a task, values are 0 or 1 and this is McNemar's exact test (https://doi.org/10.1007/BF02295996).
    """
    from scipy.stats import binomtest

    up = sum(right > left for left, right in zip(before, after, strict=True))
    down = sum(right < left for left, right in zip(before, after, strict=True))
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def task_rows(name: str, budget: int | None, answers: Answers) -> Iterator[Mapping[str, Any]]:
    """Yield one line of `rows.jsonl` a task; `score` is the share of right answers, `answer` the first one's text."""
    for each in answers:
        task, first = each.rollouts[0].task, each.rollouts[0]
        row = {
            "sample": task.id,
            "candidate": name,
            "prompt": [dict(message) for message in task.prompt],
            "reference_answer": task.answer,
            "answer": first.text,
            "score": round(each.share, _DIGITS),
            "tokens": round(sum(one.tokens for one in each.rollouts) / len(each.rollouts), 2),
            "truncated": sum(one.truncated for one in each.rollouts),
            "thinking_tokens": budget,
        }
        if len(each.rollouts) > 1:
            row["answers"] = [
                {"text": one.text, "right": right} for one, right in zip(each.rollouts, each.right, strict=True)
            ]
        yield row
