"""What GRPO and RLOO have in common: rewards, rollouts, audits, held-out verification, and when to stop."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from steps.artifacts import Dataset, Draft, Model, RewardModel
from steps.frame import Chooses, Input, Job, Resources, UserError
from steps.lm.chat import render, token_ids
from steps.lm.tasks import Task, read_tasks
from steps.train._adapters import Full, trainable_model, trained_draft
from steps.train._checkpoints import checkpoints
from steps.train._rows import check_no_tools
from steps.train._settings import Training, common_arguments, training_tokenizer
from steps.train._stopping import HELD_OUT, StopCondition, check_conditions
from steps.train.rewards import Reward, Scorer, check_tools

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TransformersRollouts(_Part):
    """Sample with the model that is trained, in its own process: for processors and small models."""

    kind: Literal["transformers"] = "transformers"


class VllmRollouts(_Part):
    """Sample with vLLM, which takes over the weights before each batch."""

    kind: Literal["vllm"] = "vllm"
    mode: Literal["colocate", "server"] = "colocate"
    """In the trainer's own processes and on its GPUs, or a server started beforehand (`trl vllm-serve`)."""
    gpu_memory: float = Field(default=0.3, gt=0, lt=1)
    """Share of GPU memory for a colocated engine."""
    tensor_parallel: int = Field(default=1, ge=1)
    url: str | None = None
    """Address of the server."""
    importance_cap: float | None = 2.0
    """Largest weight of a token that corrects for vLLM's probabilities being other than the trainer's; null corrects
    nothing. RLOO has no such weights."""


class ReferenceSync(_Part):
    """Let the reference follow the policy: from time to time it becomes mixup · policy + (1 − mixup) · reference."""

    every: int = Field(default=64, ge=1)
    """Optimizer steps between two times."""
    mixup: float = Field(default=1.0, gt=0, le=1)


class RlTraining(Training):
    """Settings of every trainer that learns from its own samples."""

    data: Input[Dataset]
    """Tasks to learn from; their last assistant turn is the reference answer."""
    eval: Annotated[Input[Dataset] | None, Chooses()] = None
    """Held-out tasks. With them the best checkpoint by the verifier is given out, else the last."""
    rewards: list[Reward] = Field(min_length=1)
    """What an answer is rewarded for; the sum of `weight` times each."""
    verifier: Reward | None = None
    """What tells right from wrong on held-out tasks and in the audits; the first reward when unset."""
    reward_model: Input[RewardModel] | None = None
    """Asked by the reward `reward_model`."""
    judge: Input[Model] | None = None
    """Asked by the reward `judge`."""
    group_size: int = Field(default=8, ge=2)
    """Answers sampled for each task. Each process's `batch_size · accumulation` answers make a step, so it must divide
    that."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Optimizer steps for which a batch of rollouts is split up: above 1 the later ones are off-policy."""
    iterations: int = Field(default=1, ge=1)
    """Passes over each batch of rollouts (the paper's μ)."""
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 samples from all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    kl: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference (the model before this step); 0 needs no reference."""
    sync_reference: ReferenceSync | None = None
    drop_truncated: bool = False
    """Learn nothing from answers that ran out of tokens (DAPO's overlong filtering)."""
    rollouts: Annotated[TransformersRollouts | VllmRollouts, Field(discriminator="kind")] = TransformersRollouts()
    eval_steps: int = Field(default=20, ge=1)
    """Optimizer steps between two looks at the held-out tasks."""
    eval_rows: int = Field(default=64, ge=1)
    """Held-out tasks looked at, answered greedily."""
    stop_when: list[StopCondition] = []
    """Conditions on the audits under which training ends early."""

    @field_validator("rewards")
    @classmethod
    def _labels(cls, rewards: list[Any]) -> list[Any]:
        labels = [reward.label for reward in rewards]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two rewards are called `{label}`; give one of them another `name`")
        return rewards

    @model_validator(mode="after")
    def _whole_groups(self) -> "RlTraining":
        answers = self.batch_size * self.accumulation * self.updates_per_rollout
        if answers % self.group_size:
            raise ValueError(
                f"batch_size · accumulation · updates_per_rollout = {answers} answers do not divide into groups of "
                f"{self.group_size} (group_size)"
            )
        return self

    @model_validator(mode="after")
    def _reference(self) -> "RlTraining":
        """TRL's reference is the model with its adapter off, or with a copy of it that stays as it was."""
        if self.sync_reference and not self.kl:
            raise ValueError("sync_reference: there is no reference without `kl`; set it above 0")
        if self.sync_reference and not isinstance(self.adapter, Full):
            raise ValueError(
                "sync_reference: an adapter's reference is its base, which stays; leave it out, or train all weights "
                "(adapter: {kind: full})"
            )
        if self.kl and not isinstance(self.adapter, Full) and not self.adapter.keeps_base:
            raise ValueError(
                f"kl: a {self.adapter.kind} adapter changes its base, so that there is no reference to diverge from; "
                "set kl: 0, or another kind of adapter"
            )
        return self

    @model_validator(mode="after")
    def _models(self) -> "RlTraining":
        asking = [*self.rewards, *([self.verifier] if self.verifier else [])]
        check_tools(asking, self.reward_model, self.judge)
        return self

    @model_validator(mode="after")
    def _conditions(self) -> "RlTraining":
        check_conditions(self.stop_when, [reward.label for reward in self.rewards], self.never_logged)
        return self

    @property
    def never_logged(self) -> Mapping[str, str]:
        """Metrics that these settings never give, each with the reason."""
        unseen = "it is measured on held-out tasks; name them as `eval:`"
        found: dict[str, str] = {} if self.eval is not None else dict.fromkeys(HELD_OUT, unseen)
        return found if self.kl else {**found, "kl": "there is no reference without `kl:`; set it above 0"}

    @property
    def packages(self) -> tuple[str, ...]:
        """vLLM, where it samples; a server's client needs it too."""
        return ("vllm",) if isinstance(self.rollouts, VllmRollouts) else ()

    def check_resources(self, resources: Resources) -> None:
        """As any training; a colocated engine's group must be whole."""
        super().check_resources(resources)
        if not isinstance(self.rollouts, VllmRollouts):
            return
        if not resources.gpus:
            raise ValueError("rollouts: vLLM needs a GPU; ask for one with `resources: {gpus: 1}`")
        group = self.rollouts.tensor_parallel
        if self.rollouts.mode == "colocate" and resources.world % group:
            raise ValueError(f"rollouts.tensor_parallel: {group} does not divide {resources.world} GPUs")

    @property
    def window(self) -> int:
        """Optimizer steps that learn from one batch of rollouts."""
        return self.updates_per_rollout * self.iterations

    def tasks_per_rollout(self, processes: int) -> int:
        """Tasks asked in one batch of rollouts, by all processes that share the work."""
        return self.batch_size * self.accumulation * self.updates_per_rollout * processes // self.group_size


def rl_arguments(config: RlTraining, job: Job, steps: int, longest_prompt: int) -> dict[str, Any]:
    """Translate the settings into the arguments that TRL's GRPO and RLOO configs share.

    Args:
        config: the step's settings.
        job: its job.
        steps: optimizer steps of the whole training.
        longest_prompt: tokens of the longest prompt, held-out ones included.
    """
    # A checkpoint within a batch of rollouts could not be resumed: the rest of the batch would be sampled anew.
    between = math.ceil(config.checkpoint_steps / config.window) * config.window
    arguments = {
        **common_arguments(config, checkpoints(job)),
        "max_steps": steps,
        "num_generations": config.group_size,
        "steps_per_generation": config.accumulation * config.updates_per_rollout,
        "num_iterations": config.iterations,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "beta": config.kl,
        "mask_truncated_completions": config.drop_truncated,
        "save_steps": between,
        "logging_steps": 1,
        # Order and repetition of the tasks are ours, see `task_order`.
        "shuffle_dataset": False,
        "num_train_epochs": 1,
    }
    if sync := config.sync_reference:
        arguments |= {
            "sync_ref_model": True,
            "ref_model_sync_steps": sync.every,
            "ref_model_mixup_alpha": sync.mixup,
        }
    if isinstance(config.rollouts, VllmRollouts):
        arguments |= {
            "use_vllm": True,
            "vllm_mode": config.rollouts.mode,
            "vllm_gpu_memory_utilization": config.rollouts.gpu_memory,
            "vllm_tensor_parallel_size": config.rollouts.tensor_parallel,
            "vllm_server_base_url": config.rollouts.url,
            # Else room is kept for the longest context that the model knows.
            "vllm_max_model_length": longest_prompt + config.max_new_tokens,
        }
    return arguments


def prompt_tokens(tokenizer: "PreTrainedTokenizerFast", tasks: Iterable[Task]) -> int:
    """Return the length in tokens of the longest prompt."""
    return max(len(token_ids(tokenizer, render(tokenizer, task.prompt, prompt=True))) for task in tasks)


def read_training_tasks(config: RlTraining, job: Job) -> list[Task]:
    """Read the tasks.

    Raises:
        UserError: there are fewer than one batch of rollouts asks.
    """
    tasks, asked = read_tasks(config.data), config.tasks_per_rollout(job.resources.world)
    check_no_tools(job, "data", (task.prompt for task in tasks))
    if len(tasks) < asked:
        raise UserError(
            f"step `{job.name}`: data has {len(tasks)} tasks, one batch of rollouts asks {asked}; "
            "lower batch_size, or raise group_size"
        )
    return tasks


def steps_per_epoch(config: RlTraining, tasks: int, processes: int = 1) -> int:
    """Return the optimizer steps in which every task is asked once."""
    return tasks // config.tasks_per_rollout(processes) * config.window


def total_steps(config: RlTraining, tasks: int, processes: int = 1) -> int:
    """Return the optimizer steps of the whole training."""
    return config.max_steps or max(1, math.floor(config.epochs * steps_per_epoch(config, tasks, processes)))


def task_order(config: RlTraining, tasks: list[Task], steps: int, processes: int = 1) -> "Table":
    """Return `prompt` and `task` (an index) for every question of the whole training, each epoch shuffled anew.

    One long table instead of epochs over a short one: TRL's sampler draws each epoch's order from a state that a
    resumed run does not have, so that from the second epoch on it would ask other questions.
    """
    import numpy as np
    from datasets import Dataset as Table

    asked = config.tasks_per_rollout(processes)
    wanted = math.ceil(steps / config.window) * asked
    rng = np.random.default_rng(config.seed)
    order: list[int] = []
    while len(order) < wanted:
        # Whole batches only: a batch never asks one task twice.
        order += rng.permutation(len(tasks))[: len(tasks) - len(tasks) % asked].tolist()
    order = order[:wanted]
    return Table.from_dict({"prompt": [[dict(message) for message in tasks[i].prompt] for i in order], "task": order})


def train_on_rollouts(config: RlTraining, job: Job, trainer_class: Any, make_arguments: Callable[..., Any]) -> Draft:
    """Train with one of TRL's online trainers and give out what was learned.

    Args:
        config: the step's settings.
        job: its job.
        trainer_class: `GRPOTrainer` or `RLOOTrainer`.
        make_arguments: makes that trainer's config from keyword arguments.
    """
    from transformers import set_seed

    from steps.train._audited import audited
    from steps.train._audits import Audits
    from steps.train._held_out import HeldOut
    from steps.train._online import run
    from steps.train._speed import Speed

    set_seed(config.seed)
    tokenizer = training_tokenizer(config, job)
    tokenizer.padding_side = "left"
    tasks, processes = read_training_tasks(config, job), job.resources.world
    steps = total_steps(config, len(tasks), processes)
    scorers, verifier = make_scorers(config)
    epoch = steps_per_epoch(config, len(tasks), processes)
    audits = Audits(job, scorers, verifier, config.group_size, epoch, config.stop_when, config.window)
    model = trainable_model(config.model, config.adapter, config.dtype)
    asked = chain(tasks, read_tasks(config.eval, config.eval_rows) if config.eval else ())
    longest = prompt_tokens(tokenizer, asked) if isinstance(config.rollouts, VllmRollouts) else 0
    trainer = audited(trainer_class, audits)(
        model=model,
        reward_funcs=audits.rewards(tasks, tokenizer, config.model.facts.stop_token_ids),
        args=make_arguments(**rl_arguments(config, job, steps, longest)),
        train_dataset=task_order(config, tasks, steps, processes),
        processing_class=tokenizer,
        callbacks=[audits.callback(), Speed(job, rollout_cost(config, model))],
    )
    held_out = HeldOut(config, job, trainer, tokenizer, verifier, audits) if config.eval else None
    if held_out:
        trainer.add_callback(held_out)
    run(trainer, job, audits)
    audits.plot(held_out.history if held_out else [])
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
    return trained_draft(config, job, trainer, model, held_out.best() if held_out else None)


def rollout_cost(config: RlTraining, model: "PreTrainedModel") -> float | None:
    """Return the floating-point operations for one token of a prompt or answer, its sampling and the reference too."""
    from steps.train._speed import cost_of

    sampled = not (isinstance(config.rollouts, VllmRollouts) and config.rollouts.mode == "server")
    # Where a batch of rollouts serves several steps, its log-probabilities are computed beforehand.
    forwards = sampled + (config.kl > 0) + (config.window > 1)
    # How long answers will be is not known; at half of what they may be attention is a small share of the whole.
    return cost_of(model, config.max_new_tokens / 2, forwards, config.iterations)


def make_scorers(config: RlTraining) -> tuple[list[Scorer], Scorer]:
    """Return the rewards and the verifier, ready to be asked."""
    from steps.train.rewards import Models

    tools = Models(reward_model=config.reward_model, judge=config.judge, dtype=config.dtype)
    scorers = [Scorer(spec, tools) for spec in config.rewards]
    return scorers, Scorer(config.verifier, tools) if config.verifier else scorers[0]


def best_folder(job: Job) -> Path:
    """Where the best weights so far are kept; it survives a restart."""
    return job.scratch / "best"
