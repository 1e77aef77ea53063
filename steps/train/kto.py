"""`train.kto`: Kahneman-Tversky optimisation with TRL; learns from answers that were liked or disliked one by one."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Draft, Model
from steps.frame import Input, Job, Resources, step
from steps.train._preference import PreferenceTraining, prepare, reference_model, run, token_trainer
from steps.train._preference_tokens import Rated
from steps.train._settings import LIBRARIES, PRELOAD

if TYPE_CHECKING:
    from datasets import Dataset as Table


class TrainKto(PreferenceTraining):
    """Make liked answers likelier and disliked ones less likely, paired or not; gives an Adapter or a Model."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto` measures each answer against the batch's mean divergence from the reference, the other against none."""
    beta: float = Field(default=0.1, gt=0)
    """How closely the model is held to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of liked answers; where they are few, raise it until liked and disliked weigh about the same."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    reference: Input[Model] | None = None
    """Model to stay close to; unset, the model before this step."""

    @model_validator(mode="after")
    def _can_mismatch(self) -> Self:
        if self.loss == "kto" and self.batch_size < 2:
            raise ValueError(
                "batch_size: `kto` sets each prompt against another row's answer, so a batch needs at least 2 rows"
            )
        return self


@step(
    "train.kto",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2402.01306",
    libraries=LIBRARIES,
    preload=PRELOAD,
    resources=Resources(cpus=0),
)
def train_kto(config: TrainKto, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    prepared = prepare(config, job)
    encoder = prepared.encoder
    table = rated_table(encoder.rated(config.data, "data"), config.batch_size, config.seed)
    eval_table, held_out = None, []
    if config.eval is not None:
        held_out = encoder.pairs(config.eval, "eval") if config.eval.facts.paired else []
        eval_table = rated_table(encoder.rated(config.eval, "eval"), config.batch_size, config.seed)
    arguments = KTOConfig(
        **prepared.arguments,
        loss_type=config.loss,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        max_length=None,
    )
    reference = reference_model(config, config.reference, job)
    trainer = token_trainer(KTOTrainer, arguments, prepared, table, eval_table, job, ref_model=reference)
    return run(trainer, config, prepared, held_out, job)


def rated_table(answers: Sequence[Rated], batch_size: int, seed: int) -> "Table":
    """Return the columns that TRL's KTO takes, in the order in which it will read them.

    `KL_completion_ids` is the answer of the row before in the same batch, which goes round: from such mismatched pairs
    KTO estimates how far the model is from its reference. So the batches are fixed, and mixed once, here. A row that is
    alone in its batch takes the answer of the row before that.
    """
    from datasets import Dataset as Table

    mixed = random.Random(seed).sample(answers, len(answers))
    batches = [mixed[start : start + batch_size] for start in range(0, len(mixed), batch_size)]
    before = [batch[index - 1] for batch in batches for index in range(len(batch))]
    if batches and len(batches[-1]) == 1:
        before[-1] = mixed[len(mixed) - 2]
    return Table.from_dict(
        {
            "prompt_ids": [each.prompt for each in mixed],
            "completion_ids": [each.answer for each in mixed],
            "KL_completion_ids": [each.answer for each in before],
            "label": [each.liked for each in mixed],
        }
    )
