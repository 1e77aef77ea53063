"""`train.rloo`: REINFORCE with the other answers of the group as baseline, with TRL.

It stands where InstructGPT has PPO: TRL carries no PPO trainer any more, and on language models RLOO reaches or beats
PPO without a value model (Ahmadian et al. 2024).
"""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Draft, Model
from steps.frame import Job, Resources, step
from steps.train import rewards
from steps.train._rl import RlTraining, VllmRollouts, train_on_rollouts
from steps.train._settings import LIBRARIES, PRELOAD


class TrainRloo(RlTraining):
    """Learn from sampled answers, each rewarded against the mean of the others of its group; with audits."""

    kl: float = Field(default=0.05, ge=0)
    """Weight of the divergence from the reference within the reward; 0 needs no reference."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far from 1 the importance ratio of an answer may count."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """How far above 1 it may count; `epsilon` when unset."""
    normalize_advantages: bool = False
    """Divide advantages by their standard deviation over the batch."""
    clip_rewards: tuple[float, float] | None = None
    """Lowest and highest reward."""

    @model_validator(mode="after")
    def _nothing_to_cap(self) -> Self:
        if isinstance(self.rollouts, VllmRollouts) and "importance_cap" in self.rollouts.model_fields_set:
            raise ValueError("rollouts.importance_cap: RLOO does not weigh tokens by importance; leave it out")
        return self

    @property
    def never_logged(self) -> Mapping[str, str]:
        """As for any; and the share of tokens that CISPO caps, which is a loss of GRPO's."""
        return {**super().never_logged, "cispo_clip_ratio": "only `train.grpo` with loss: cispo has it"}


@step(
    "train.rloo",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2402.14740",
    libraries=(*LIBRARIES, *rewards.LIBRARIES),
    preload=(*PRELOAD, "trl.trainer.rloo_trainer", "matplotlib.figure"),
    resources=Resources(cpus=0),
)
def train_rloo(config: TrainRloo, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    arguments = {
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "normalize_advantages": config.normalize_advantages,
        "reward_clip_range": config.clip_rewards,
    }
    return train_on_rollouts(config, job, RLOOTrainer, lambda **common: RLOOConfig(**common, **arguments))
