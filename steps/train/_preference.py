"""What trainers on preferences have in common: their settings, the reference model, and the run itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from steps.artifacts import Draft, Model, Preferences
from steps.frame import Input, Job, UserError
from steps.lm.checkpoint import load_model
from steps.train._adapters import Full, trainable_model, trained_draft
from steps.train._checkpoints import checkpoints, train
from steps.train._preference_rate import preference_rate
from steps.train._preference_tokens import Encoder, Pair
from steps.train._settings import Training, common_arguments, training_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer


class PreferenceTraining(Training):
    """Settings of every trainer on preferences."""

    data: Input[Preferences]
    eval: Input[Preferences] | None = None
    """Held-out preferences, measured before the first step and after the last."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer conversations are cut at the end."""
    learning_rate: float = Field(default=1e-5, gt=0)


@dataclass(frozen=True)
class Prepared:
    """What a preference trainer is made of."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    encoder: Encoder
    arguments: dict[str, Any]
    """Of TRL's config."""


def prepare(config: PreferenceTraining, job: Job) -> Prepared:
    """Load tokenizer and model, and translate the common settings."""
    from transformers import set_seed

    set_seed(config.seed)
    tokenizer = training_tokenizer(config, job)
    arguments = {
        **common_arguments(config, checkpoints(job)),
        "per_device_eval_batch_size": config.batch_size,
        "eval_on_start": config.eval is not None,
        "disable_dropout": not config.has_dropout,
    }
    model = trainable_model(config.model, config.adapter, config.dtype)
    return Prepared(model, tokenizer, Encoder(tokenizer, config.model, config.max_tokens, job), arguments)


def paired_tables(
    config: PreferenceTraining, encoder: Encoder, tabulate: "Callable[[Sequence[Pair]], Table]"
) -> "tuple[Table, Table | None, list[Pair]]":
    """Return the training table, the held-out one, and the held-out pairs; None and none where there is no `eval`."""
    table = tabulate(encoder.pairs(config.data, "data"))
    held_out = encoder.pairs(config.eval, "eval") if config.eval else []
    return table, tabulate(held_out) if held_out else None, held_out


def reference_model(config: PreferenceTraining, given: Model | None, job: Job) -> "PreTrainedModel | None":
    """Return the frozen model that the trained one is kept close to; None where that is it with its adapter off.

    Raises:
        UserError: the model given has another tokenizer.
    """
    if given is not None:
        if given.facts.tokenizer_sha256 != config.model.facts.tokenizer_sha256:
            raise UserError(
                f"step `{job.name}`: `reference` has another tokenizer than `model`, so its probabilities are of other "
                "tokens; give a model of the same family"
            )
        return load_model(given.path, config.dtype)
    if config.adapter.keeps_base:
        return None
    return load_model(config.model.path, "float32" if isinstance(config.adapter, Full) else config.dtype)


def token_trainer(
    trainer_class: Any,
    arguments: Any,
    prepared: Prepared,
    table: "Table",
    eval_table: "Table | None",
    job: Job,
    epoch_tokens: int = 0,
    **more: Any,
) -> "Trainer":
    """Return one of TRL's preference trainers for rows that are tokens already.

    Args:
        trainer_class: `DPOTrainer`, `KTOTrainer`, `CPOTrainer` or `ORPOTrainer`.
        arguments: its config.
        prepared: model and tokenizer.
        table: training rows.
        eval_table: held-out rows.
        job: the step's job, which hears of the metrics.
        epoch_tokens: tokens of an epoch, where this trainer does not count them itself.
        more: what this trainer alone takes.
    """
    from steps.train._progress import ReportToJob
    from steps.train._speed import Speed

    class TokenTrainer(trainer_class):
        # The main trainers tokenize in the one, the experimental ones in the other.
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    return TokenTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=table,
        eval_dataset=eval_table,
        processing_class=prepared.tokenizer,
        callbacks=[ReportToJob(job), Speed(job, epoch_tokens=epoch_tokens)],
        **more,
    )


def run(
    trainer: "Trainer", config: PreferenceTraining, prepared: Prepared, held_out: Sequence[Pair], job: Job
) -> Draft:
    """Train, measure held-out pairs before and after, and give out what was learned."""
    _drop_reference_adapter(trainer)
    measure = bool(held_out)
    before = preference_rate(prepared.model, held_out, config.batch_size) if measure else None
    train(trainer, job)
    if config.eval is not None:
        trainer.evaluate()
    if before is not None:
        after = preference_rate(prepared.model, held_out, config.batch_size)
        job.log_metrics({"preference_rate_before": before, "preference_rate": after})
    return trained_draft(config, job, trainer, prepared.model)


def _drop_reference_adapter(trainer: "Trainer") -> None:
    """Remove the copy of the fresh adapter that TRL keeps as its reference.

    Without the copy TRL turns the adapter off to ask the base alone, which is the same reference (`keeps_base`). The
    copy would cost memory and be written into every checkpoint.
    """
    from peft import PeftModel

    model = trainer.model
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")
