"""`data.sample`: several answers of a model to every prompt, scored where rewards are given."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Dataset, Draft, Model, RewardModel, Samples, SamplesFacts
from steps.frame import Input, Job, Resources, step
from steps.lm.generate import Sampling, check_budgets
from steps.lm.tasks import PASSED, Rollout, Task, pass_rate
from steps.train.rewards import LIBRARIES as VERIFIERS
from steps.train.rewards import Reward, check_labels, check_tools


class SampleData(Sampling):
    """Let a model answer each prompt several times; score the answers where rewards are given."""

    model: Input[Model]
    adapter: Input[Adapter] | None = None
    """Adapter on the model, trained on it."""
    data: Input[Dataset]
    """Prompts; their last assistant turn is the reference answer."""
    samples: int = Field(default=4, ge=1)
    """Answers of each prompt."""
    rows: int | None = Field(default=None, ge=1)
    """Most prompts, the data's first; all when unset."""
    thinking_tokens: int | None = Field(default=None, ge=0)
    """Tokens after which the thinking is closed and the answer must follow; 0 does not think, unset sets no limit."""
    rewards: list[Reward] = []
    """What scores an answer: the sum of `weight` times each. Without any, answers are not verified."""
    passed: float = PASSED
    """Score from which an answer counts as right in the pass rate."""
    reward_model: Input[RewardModel] | None = None
    """Asked by the reward `reward_model`."""
    judge: Input[Model] | None = None
    """Asked by the reward `judge`."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        check_budgets([self.thinking_tokens], self.max_new_tokens)
        check_labels(self.rewards)
        check_tools(self.rewards, self.reward_model, self.judge)
        return self


@step(
    "data.sample",
    produces=Samples,
    reference="https://arxiv.org/abs/2309.06657",
    libraries=("torch", "transformers", "tokenizers", "peft", *VERIFIERS),
    preload=("torch", "transformers", "peft"),
    resources=Resources(cpus=0),
)
def sample_data(config: SampleData, job: Job) -> Draft:
    """Sample, in as many processes as share the step, keeping what is finished over a restart; score; write."""
    from steps.lm.rows import read_jsonl, write_jsonl
    from steps.lm.sampler import Sampler

    rows = list(islice(read_jsonl(config.data.rows_file), config.rows))
    with Sampler(config.model, config.adapter, config, job) as sampler:
        rollouts = sampler.answers(
            [Task.of(row) for row in rows],
            "answers",
            samples=config.samples,
            thinking_tokens=config.thinking_tokens,
            progress=lambda done, total: job.progress(done, total, "answers"),
        )
    out = job.output()
    scores = _scored(config, rollouts)
    write_jsonl(
        out / "rows.jsonl",
        (
            row | {"samples": [_sample(*each) for each in zip(answers, given, strict=True)]}
            for row, answers, given in zip(rows, rollouts, scores, strict=True)
        ),
    )
    facts = _facts(rollouts, scores, config.passed)
    job.log_metrics({**facts.statistics, **({} if facts.pass_rate is None else {"pass_rate": facts.pass_rate})})
    return Samples.draft(out, facts)


def _scored(config: SampleData, rollouts: Sequence[Sequence[Rollout]]) -> list[list[float | None]]:
    """Return the weighted total of the rewards for each answer, None where there are no rewards."""
    if not config.rewards:
        return [[None] * len(answers) for answers in rollouts]
    from steps.train.rewards import Models, Scorer, total

    tools = Models(reward_model=config.reward_model, judge=config.judge, dtype=config.dtype)
    scorers = [Scorer(spec, tools) for spec in config.rewards]
    return [list(total(scorers, answers)[0]) for answers in rollouts]


def _sample(rollout: Rollout, score: float | None) -> dict[str, Any]:
    return {"text": rollout.text, "tokens": rollout.tokens, "truncated": rollout.truncated, "score": score}


def _facts(
    rollouts: Sequence[Sequence[Rollout]], scores: Sequence[Sequence[float | None]], passed: float
) -> SamplesFacts:
    every = [rollout for answers in rollouts for rollout in answers]
    statistics = {
        "mean_tokens": sum(each.tokens for each in every) / len(every),
        "truncated": sum(each.truncated for each in every) / len(every),
        # 1 where no two answers to a prompt end alike.
        "distinct": sum(len({each.answer for each in answers}) for answers in rollouts) / len(every),
    }
    rates = [pass_rate(given, passed) for given in scores]
    known = [rate for rate in rates if rate is not None]
    if known:
        statistics |= {
            "solved": sum(rate > 0 for rate in known) / len(known),
            "always_solved": sum(rate == 1 for rate in known) / len(known),
        }
    return SamplesFacts(
        rows=len(rollouts),
        samples=len(every),
        pass_rate=sum(known) / len(known) if known else None,
        statistics={name: round(value, 6) for name, value in statistics.items()},
    )
