"""`evaluate.tasks`: how many tasks each model solves, by a verifier, with intervals and paired tests."""

import json
from math import inf
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Dataset, Draft, Model, Report, ReportFacts, RewardModel
from steps.evaluate._names import candidate_names
from steps.frame import Follows, Input, Job, Metric, NamesOf, Resources, UserError, step
from steps.lm.generate import Sampling, check_budgets
from steps.lm.tasks import PASSED
from steps.train.rewards import LIBRARIES as VERIFIERS
from steps.train.rewards import REWARDS, Reward, check_tools

if TYPE_CHECKING:
    from steps.evaluate._task_scores import Answers
    from steps.lm.tasks import Rollout, Task
    from steps.train.rewards import Scorer


class EvaluateTasks(Sampling):
    """Let models solve held-out tasks: accuracy with intervals, against the first one, by thinking budget."""

    candidates: list[Input[Model | Adapter]] = Field(min_length=1)
    """Models that are compared; each is tested against the first."""
    names: tuple[str, ...] | None = NamesOf("candidates")
    """Names of the candidates in the report, in their order."""
    model: Input[Model] | None = Follows("base", required=False)
    """What candidates that are adapters were trained on; the recipe's base when unset."""
    data: Input[Dataset]
    """Held-out tasks; their last assistant turn is the reference answer."""
    verifier: Reward = REWARDS["exact"].spec.model_validate({"kind": "exact"})
    """What tells right from wrong."""
    passed: float = PASSED
    """The verifier's score from which an answer is right."""
    rows: int | None = Field(default=None, ge=1)
    """Most tasks, the data's first; all when unset."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    thinking_tokens: list[Annotated[int, Field(ge=0)] | None] = []
    """Budgets of thinking in rising order, each evaluated: 0 does not think, null is without limit. The report's
    figures are the last one's."""
    reward_model: Input[RewardModel] | None = None
    """Asked by the verifier `reward_model`."""
    judge: Input[Model] | None = None
    """Asked by the verifier `judge`."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        check_tools([self.verifier], self.reward_model, self.judge)
        check_budgets(self.thinking_tokens, self.max_new_tokens)
        limits = [inf if each is None else each for each in self.thinking_tokens]
        if limits != sorted(set(limits)):
            raise ValueError("thinking_tokens must rise, null (without limit) last, e.g. [0, 64, 256]")
        return self

    @property
    def budgets(self) -> list[int | None]:
        """Thinking budgets that are evaluated, the report's own last."""
        return self.thinking_tokens or [None]

    def rendering(self, *, has_rows: bool) -> tuple[str, ...]:
        """Each candidate's own; `model` is only what adapters were trained on."""
        return ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy and what goes with it, at the last budget; without rows at each other one."""
        last = [
            Metric("accuracy", paired=True),
            *map(Metric, ("accuracy_low", "accuracy_high", "mean_tokens", "truncated")),
            *([Metric("majority")] if self.samples > 1 else ()),
            Metric("p_value", distance=True),
        ]
        limits = [budget for budget in self.budgets if budget is not None] if len(self.budgets) > 1 else []
        at_limits = [Metric(f"{each.name}_at_{limit}", distance=each.distance) for limit in limits for each in last]
        return (*last, *at_limits)


@step(
    "evaluate.tasks",
    produces=Report,
    reference="https://arxiv.org/abs/2504.15777",
    libraries=("torch", "transformers", "tokenizers", "peft", "scipy", *VERIFIERS),
    preload=("torch", "transformers", "peft", "matplotlib.figure"),
    resources=Resources(cpus=0),
)
def evaluate_tasks(config: EvaluateTasks, job: Job) -> Draft:
    """Let one candidate after the other answer at each budget; write rows, summary, table, figures."""
    from steps.evaluate._notes import chosen_on
    from steps.evaluate._task_report import draw, summary, table
    from steps.evaluate._task_scores import corrected, judge, metrics_of, task_rows
    from steps.lm.rows import write_jsonl
    from steps.lm.tasks import read_tasks

    names = candidate_names("evaluate.tasks", config.names, len(config.candidates))
    tasks = read_tasks(config.data, config.rows)
    answers = [_answers(config, name, index, tasks, job) for index, name in enumerate(names)]
    out = job.output()
    scorer = _scorer(config)
    found: dict[str, dict[int | None, Answers]] = {
        name: {budget: judge(each, scorer, config.passed) for budget, each in own.items()}
        for name, own in zip(names, answers, strict=True)
    }
    last = config.budgets[-1]
    first = {budget: found[names[0]][budget] for budget in config.budgets}
    measured = {
        name: {budget: metrics_of(each, first[budget] if name != names[0] else None) for budget, each in own.items()}
        for name, own in found.items()
    }
    corrected(measured)
    content = summary(config.verifier.label, len(tasks), config.samples, last, measured)
    content["notes"] = chosen_on(dict(zip(names, config.candidates, strict=True)), config.data)
    for note in content["notes"]:
        job.log.warning(note)
    write_jsonl(out / "rows.jsonl", (row for name in names for row in task_rows(name, last, found[name][last])))
    others = [(name, budget) for name in names for budget in config.budgets[:-1]]
    if others:
        rows = (row for name, budget in others for row in task_rows(name, budget, found[name][budget]))
        write_jsonl(out / "budgets.jsonl", rows)
    (out / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(content), encoding="utf-8")
    draw(content, job)
    facts = ReportFacts(metrics=_flat(config, measured), rows_sha256=config.data.rows_sha256)
    job.log_metrics(facts.metrics)
    return Report.draft(out, facts)


def _scorer(config: EvaluateTasks) -> "Scorer":
    from steps.train.rewards import Models, Scorer

    return Scorer(config.verifier, Models(reward_model=config.reward_model, judge=config.judge, dtype=config.dtype))


def _answers(
    config: EvaluateTasks, name: str, index: int, tasks: "list[Task]", job: Job
) -> "dict[int | None, list[list[Rollout]]]":
    """Let one candidate answer every task at every budget, in as many processes as share the step.

    Raises:
        UserError: an adapter comes without the model it was trained on.
    """
    from steps.lm.sampler import Sampler

    candidate, rounds = config.candidates[index], len(config.candidates) * len(config.budgets)
    adapter = candidate if isinstance(candidate, Adapter) else None
    model = candidate if isinstance(candidate, Model) else config.model
    if model is None:
        raise UserError(f"evaluate.tasks: `{name}` is an adapter; name its base as `model`")
    found = {}
    with Sampler(model, adapter, config, job) as sampler:
        for place, budget in enumerate(config.budgets):
            before = index * len(config.budgets) + place
            found[budget] = sampler.answers(
                tasks,
                f"answers-{index}-{place}",
                samples=config.samples,
                thinking_tokens=budget,
                progress=lambda done, total, before=before: job.progress(before + done / total, rounds, "candidates"),
            )
    return found


def _flat(config: EvaluateTasks, measured: "dict[str, dict[int | None, dict[str, float]]]") -> dict[str, float]:
    """Return `CANDIDATE/METRIC` of the last budget, and `CANDIDATE/METRIC_at_BUDGET` where there are several."""
    flat = {}
    for name, own in measured.items():
        flat |= {f"{name}/{metric}": value for metric, value in own[config.budgets[-1]].items()}
        for budget, values in own.items() if len(own) > 1 else ():
            if budget is not None:
                flat |= {f"{name}/{metric}_at_{budget}": value for metric, value in values.items()}
    return flat
