"""Tasks: rows of a data set read as questions with a reference answer, and what a model answered to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steps.artifacts import Dataset, Samples
from steps.lm.rows import read_jsonl

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""Tags around what a model thinks before it answers (DeepSeek-R1, https://arxiv.org/abs/2501.12948)."""
EMPTY_THINKING = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
"""What an answer without thinking begins with (Qwen3, https://arxiv.org/abs/2505.09388, section 4.3)."""
PASSED = 1.0
"""Score from which an answer counts as right, where a recipe says nothing else."""


@dataclass(frozen=True)
class Task:
    """A question that can be asked of a model."""

    id: str
    prompt: tuple[Mapping[str, str], ...]
    """Messages up to the assistant's last turn."""
    answer: str
    """Reference answer: the assistant's last turn, without its thinking."""
    source: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    """What the task's own verifier needs; empty where it has none."""
    begun: str = ""
    """Beginning of the answer that is given: the model goes on from there. Answers hold it; their `tokens` do not."""

    @property
    def place(self) -> tuple[str, str]:
        """What tells it from other tasks: its id, and how far the answer is begun."""
        return self.id, self.begun

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Task":
        """Read a row of a Dataset or of Samples."""
        *prompt, last = row["messages"]
        answer = final_answer(last["content"])
        return cls(row["id"], tuple(prompt), answer, row["source"], row.get("task") or {})


@dataclass(frozen=True)
class Rollout:
    """One sampled answer to a task."""

    task: Task
    text: str
    """What the model wrote, special tokens removed, thinking included."""
    tokens: int
    """Length in tokens, the stop token included."""
    truncated: bool = False
    """Whether it ran out of tokens before its stop token."""

    @property
    def answer(self) -> str:
        """The text after the thinking; all of it where there is none."""
        return final_answer(self.text)


def final_answer(text: str) -> str:
    """Return what follows the thinking, stripped; empty where the thinking never ends."""
    if THINK_CLOSE in text:
        return text.rpartition(THINK_CLOSE)[2].strip()
    return "" if THINK_OPEN in text else text.strip()


def read_tasks(data: Dataset | Samples, limit: int | None = None) -> list[Task]:
    """Read the tasks of a data set in its order, at most `limit` of them."""
    return [task for _, task in zip(range(limit or data.facts.rows), _tasks(data), strict=False)]


def _tasks(data: Dataset | Samples) -> Iterator[Task]:
    for row in read_jsonl(data.rows_file):
        yield Task.of(row)


def read_rollouts(data: Samples) -> Iterator[tuple[Task, Sequence[Rollout], Sequence[float | None]]]:
    """Yield every task with its answers and what the verifier gave each (None where none was asked)."""
    for row in read_jsonl(data.rows_file):
        task = Task.of(row)
        rollouts = [Rollout(task, each["text"], each["tokens"], each["truncated"]) for each in row["samples"]]
        yield task, rollouts, [each["score"] for each in row["samples"]]


def has_passed(score: float, passed: float = PASSED) -> bool:
    """Say whether a score counts as right; a weighted sum may fall short of its bound by rounding."""
    return score >= passed - 1e-9


def pass_rate(scores: Sequence[float | None], passed: float = PASSED) -> float | None:
    """Return the share of a task's answers that passed; None where none was scored."""
    known = [score for score in scores if score is not None]
    return sum(has_passed(score, passed) for score in known) / len(known) if known else None
