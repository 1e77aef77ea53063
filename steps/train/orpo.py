"""`train.orpo`: odds-ratio preference optimisation with TRL; fine-tuning and preference in one loss."""

from pydantic import Field

from steps.artifacts import Adapter, Draft, Model
from steps.frame import Job, Resources, step
from steps.train._preference import PreferenceTraining, paired_tables, prepare, run, token_trainer
from steps.train._preference_tokens import labelled_table
from steps.train._settings import LIBRARIES, PRELOAD


class TrainOrpo(PreferenceTraining):
    """Learn the chosen answers and away from the rejected at once, with no reference; gives an Adapter or a Model."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the chosen answers' likelihood (the paper's λ)."""


@step(
    "train.orpo",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2403.07691",
    libraries=LIBRARIES,
    preload=PRELOAD,
    resources=Resources(cpus=0),
)
def train_orpo(config: TrainOrpo, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    prepared = prepare(config, job)
    table, eval_table, held_out = paired_tables(config, prepared.encoder, labelled_table)
    arguments = ORPOConfig(
        **prepared.arguments, beta=config.beta, max_length=config.max_tokens, remove_unused_columns=False
    )
    tokens = sum(len(ids) for side in ("chosen", "rejected") for ids in table[f"{side}_input_ids"])
    trainer = token_trainer(ORPOTrainer, arguments, prepared, table, eval_table, job, tokens)
    return run(trainer, config, prepared, held_out, job)
