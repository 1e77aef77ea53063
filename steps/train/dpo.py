"""`train.dpo`: direct preference optimisation with TRL, in any of its losses, and SimPO."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Draft, Model
from steps.frame import Input, Job, Resources, step
from steps.train._preference import (
    PreferenceTraining,
    Prepared,
    paired_tables,
    prepare,
    reference_model,
    run,
    token_trainer,
)
from steps.train._preference_tokens import labelled_table, pair_table
from steps.train._settings import LIBRARIES, PRELOAD

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import Trainer

_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired", "simpo")
"""Losses that know label smoothing."""


class TrainDpo(PreferenceTraining):
    """Make chosen answers likelier than rejected ones (DPO, IPO, SimPO, ...); gives an Adapter, or a whole Model."""

    loss: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "simpo",
    ] = "sigmoid"
    """`sigmoid` is DPO's own. `simpo` needs no reference: it compares mean log-probabilities a token."""
    beta: float | None = Field(default=None, gt=0)
    """How closely the model is held to the reference (IPO's τ); unset 0.1, and 2 for `simpo`, where it scales the
    margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of preferences believed to be the wrong way round; for `robust`, `exo_pair`, `aot`, `simpo`."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Margin that `simpo` asks for."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's own negative log-likelihood, added to the loss (https://arxiv.org/abs/2404.19733).
    """
    reference: Input[Model] | None = None
    """Model to stay close to; unset, the model before this step."""

    @model_validator(mode="after")
    def _loss_takes_it(self) -> Self:
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(f"label_smoothing: `{self.loss}` has none; set it to 0, or loss to one of {_SMOOTHED}")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss: exo_pair needs label_smoothing above 0; its paper takes 0.001")
        if self.loss == "simpo" and self.reference is not None:
            raise ValueError("reference: `simpo` compares with none; leave it out")
        return self

    @property
    def strength(self) -> float:
        """Beta, the papers' own where it is unset."""
        return self.beta or (2.0 if self.loss == "simpo" else 0.1)


@step(
    "train.dpo",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2305.18290",
    libraries=LIBRARIES,
    preload=PRELOAD,
    resources=Resources(cpus=0),
)
def train_dpo(config: TrainDpo, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    prepared = prepare(config, job)
    tabulate = labelled_table if config.loss == "simpo" else pair_table
    table, eval_table, held_out = paired_tables(config, prepared.encoder, tabulate)
    make = _simpo_trainer if config.loss == "simpo" else _dpo_trainer
    return run(make(config, prepared, table, eval_table, job), config, prepared, held_out, job)


def _dpo_trainer(
    config: TrainDpo, prepared: Prepared, table: "Table", eval_table: "Table | None", job: Job
) -> "Trainer":
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    arguments = DPOConfig(
        **prepared.arguments,
        loss_type=[config.loss, "sft"] if config.sft_weight else [config.loss],
        loss_weights=[1.0, config.sft_weight] if config.sft_weight else None,
        beta=config.strength,
        label_smoothing=config.label_smoothing,
        max_length=None,
    )
    reference = reference_model(config, config.reference, job)
    return token_trainer(DPOTrainer, arguments, prepared, table, eval_table, job, ref_model=reference)


def _simpo_trainer(
    config: TrainDpo, prepared: Prepared, table: "Table", eval_table: "Table | None", job: Job
) -> "Trainer":
    """Return TRL's CPO trainer with SimPO's loss (https://arxiv.org/abs/2405.14734)."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = CPOConfig(
        **prepared.arguments,
        loss_type="simpo",
        beta=config.strength,
        simpo_gamma=config.simpo_gamma,
        label_smoothing=config.label_smoothing,
        cpo_alpha=config.sft_weight,
        max_length=config.max_tokens,
        remove_unused_columns=False,
    )
    return token_trainer(CPOTrainer, arguments, prepared, table, eval_table, job)
