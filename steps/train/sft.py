"""`train.sft`: supervised fine-tuning with TRL; loss on the assistant's tokens only."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steps.artifacts import Adapter, Dataset, Documents, Draft, Model
from steps.frame import Chooses, Input, Job, Resources, UserError, step
from steps.lm.chat import TurnChanges, conversation
from steps.lm.plain_text import PlainTexts
from steps.lm.rows import read_jsonl
from steps.train._adapters import trainable_model, trained_draft
from steps.train._checkpoints import checkpoints, train
from steps.train._rows import longest_row, note_rows, note_spelled, stop_texts
from steps.train._settings import LIBRARIES, PRELOAD, Training, common_arguments, training_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl.trainer.sft_trainer import SFTTrainer


class EarlyStopping(BaseModel):
    """When to stop because the evaluation loss no longer falls."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without a new best."""
    min_delta: float = Field(default=0.0, ge=0)
    """How far the loss must fall below the best to count, in nats a token."""


class TrainSft(Training):
    """Fine-tune a model on conversations, or go on pretraining it on documents; gives an Adapter or a whole Model."""

    data: Input[Dataset | Documents]
    """Conversations, or plain texts: of documents every token is learned, of completions what goes on from the prompt.
    """
    eval: Annotated[Input[Dataset | Documents] | None, Chooses()] = None
    """Held-out rows. With them the weights with the lowest loss on them are given out, else the last."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations; each writes a checkpoint. As `checkpoint_steps` when unset."""
    early_stopping: EarlyStopping | None = None
    """`{patience: 3, min_delta: 0.01}`; unset, training runs to its end."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer rows are cut at the end, also those longer than the model has positions for; documents go on in others."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned; a message with `learn: false` never is."""
    packing: bool = False
    """Put several rows into one sequence of `max_tokens`, none seeing another; `batch_size` then counts sequences.
    Documents are always packed."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training (https://arxiv.org/abs/2310.05914); 5 is usual."""

    @model_validator(mode="after")
    def _evaluation(self) -> "TrainSft":
        for key in ("eval_steps", "early_stopping"):
            if self.eval is None and getattr(self, key) is not None:
                raise ValueError(f"{key}: there is nothing to evaluate on; name held-out rows as `eval:`")
        return self


@step(
    "train.sft",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2203.02155",
    libraries=LIBRARIES,
    preload=PRELOAD,
    resources=Resources(cpus=0),
)
def train_sft(config: TrainSft, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from transformers import set_seed

    set_seed(config.seed)
    tokenizer = training_tokenizer(config, job)
    rows = tokenised(config, config.data, tokenizer, job)
    held_out = tokenised(config, config.eval, tokenizer, job, "eval/") if config.eval else None
    model = trainable_model(config.model, config.adapter, config.dtype)
    trainer = _trainer(config, job, model, tokenizer, rows, held_out)
    train(trainer, job)
    if config.eval:
        if trainer.state.best_metric is None or trainer.state.best_global_step is None:
            raise UserError(f"step `{job.name}`: the loss on `eval` was never a number; lower `learning_rate`")
        best = {"best_eval_loss": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
        job.log.info("kept the weights of step %(best_step)s: evaluation loss %(best_eval_loss).4f", best)
        job.log_metrics(best)
    return trained_draft(config, job, trainer, model)


def tokenised(
    config: TrainSft, data: Dataset | Documents, tokenizer: "PreTrainedTokenizerFast", job: Job, prefix: str = ""
) -> "Table":
    """Return `input_ids` and `labels` (-100 where nothing is learned) for every row; log how many there are.

    Raises:
        UserError: no row has a token to learn within `max_tokens`.
    """
    from datasets import Dataset as Table

    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    field, longest = "eval" if prefix else "data", longest_row(config.model.path, config.max_tokens)
    seen = cut = apart = without = spelled = 0
    ends = stop_texts(tokenizer, config.model.facts.stop_token_ids)
    plain = PlainTexts(tokenizer, config.model.facts.stop_token_ids, longest.tokens)
    for row in read_jsonl(data.rows_file):
        if isinstance(data, Documents):
            found = plain.learned(row, whole=data.facts.layout == "text")
        else:
            found = labelled(row["messages"], tokenizer, config.model.facts.stop_token_ids, config.train_on)
            said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            spelled += any(end in text for text in said for end in ends)
        seen += 1
        apart += len(found) > 1 and isinstance(data, Dataset)
        cut += any(len(ids) > longest.tokens for ids, _ in found)
        kept = [(ids[: longest.tokens], labels[: longest.tokens]) for ids, labels in found]
        learned = [(ids, labels) for ids, labels in kept if any(label != -100 for label in labels)]
        without += not learned
        for ids, labels in learned:
            rows["input_ids"].append(ids)
            rows["labels"].append(labels)
    if not rows["input_ids"]:
        raise UserError(
            f"step `{job.name}`: no row of `{field}` has an answer to learn within {longest.reason}; raise it, or see "
            "`learn` and `train_on`"
        )
    if apart:
        job.note(
            f"{apart} of {seen} rows of `{field}` are learned turn by turn, because the chat template shows earlier "
            "turns otherwise than they were said"
        )
    note_rows(job, field, seen, left_out=without, cut=cut, longest=longest)
    note_spelled(job, field, seen, spelled)
    counts = {
        "rows": len(rows["labels"]),
        "rows_cut": cut,
        "rows_without_answer": without,
        "tokens": sum(map(len, rows["input_ids"])),
        "answer_tokens": sum(label != -100 for labels in rows["labels"] for label in labels),
    }
    job.log_metrics({prefix + name: count for name, count in counts.items()})
    return Table.from_dict(rows)


def is_packed(config: TrainSft) -> bool:
    """Whether several rows share a sequence."""
    return config.packing or (isinstance(config.data, Documents) and config.data.facts.layout == "text")


def labelled(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerFast",
    stop_token_ids: tuple[int, ...],
    train_on: Literal["all", "last"],
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of a conversation and, for each, what is learned there: itself, or -100 for nothing.

    Where the template shows earlier turns otherwise than they were said, their thoughts taken out, no one text has all
    of the assistant's turns as a model would write them: each that is learned is then the last of a text of its own.
    """
    try:
        return [_labelled(messages, tokenizer, stop_token_ids, only_last=train_on == "last")]
    except TurnChanges:
        ends = [end for end, each in enumerate(messages, start=1) if each["role"] == "assistant"]
        learned = [end for end in ends if messages[end - 1].get("learn", True)]
        return [_labelled(messages[:end], tokenizer, stop_token_ids, only_last=True) for end in learned]


def _labelled(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerFast",
    stop_token_ids: tuple[int, ...],
    *,
    only_last: bool,
) -> tuple[list[int], list[int]]:
    rendered = conversation(tokenizer, messages, stop_token_ids, only_last=only_last)
    wanted = [message.get("learn", True) for message in messages if message["role"] == "assistant"]
    labels = [-100] * len(rendered.ids)
    for turn, learn in zip(rendered.turns, wanted[-len(rendered.turns) :], strict=True):
        if learn:
            labels[turn.start : turn.stop] = rendered.ids[turn.start : turn.stop]
    return rendered.ids, labels


def _trainer(
    config: TrainSft,
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    rows: "Table",
    held_out: "Table | None",
) -> "SFTTrainer":
    from transformers import EarlyStoppingCallback
    from trl.trainer.sft_config import SFTConfig

    from steps.train._progress import ReportToJob
    from steps.train._speed import Speed, cost_of
    from steps.train._supervised import SupervisedTrainer

    collator = None
    tokens = job.last_metrics["tokens"]
    # TRL counts a batch of packed sequences as one; `tokens` has an epoch's true number.
    callbacks: list[Any] = [
        ReportToJob(job, omit=("num_tokens",) if is_packed(config) else ()),
        Speed(job, cost_of(model, tokens / len(rows)), tokens if is_packed(config) else 0),
    ]
    if is_packed(config):
        from steps.train._packing import PackedCollator, check_isolation, packed
        from steps.train._row_attention import attend_by_rows

        if not attend_by_rows(model):
            job.log.info("this model's attention needs a mask over packed sequences, which costs their length squared")
        check_isolation(model)
        rows = packed(rows, longest_row(config.model.path, config.max_tokens).tokens)
        job.log_metrics({"sequences": len(rows)})
        pad: Any = tokenizer.pad_token_id
        collator = PackedCollator(pad, return_position_ids=True)
    if config.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.min_delta))
    return SupervisedTrainer(
        model=model,
        args=SFTConfig(**_arguments(config, job)),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _arguments(config: TrainSft, job: Job) -> dict[str, Any]:
    arguments = {
        **common_arguments(config, checkpoints(job)),
        "max_length": config.max_tokens,
        # Our rows are cut and labelled already.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        # Rows of like length share a batch: on short rows padding is most of the cost otherwise.
        "train_sampling_strategy": "random" if is_packed(config) else "group_by_length",
        "neftune_noise_alpha": config.neftune_alpha,
    }
    if config.eval:
        every = config.eval_steps or config.checkpoint_steps
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": every,
            # The best weights can only be given out if every evaluated state is a checkpoint.
            "save_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "per_device_eval_batch_size": config.batch_size,
            "prediction_loss_only": True,
            # Early stopping counts evaluations; a resumed training counts on.
            "restore_callback_states_from_checkpoint": config.early_stopping is not None,
        }
    return arguments
