"""`train.grpo`: group-relative policy optimisation with TRL, in seven forms of its loss, with audits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Draft, Model
from steps.frame import Job, Resources, step
from steps.train import rewards
from steps.train._rl import RlTraining, VllmRollouts, train_on_rollouts
from steps.train._settings import LIBRARIES, PRELOAD
from steps.train._stopping import RATIOS

_CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio")
Loss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "gspo"]


@dataclass(frozen=True)
class _Form:
    """What TRL must be told for one named loss, and its paper's own bounds."""

    loss_type: str
    epsilon: float
    epsilon_high: float
    level: Literal["token", "sequence"] = "token"
    scale: Literal["group", "batch", "none"] = "group"


_FORMS: dict[Loss, _Form] = {
    # DeepSeekMath, https://arxiv.org/abs/2402.03300: mean over an answer's tokens, then over answers.
    "grpo": _Form("grpo", 0.2, 0.2),
    # Dr. GRPO, https://arxiv.org/abs/2503.20783: neither length nor difficulty weighs; constant divisor, no scaling.
    "dr_grpo": _Form("dr_grpo", 0.2, 0.2, scale="none"),
    # DAPO, https://arxiv.org/abs/2503.14476: mean over all tokens of the batch, clip-higher.
    "dapo": _Form("dapo", 0.2, 0.28),
    # BNPO as TRL has it: mean over the tokens of one forward pass.
    "bnpo": _Form("bnpo", 0.2, 0.2),
    # CISPO, MiniMax-M1, https://arxiv.org/abs/2506.13585: the weight itself is capped, no token's update is dropped.
    "cispo": _Form("cispo", 0.2, 5.0),
    # SAPO, https://arxiv.org/abs/2511.20347: a smooth gate in place of the clip.
    "sapo": _Form("sapo", 0.2, 0.2),
    # GSPO, https://arxiv.org/abs/2507.18071: one ratio for the whole answer, and bounds for that.
    "gspo": _Form("grpo", 3e-4, 4e-4, level="sequence"),
}


class TrainGrpo(RlTraining):
    """Learn from groups of sampled answers, each rewarded against the mean of its group; with audits."""

    loss: Loss = "dapo"
    """Form of the loss: `grpo`, `dr_grpo`, `dapo`, `bnpo`, `cispo`, `sapo`, or `gspo`."""
    epsilon: float | None = Field(default=None, gt=0)
    """How far below 1 the importance ratio may count; the loss's own bound when unset."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """How far above 1 it may count (clip-higher); for `cispo` the cap of the weight itself. When unset the loss's own
    bound, or `epsilon` where the loss's two bounds are one."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by: the standard deviation of their group, of the batch, or nothing."""
    top_entropy: float = Field(default=1.0, gt=0, le=1)
    """Learn from this share of tokens only, those of highest entropy (https://arxiv.org/abs/2506.01939)."""

    @model_validator(mode="after")
    def _bounds_count(self) -> Self:
        unused = {"cispo": ("epsilon",), "sapo": ("epsilon", "epsilon_high")}.get(self.loss, ())
        if given := [name for name in unused if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]}: loss: {self.loss} has no such bound; leave it out")
        return self

    @property
    def never_logged(self) -> Mapping[str, str]:
        """As for any; a loss's own share of clipped tokens, and ratios, which on-policy training does not compute."""
        own = "cispo_clip_ratio" if self.loss == "cispo" else "clip_ratio/region_mean"
        found = {name: f"loss: {self.loss} has none" for name in _CLIPPED if name != own or self.loss == "sapo"}
        if self.window == 1 and not isinstance(self.rollouts, VllmRollouts):
            found |= dict.fromkeys(RATIOS, "a batch of rollouts serves one update, so all are 1")
        return {**super().never_logged, **found}


@step(
    "train.grpo",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2402.03300",
    libraries=(*LIBRARIES, *rewards.LIBRARIES),
    preload=(*PRELOAD, "trl.trainer.grpo_trainer", "matplotlib.figure"),
    resources=Resources(cpus=0),
)
def train_grpo(config: TrainGrpo, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    return train_on_rollouts(config, job, GRPOTrainer, lambda **common: GRPOConfig(**common, **grpo_arguments(config)))


def _upper_bound(form: _Form, epsilon: float | None) -> float:
    """Return the bound above 1: a loss's own where it is another than the one below 1, else the one that is set."""
    return form.epsilon_high if epsilon is None or form.epsilon_high != form.epsilon else epsilon


def grpo_arguments(config: TrainGrpo) -> dict[str, Any]:
    """Translate the settings that GRPO has beside RLOO's into arguments of TRL's config."""
    form = _FORMS[config.loss]
    arguments: dict[str, Any] = {
        "loss_type": form.loss_type,
        "importance_sampling_level": form.level,
        "epsilon": config.epsilon or form.epsilon,
        "epsilon_high": config.epsilon_high or _upper_bound(form, config.epsilon),
        "scale_rewards": config.scale_rewards or form.scale,
        "top_entropy_quantile": config.top_entropy,
    }
    if isinstance(config.rollouts, VllmRollouts):
        cap = config.rollouts.importance_cap
        arguments["vllm_importance_sampling_correction"] = cap is not None
        if cap is not None:
            # TRL's own default drops whole answers whose tokens' weights multiply to more than the cap.
            arguments |= {
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": cap,
            }
    return arguments
