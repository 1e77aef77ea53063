"""What ranks the answers to a task: a language model asked to compare them, a reward model, or a verifier's scores."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from steps.frame.errors import UserError
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer
from steps.lm.tasks import Rollout, Task

LETTERS = ("A", "B")


class Ranker(Protocol):
    """Gives answers to one task numbers by which they are ranked."""

    def scores(self, rollouts: Sequence[Rollout], verified: Sequence[float | None]) -> list[float]:
        """Return one number for each answer, the better the higher."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what was noticed on the way."""
        ...


class VerifiedScores:
    """Ranks by the scores that the samples already have."""

    def scores(self, rollouts: Sequence[Rollout], verified: Sequence[float | None]) -> list[float]:
        """Return the verifier's scores.

        Raises:
            UserError: there are none.
        """
        known = [score for score in verified if score is not None]
        if len(known) < len(verified):
            raise UserError(
                f"task {rollouts[0].task.id} has answers without a score; sample with `rewards:`, or name a `judge` or "
                "a `reward_model`"
            )
        return known

    def metrics(self) -> dict[str, float]:
        """Return nothing: the scores are given."""
        return {}


class RewardScores:
    """Ranks by a reward model."""

    def __init__(self, path: Path, batch_size: int) -> None:
        from steps.lm.reward_model import RewardScorer

        self._scorer = RewardScorer(path, batch_size)

    def scores(self, rollouts: Sequence[Rollout], verified: Sequence[float | None]) -> list[float]:
        """Return the rewards."""
        return self._scorer.score(rollouts)

    def metrics(self) -> dict[str, float]:
        """Return nothing: a reward depends on no order."""
        return {}


class Judge:
    """Ranks by the share of comparisons that an answer wins, as a language model sees it.

    Every two answers are shown in both orders and the probabilities of the letters averaged, because models prefer a
    place (RLAIF, https://arxiv.org/abs/2309.00267, section 2.1; https://arxiv.org/abs/2306.05685).
    """

    def __init__(self, path: Path, dtype: Dtype, criterion: str, batch_size: int) -> None:
        from steps.lm.device import own_device

        self._tokenizer = load_tokenizer(path)
        self._model = load_model(path, dtype)
        self._model.to(own_device())  # pyright: ignore[reportArgumentType]
        self._criterion = criterion
        self._batch_size = batch_size
        self._compared = 0
        self._agreed = 0
        self._first = 0.0

    def scores(self, rollouts: Sequence[Rollout], verified: Sequence[float | None]) -> list[float]:
        """Return for each answer its mean probability of winning against each other."""
        from steps.lm.choice import choice_probabilities

        pairs = list(combinations(range(len(rollouts)), 2))
        orders = [order for pair in pairs for order in (pair, pair[::-1])]
        prompts = [comparison(self._criterion, rollouts[one], rollouts[other]) for one, other in orders]
        firsts = [
            first for first, _ in choice_probabilities(self._model, self._tokenizer, prompts, LETTERS, self._batch_size)
        ]
        wins = [0.0] * len(rollouts)
        for number, (one, other) in enumerate(pairs):
            there, back = firsts[2 * number], firsts[2 * number + 1]
            won = (there + 1 - back) / 2
            wins[one] += won
            wins[other] += 1 - won
            self._compared += 1
            self._agreed += (there > 0.5) != (back > 0.5)
            self._first += (there + back) / 2
        return [won / (len(rollouts) - 1) for won in wins]

    def metrics(self) -> dict[str, float]:
        """Return how often both orders gave one winner, and the mean probability of the answer shown first."""
        if not self._compared:
            return {}
        return {"order_agreement": self._agreed / self._compared, "first_preferred": self._first / self._compared}


def comparison(criterion: str, first: Rollout, second: Rollout) -> list[Mapping[str, str]]:
    """Return the question to a judge which of two answers is better; thinking is not shown."""
    text = (
        f"{criterion}\n\nQuestion: {question(first.task)}\n\nAnswer A: {first.answer}\n\nAnswer B: {second.answer}\n\n"
        "Reply with the letter of the better answer, A or B."
    )
    return [{"role": "user", "content": text}]


def question(task: Task) -> str:
    """Return a task's prompt as one text: the user's words, with the roles before them where there are others."""
    if len(task.prompt) == 1:
        return task.prompt[0]["content"]
    return "\n".join(f"{message['role']}: {_said(message)}" for message in task.prompt)


def _said(message: Mapping[str, Any]) -> str:
    """Return what a message says, its tool calls as JSON behind it."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(filter(None, (message["content"], *calls)))
