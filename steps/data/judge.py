"""`data.judge`: AI feedback; ranks sampled answers into preferences by a judge, a reward model or their scores."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Draft, Model, Preferences, RewardModel, Samples
from steps.data._messages import turn_of
from steps.data._preference_rows import Preference, preference_statistics, preferences_draft
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.frame.hardware import fast_dtype
from steps.lm.checkpoint import Dtype
from steps.lm.tasks import Rollout, read_rollouts

if TYPE_CHECKING:
    from steps.data._judging import Ranker

Ranked = tuple[Rollout, float, float | None]
"""An answer, what the ranking source gives it, and what the verifier gave it."""


class JudgeSamples(StepConfig):
    """Rank the answers to each task and make preferences of them; exactly one thing ranks."""

    data: Input[Samples]
    judge: Input[Model] | None = None
    """Language model that is asked of every two answers which is better."""
    reward_model: Input[RewardModel] | None = None
    """Reward model that scores each answer."""
    verified: bool = False
    """Rank by the scores that the samples have."""
    pairs: Literal["best_vs_worst", "all_pairs"] = "best_vs_worst"
    """One pair a task, or every two answers that differ enough."""
    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by no more are left out. A judge's scores are shares of won comparisons."""
    criterion: str = "Which of two answers to a question is better?"
    """What the judge is asked to judge by."""
    batch_size: int = Field(default=16, ge=1)
    """Comparisons or answers at once."""
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Precision of the judge; unset, what this machine is fastest in."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("judge", "reward_model") if getattr(self, name) is not None]
        given += ["verified"] if self.verified else []
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} given to rank by; give exactly one of judge: a model, "
                "reward_model: a reward model, verified: true"
            )
        return self


@step(
    "data.judge",
    produces=Preferences,
    reference="https://arxiv.org/abs/2309.00267",
    libraries=("torch", "transformers", "tokenizers"),
    preload=("torch", "transformers"),
    resources=Resources(cpus=0),
)
def judge_samples(config: JudgeSamples, job: Job) -> Draft:
    """Rank every task's different answers, and write the pairs."""
    ranker = _ranker(config)
    rows: list[Preference] = []
    equal = tasks = right = wrong = 0
    for number, ranked in enumerate(_ranked(config.data, ranker, job)):
        tasks += 1
        found = list(preferred(ranked, config.pairs, config.min_margin))
        equal += not found
        job.progress(number + 1, config.data.facts.rows, "tasks")
        for better, worse in found:
            rows.append(_row(better[0], worse[0]))
            if better[2] is not None and worse[2] is not None:
                right += better[2] > worse[2]
                wrong += better[2] < worse[2]
    if not rows:
        raise UserError(
            f"step `{job.name}`: none of the {tasks} tasks has two answers that ended and differ by more than "
            f"min_margin: {config.min_margin:g}; sample more answers a task, raise its max_new_tokens, or lower it"
        )
    statistics = {
        "tasks": float(tasks),
        "tasks_dropped": float(equal),
        **ranker.metrics(),
        **preference_statistics(rows),
    }
    if right + wrong:
        # Of the pairs whose answers the verifier tells apart.
        statistics["agrees_with_verifier"] = right / (right + wrong)
    job.log_metrics(statistics)
    return preferences_draft(job.output(), rows, statistics)


def preferred(
    ranked: Sequence[Ranked], pairs: Literal["best_vs_worst", "all_pairs"], min_margin: float
) -> Iterator[tuple[Ranked, Ranked]]:
    """Yield the better and the worse of two answers whose scores differ by more than `min_margin`."""
    if pairs == "best_vs_worst":
        ordered = sorted(ranked, key=lambda each: -each[1])
        chosen = [(ordered[0], ordered[-1])] if ordered else []
    else:
        chosen = [tuple(sorted(two, key=lambda each: -each[1])) for two in combinations(ranked, 2)]
    for better, worse in chosen:
        if better[1] - worse[1] > min_margin:
            yield better, worse


def _ranker(config: JudgeSamples) -> "Ranker":
    from steps.data._judging import Judge, RewardScores, VerifiedScores

    if config.judge is not None:
        return Judge(config.judge.path, config.dtype, config.criterion, config.batch_size)
    if config.reward_model is not None:
        return RewardScores(config.reward_model.path, config.batch_size)
    return VerifiedScores()


def _ranked(data: Samples, ranker: "Ranker", job: Job) -> Iterator[list[Ranked]]:
    """Yield each task's different answers that ended, with their scores; where all are one text there is no ranking."""
    for _, rollouts, verified in read_rollouts(data):
        # One that ran out of tokens would be learned as if it ended there; an empty one teaches nothing.
        whole = [
            pair for pair in zip(rollouts, verified, strict=True) if not pair[0].truncated and pair[0].text.strip()
        ]
        different = {rollout.text.strip(): (rollout, score) for rollout, score in whole}
        if len(different) < 2:
            yield []
            continue
        answers = [rollout for rollout, _ in different.values()]
        given = [score for _, score in different.values()]
        try:
            scores = ranker.scores(answers, given)
        except UserError as error:
            raise UserError(f"step `{job.name}`: {error}") from error
        yield list(zip(answers, scores, given, strict=True))


def _row(better: Rollout, worse: Rollout) -> Preference:
    prompt = tuple(map(turn_of, better.task.prompt))
    return Preference(prompt, better.text, worse.text, better.task.source)
