"""The trainers of reward models: TRL's for whole answers, transformers' own for steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steps.artifacts import Preferences, Samples
from steps.frame import Job, UserError
from steps.lm.reward_model import step_ends
from steps.lm.rows import read_jsonl
from steps.train._preference_tokens import Encoder, Pair

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast, Trainer

    from steps.train.reward import TrainReward

_IGNORED = -100
"""Class of a token that counts for nothing."""


def outcome_trainer(
    config: "TrainReward",
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    arguments: Mapping[str, Any],
) -> "Trainer":
    """Return TRL's reward trainer: −log σ(reward of the chosen − reward of the rejected)."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    from steps.train._progress import ReportToJob
    from steps.train._speed import Speed

    encoder = Encoder(tokenizer, config.model, config.max_tokens, job, letters=True)
    held_out = Preferences.of(config.eval) if config.eval else None
    return RewardTrainer(
        model=model,
        args=RewardConfig(
            **arguments,
            max_length=None,
            center_rewards_coefficient=config.centre or None,
            disable_dropout=not config.has_dropout,
        ),
        train_dataset=_whole_answers(encoder.pairs(Preferences.of(config.data), "data")),
        eval_dataset=_whole_answers(encoder.pairs(held_out, "eval")) if held_out else None,
        processing_class=tokenizer,
        callbacks=[ReportToJob(job), Speed(job)],
    )


def process_trainer(
    config: "TrainReward",
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    arguments: Mapping[str, Any],
) -> "Trainer":
    """Return a trainer of token classes with labels where steps end: cross-entropy of right against wrong."""
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    from steps.train._progress import ReportToJob
    from steps.train._speed import Speed

    tokenizer.padding_side = "right"
    table = step_table(tokenizer, Samples.of(config.data), "data", config.max_tokens, job)
    held_out = Samples.of(config.eval) if config.eval else None
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        train_dataset=table,
        eval_dataset=step_table(tokenizer, held_out, "eval", config.max_tokens, job) if held_out else None,
        processing_class=tokenizer,
        compute_metrics=step_metrics,
        callbacks=[ReportToJob(job), Speed(job, epoch_tokens=sum(map(len, table["input_ids"])))],
    )


def step_table(tokenizer: "PreTrainedTokenizerFast", data: Samples, field: str, max_tokens: int, job: Job) -> "Table":
    """Return `input_ids` and `labels` of every answer with labelled steps: 1 or 0 where a step ends, else -100.

    Raises:
        UserError: no answer has labelled steps, or a label is none, or a step is no part of its answer.
    """
    from datasets import Dataset as Table

    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    steps = right = answers = 0
    for row in read_jsonl(data.rows_file):
        for sample in row["samples"]:
            where = f"step `{job.name}`: row {row['id']} of `{field}`"
            classes = [_class_of(each["label"], where) for each in sample.get("steps") or ()]
            if not classes:
                continue
            answers += 1
            texts = [each["text"] for each in sample["steps"]]
            try:
                ids, ends = step_ends(tokenizer, row["messages"][:-1], sample["text"], texts)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            labels = [_IGNORED] * len(ids)
            for end, one in zip(ends, classes, strict=True):
                labels[end] = one
            ids, labels = ids[:max_tokens], labels[:max_tokens]
            if any(label >= 0 for label in labels):
                rows["input_ids"].append(ids)
                rows["labels"].append(labels)
                steps += sum(label >= 0 for label in labels)
                right += sum(label == 1 for label in labels)
    if not steps:
        raise UserError(
            f"step `{job.name}`: no answer in `{field}` has labelled steps within max_tokens: {max_tokens}; a process "
            "reward model learns from samples with `steps: [{text, label}]`, as `data.label_steps` gives them"
        )
    if left_out := answers - len(rows["labels"]):
        job.note(
            f"{left_out} of {answers} answers of `{field}` were left out: no step with a label ends within "
            f"max_tokens: {max_tokens}"
        )
    prefix = "" if field == "data" else f"{field}/"
    job.log_metrics({f"{prefix}answers": len(rows["labels"]), f"{prefix}steps": steps, f"{prefix}right_steps": right})
    return Table.from_dict(rows)


def step_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """Return the share of steps classified rightly, and the mean probability of right for right and for wrong ones."""
    import numpy as np

    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    counted = labels >= 0
    good = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))[counted]
    right = labels[counted] == 1
    metrics = {"step_accuracy": float(np.mean((good > 0.5) == right))}
    for name, chosen in (("right_steps", right), ("wrong_steps", ~right)):
        if chosen.any():
            metrics[f"probability_of_{name}"] = float(good[chosen].mean())
    return metrics


def _whole_answers(pairs: Sequence[Pair]) -> "Table":
    """Return the columns that TRL's reward trainer takes: prompt and answer of each side."""
    from datasets import Dataset as Table

    return Table.from_dict(
        {
            "chosen_ids": [pair.prompt + pair.chosen for pair in pairs],
            "rejected_ids": [pair.prompt + pair.rejected for pair in pairs],
        }
    )


def _class_of(label: Any, where: str) -> int:
    if label is None:
        return _IGNORED
    if label not in (0, 1):
        raise UserError(f"{where}: a step has the label {label!r}; it must be 1 (right), 0 (wrong) or null (unknown)")
    return int(label)
