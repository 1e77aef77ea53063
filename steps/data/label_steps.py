"""`data.label_steps`: reasoning steps labelled right or wrong by where a model arrives that goes on from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Draft, Model, RewardModel, Samples, SamplesFacts
from steps.frame import Input, Job, Resources, UserError, step
from steps.lm.generate import Decoding
from steps.lm.tasks import PASSED, Rollout, Task, has_passed, pass_rate
from steps.train.rewards import LIBRARIES as VERIFIERS
from steps.train.rewards import REWARDS, Reward, check_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DIGITS = 6
"""Decimals kept in the facts."""


class LabelSteps(Decoding):
    """Label every reasoning step of an answer by whether a model that goes on from it can still end right."""

    data: Input[Samples]
    """Tasks with the answers that are labelled."""
    model: Input[Model]
    """Completes the answers; what it cannot finish from a right step makes that step count as wrong."""
    adapter: Input[Adapter] | None = None
    """Adapter on the model, trained on it."""
    verifier: Reward = REWARDS["exact"].spec.model_validate({"kind": "exact"})
    """What tells whether an answer ends right."""
    passed: float = PASSED
    """The verifier's score from which an answer is right."""
    reward_model: Input[RewardModel] | None = None
    """Asked by the verifier `reward_model`."""
    judge: Input[Model] | None = None
    """Asked by the verifier `judge`."""
    step_separator: str = Field(default="\n", min_length=1)
    """What divides an answer into steps; the `train.reward` that learns from the labels takes the same."""
    completions: int = Field(default=4, ge=1)
    """Completions sampled from each step but an answer's last."""
    estimate: Literal["hard", "majority"] = "hard"
    """When a step is right: at least one completion is (the paper's hard estimate), or more than half of them are (its
    soft estimate, their share, rounded to a class)."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion, without what it completes."""
    rows: int | None = Field(default=None, ge=1)
    """Most tasks, the data's first; all when unset."""
    answers: int | None = Field(default=None, ge=1)
    """Most answers of a task, its first; the others are dropped. All when unset."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        check_tools([self.verifier], self.reward_model, self.judge)
        if self.completions > 1 and self.temperature == 0:
            raise ValueError(f"completions: {self.completions} greedy ones are all the same; raise `temperature`")
        return self


@dataclass(frozen=True)
class Answer:
    """An answer whose steps are to be labelled."""

    rollout: Rollout
    steps: list[str]
    begun: list[Task]
    """Its task with the answer begun as far as each step but the last."""


@step(
    "data.label_steps",
    produces=Samples,
    reference="https://arxiv.org/abs/2312.08935",
    libraries=("torch", "transformers", "tokenizers", "peft", *VERIFIERS),
    preload=("torch", "transformers", "peft"),
    resources=Resources(cpus=0),
)
def label_steps(config: LabelSteps, job: Job) -> Draft:
    """Complete each answer from each of its steps, keeping what is finished over a restart; verify; label; write.

    The last step's label is the verdict on the answer itself. Every other step is labelled by its own completions
    alone, as in the paper: a wrong step does not condemn those after it, from which the model may find back. Answers
    to a task that begin alike share the completions of that beginning. The answers' scores stay as they were.

    Raises:
        UserError: no answer has two steps.
    """
    from steps.lm.checkpoint import load_tokenizer
    from steps.lm.rows import read_jsonl, write_jsonl
    from steps.lm.sampler import Sampler

    rows = [
        row | {"samples": row["samples"][: config.answers]}
        for row in islice(read_jsonl(config.data.rows_file), config.rows)
    ]
    answers = list(_answers(config, load_tokenizer(config.model.path), rows))
    begun = {task.place: task for answer in answers for task in answer.begun}
    if not begun:
        raise UserError(
            f"step `{job.name}`: none of {len(answers)} answers in `data` has two steps; set `step_separator` (now "
            f"{config.step_separator!r}) to what stands between steps"
        )
    with Sampler(config.model, config.adapter, config, job) as sampler:
        completions = sampler.answers(
            list(begun.values()),
            "completions",
            samples=config.completions,
            progress=lambda done, total: job.progress(done, total, "completions"),
        )
    out = job.output()
    *completed, ends = _scores(config, [*completions, [answer.rollout for answer in answers]])
    shares = {place: pass_rate(scores, config.passed) or 0.0 for place, scores in zip(begun, completed, strict=True)}
    labels = [
        labels_of(answer, has_passed(end, config.passed), shares, config.estimate)
        for answer, end in zip(answers, ends, strict=True)
    ]
    write_jsonl(out / "rows.jsonl", _labelled(rows, answers, labels))
    statistics = _statistics(labels, list(shares.values()), completions)
    facts = SamplesFacts(
        rows=len(rows), samples=len(answers), pass_rate=pass_rate(ends, config.passed), statistics=statistics
    )
    job.log_metrics({**statistics, "pass_rate": facts.pass_rate or 0.0})
    return Samples.draft(out, facts)


def labels_of(
    answer: Answer, right: bool, shares: Mapping[tuple[str, str], float], estimate: Literal["hard", "majority"]
) -> list[int]:
    """Return 1 (right) or 0 (wrong) for each step of an answer.

    Args:
        answer: with its steps.
        right: whether it ends right.
        shares: for each beginning (`Task.place`) the share of its completions that end right.
        estimate: see `LabelSteps`.
    """
    if not answer.steps:
        return []
    above = 0 if estimate == "hard" else 0.5
    return [*(int(shares[task.place] > above) for task in answer.begun), int(right)]


def _answers(
    config: LabelSteps, tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Mapping[str, Any]]
) -> Iterator[Answer]:
    from steps.lm.reward_model import beginnings, split_steps

    for row in rows:
        task = Task.of(row)
        for each in row["samples"]:
            rollout = Rollout(task, each["text"], each["tokens"], each["truncated"])
            begun = beginnings(tokenizer, task.prompt, rollout.text, config.step_separator)
            steps = split_steps(rollout.text, config.step_separator)
            yield Answer(rollout, steps, [replace(task, begun=beginning) for beginning in begun])


def _scores(config: LabelSteps, rollouts: Sequence[Sequence[Rollout]]) -> list[list[float]]:
    """Ask the verifier about all at once, which it may use to work on several."""
    from steps.train.rewards import Models, Scorer

    scorer = Scorer(config.verifier, Models(reward_model=config.reward_model, judge=config.judge, dtype=config.dtype))
    scores = iter(scorer([rollout for some in rollouts for rollout in some]))
    return [[next(scores) for _ in some] for some in rollouts]


def _labelled(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer], labels: Sequence[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows with `steps` in each of their answers."""
    found = iter(
        [
            [{"text": text, "label": label} for text, label in zip(answer.steps, own, strict=True)]
            for answer, own in zip(answers, labels, strict=True)
        ]
    )
    for row in rows:
        yield {**row, "samples": [{**sample, "steps": next(found)} for sample in row["samples"]]}


def _statistics(
    labels: Sequence[Sequence[int]], shares: Sequence[float], completions: Sequence[Sequence[Rollout]]
) -> dict[str, float]:
    """Return what says whether the labels teach anything, and whether they can be trusted.

    `right_steps` is the share of right steps, `steps_per_answer` a mean, `wrong_before_last` the share of answers whose
    first wrong step comes before their last one; `right_after_wrong`, of the steps after a wrong one, the share of
    right ones. `beginnings` were completed; `completions_right` and `completions_truncated` are shares of completions.
    """
    some = [each for each in labels if each]
    every = [label for each in some for label in each]
    later = [label for each in some if 0 in each for label in each[each.index(0) + 1 :]]
    written = [rollout for each in completions for rollout in each]
    statistics = {
        "right_steps": sum(every) / len(every),
        "steps_per_answer": len(every) / len(some),
        "wrong_before_last": sum(0 in each[:-1] for each in some) / len(some),
        "beginnings": len(shares),
        "completions_right": sum(shares) / len(shares),
        "completions_truncated": sum(each.truncated for each in written) / len(written),
    }
    if later:
        statistics["right_after_wrong"] = sum(later) / len(later)
    return {name: round(value, _DIGITS) for name, value in statistics.items()}
