"""Audits of reinforcement learning: what tells a policy that learns the task from one that learns the reward."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from steps.artifacts import cut_half_line, read_lines
from steps.frame import Job, UserError
from steps.lm.chat import render
from steps.lm.generate import Continuation, opened_thinking, text_of
from steps.lm.tasks import Rollout, Task
from steps.train._stopping import LOGGED, StopCondition, Stopping
from steps.train._together import together
from steps.train.rewards import Scorer, total

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, TrainerCallback

HISTORY_NAME = "audits.jsonl"
_NONE = np.empty(0, np.float32)


class RewardsEqual(UserError):
    """For a whole epoch no group of answers differed in reward, so there was nothing to learn from."""


class Audits:
    """Judges every batch of rollouts for the trainer, and keeps what a person must see to trust the run.

    Processes that share the training each judge the answers to their own tasks; the audits are of all.
    """

    def __init__(
        self,
        job: Job,
        scorers: Sequence[Scorer],
        verifier: Scorer,
        group_size: int,
        epoch: int,
        stop_when: list[StopCondition],
        window: int = 1,
    ) -> None:
        self.job = job
        self.scorers = scorers
        self.verifier = verifier
        self.group_size = group_size
        self.epoch = epoch
        self.window = window
        """Optimizer steps that learn from one batch of rollouts."""
        self.stopping = Stopping(stop_when)
        self.dead_steps = 0
        """Steps in a row in which no group of answers differed in reward."""
        self._pending: dict[str, float] = {}
        self._ratios: list[np.ndarray[Any, Any]] = []

    def rewards(
        self, tasks: Sequence[Task], tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int]
    ) -> Callable[..., list[float]]:
        """Return the reward function in the form that TRL calls, in each process with the answers to its own tasks."""
        opened = opened_thinking(render(tokenizer, tasks[0].prompt, prompt=True))

        def reward(completion_ids: Any, task: list[int], **_: Any) -> list[float]:
            written = [Continuation(ids, bool(ids) and ids[-1] in stops) for ids in completion_ids]
            rollouts = [
                Rollout(tasks[index], opened + text_of(tokenizer, each.said), len(each.ids), not each.stopped)
                for index, each in zip(task, written, strict=True)
            ]
            return self.saw_rollouts(rollouts)

        return reward

    def saw_rollouts(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Judge this process's answers, in groups of `group_size`; measure those of all; return the total rewards.

        Raises:
            UserError: a reward failed, here or in another process.
        """
        tables = together(self.job, lambda: self._measured(rollouts, *total(self.scorers, rollouts)))
        self._saw(tables)
        return tables[self.job.rank]["reward"]

    def _measured(
        self, rollouts: Sequence[Rollout], sums: Sequence[float], parts: Mapping[str, Sequence[float]]
    ) -> dict[str, list[float]]:
        """Return what the audits need of each answer, by name."""
        known = next((parts[each.name] for each in self.scorers if each.asks_the_same_as(self.verifier)), None)
        texts = [rollout.text for rollout in rollouts]
        groups = [texts[start : start + self.group_size] for start in range(0, len(texts), self.group_size)]
        return {
            "reward": list(sums),
            "right": list(known if known is not None else self.verifier(rollouts)),
            "length": [float(rollout.tokens) for rollout in rollouts],
            "truncated": [float(rollout.truncated) for rollout in rollouts],
            "repetition": [repeated_share(text) for text in texts],
            "distinct": [len(set(group)) / self.group_size for group in groups for _ in group],
            **{f"reward/{name}": list(values) for name, values in parts.items()},
        }

    def _saw(self, tables: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Measure one batch of rollouts, of which each process has brought its own answers."""
        of = {name: np.concatenate([np.asarray(table[name], float) for table in tables]) for name in tables[0]}
        rewards, lengths, verified = of["reward"], of["length"], of["right"] >= 0.5
        grouped = rewards.reshape(-1, self.group_size)
        advantage = rewards - np.repeat(grouped.mean(1), self.group_size)
        found = {
            "reward/total": rewards.mean(),
            "reward/std_in_group": grouped.std(1).mean(),
            "accuracy": of["right"].mean(),
            "length/mean": lengths.mean(),
            "length/reward_correlation": _correlation(lengths, advantage),
            "truncated": of["truncated"].mean(),
            "repetition": of["repetition"].mean(),
            "groups/zero_variance": np.mean(np.ptp(grouped, axis=1) < 1e-9),
            "groups/distinct": of["distinct"].mean(),
            "hacking/rewarded_wrong": np.mean((advantage > 0) & ~verified),
            **{name: values.mean() for name, values in of.items() if name.startswith("reward/")},
        }
        for name, which in (("right", verified), ("wrong", ~verified)):
            if which.any():
                found[f"length/{name}"] = lengths[which].mean()
        self._pending = {name: float(value) for name, value in found.items()}
        self.dead_steps = self.dead_steps + self.window if found["groups/zero_variance"] == 1 else 0

    def saw_ratios(self, ratios: "torch.Tensor") -> None:
        """Take the importance ratios of one forward pass (any shape, positive)."""
        self._ratios.append(ratios.float().flatten().cpu().numpy())

    def log(self, step: int, logged: Mapping[str, float]) -> StopCondition | None:
        """Record one step's audits with what the trainer logged; return the condition that now ends the training.

        Raises:
            RewardsEqual: for a whole epoch no group of answers differed in reward.
        """
        values = {**self._pending, **{name: logged[name] for name in LOGGED if name in logged}}
        ratios = np.concatenate(together(self.job, lambda: np.concatenate([_NONE, *self._ratios])))
        if len(ratios):
            values |= {
                "ratio/mean": float(ratios.mean()),
                "ratio/p99": float(np.quantile(ratios, 0.99)),
                "ratio/max": float(ratios.max()),
            }
        self._ratios = []
        return self.record(step, values)

    def record(self, step: int, values: Mapping[str, float]) -> StopCondition | None:
        """Write values down by step; return the condition that now ends the training."""
        self.job.log_metrics(values, step=step)
        if not self.job.rank:
            with (self.job.scratch / HISTORY_NAME).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        if self.dead_steps >= self.epoch:
            raise RewardsEqual(
                f"step `{self.job.name}`: for a whole epoch ({self.epoch} steps) all answers to a task were rewarded "
                "alike, so there is nothing to learn from; give easier or harder tasks, or another reward"
            )
        return self.stopping.check(values)

    def resume(self, step: int) -> StopCondition | None:
        """Count on from what an earlier attempt recorded up to a step; return the condition that was met by then."""
        met = None
        if not self.job.rank:
            cut_half_line(self.job.scratch / HISTORY_NAME)
        for values in self.history():
            if values["step"] > step:
                break
            met = self.stopping.check(values)
            if "groups/zero_variance" in values:
                self.dead_steps = self.dead_steps + 1 if values["groups/zero_variance"] == 1 else 0
        return met

    def callback(self) -> "TrainerCallback":
        """Return the trainer's callback that writes the audits down and ends training where a condition is met."""
        from steps.train._online import AuditCallback

        return AuditCallback(self)

    def history(self) -> list[dict[str, float]]:
        """Return what was recorded, a mapping a step in order; a resumed run's later record replaces the earlier."""
        merged: dict[int, dict[str, float]] = {}
        for values in read_lines(self.job.scratch / HISTORY_NAME):
            merged.setdefault(int(values["step"]), {}).update(values)
        return [merged[step] for step in sorted(merged)]

    def plot(self, held_out: Sequence[tuple[int, float]]) -> None:
        """Draw the audits over the steps, with the best held-out checkpoint marked."""
        from steps.train._audit_plot import audit_figure

        history = self.history()
        if history:
            self.job.log_figure("audits", audit_figure(history, held_out, [scorer.name for scorer in self.scorers]))


def repeated_share(text: str, size: int = 4) -> float:
    """Return the share of a text's word n-grams that occurred before in it, 0 for texts too short to repeat."""
    words = text.split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _correlation(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    if np.ptp(left) < 1e-9 or np.ptp(right) < 1e-9:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
