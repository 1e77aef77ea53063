"""`train.sft`: supervised fine-tuning with TRL, LoRA or full; loss on the assistant's tokens only."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from steps.artifacts import Adapter, AdapterFacts, Artifact, Dataset, Draft, Model
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.frame.hardware import fast_dtype
from steps.lm.chat import conversation
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer, model_facts, save_model
from steps.lm.rows import read_jsonl

if TYPE_CHECKING:
    import torch
    from datasets import Dataset as Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl.trainer.sft_config import SFTConfig


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Lora(_Method):
    """Low-rank adapter: W + (alpha / rank) · B·A, with W frozen."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: int | None = Field(default=None, ge=1)
    """Scale of the update; twice the rank when unset."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter."""


class Full(_Method):
    """Train every weight."""

    kind: Literal["full"] = "full"


class TrainSft(StepConfig):
    """Fine-tune a model on conversations; gives an Adapter (LoRA) or a Model (full)."""

    model: Input[Model]
    data: Input[Dataset]
    adapter: Annotated[Lora | Full, Field(discriminator="kind")] = Lora()
    """`{kind: lora, rank: 16}` or `{kind: full}`."""
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=1024, ge=8)
    """Longer rows are cut at the end."""
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Of the frozen weights (LoRA) or of the forward pass (full; the trained weights are float32); unset, what this
    machine is fastest in."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """A crash loses at most so many optimizer steps."""
    seed: int = 0

    def produced(self) -> type[Artifact]:
        """Kind of the output: it depends on the method."""
        return Model if isinstance(self.adapter, Full) else Adapter


@step(
    "train.sft",
    produces=(Adapter, Model),
    reference="https://arxiv.org/abs/2203.02155",
    libraries=("torch", "transformers", "trl", "peft", "accelerate", "tokenizers"),
    preload=("torch", "transformers", "datasets", "peft", "trl.trainer.sft_trainer"),
    resources=Resources(cpus=0),
)
def train_sft(config: TrainSft, job: Job) -> Draft:
    """Train, resuming from the last complete checkpoint where an earlier attempt left one."""
    from transformers import set_seed
    from trl.trainer.sft_trainer import SFTTrainer

    from steps.train._progress import ReportToJob

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model.path)
    table = tokenised(config, tokenizer, job)
    model = prepared_model(config)
    trainer = SFTTrainer(
        model=model,
        args=arguments(config, job.scratch / "checkpoints"),
        train_dataset=table,
        processing_class=tokenizer,
        callbacks=[ReportToJob(job)],
    )
    checkpoint = last_checkpoint(job.scratch / "checkpoints")
    if checkpoint:
        job.log.info("resuming from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    out = job.output()
    if isinstance(config.adapter, Full):
        model.to(dtype=dtype_of(config))  # pyright: ignore[reportCallIssue]
        save_model(model, tokenizer, out)
        return Model.draft(out, model_facts(out, origin=config.model.facts.origin, licence=config.model.facts.licence))
    return _adapter_draft(config, config.adapter, model, out)


def prepared_model(config: TrainSft) -> "PreTrainedModel":
    """Load the model in the precision it is trained in, with a fresh adapter where one is asked for."""
    if isinstance(config.adapter, Full):
        return load_model(config.model.path, "float32")
    from peft import LoraConfig, get_peft_model

    targets = config.adapter.targets
    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha or 2 * config.adapter.rank,
        lora_dropout=config.adapter.dropout,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(load_model(config.model.path, config.dtype), lora)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise UserError(f"adapter.targets: {error}") from error


def tokenised(config: TrainSft, tokenizer: "PreTrainedTokenizerFast", job: Job) -> "Table":
    """Return `input_ids` and `labels` (-100 outside the assistant's turns) for every row.

    Raises:
        UserError: no row has an assistant token within `max_tokens`.
    """
    from datasets import Dataset as Table

    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    cut = 0
    for row in read_jsonl(config.data.rows_file):
        rendered = conversation(tokenizer, row["messages"], config.model.facts.stop_token_ids)
        ids = rendered.ids[: config.max_tokens]
        labels = [token if mine else -100 for token, mine in zip(ids, rendered.assistant, strict=False)]
        cut += len(ids) < len(rendered.ids)
        if any(label != -100 for label in labels):
            rows["input_ids"].append(ids)
            rows["labels"].append(labels)
    if not rows["input_ids"]:
        raise UserError(f"step `{job.name}`: no row has an answer within max_tokens: {config.max_tokens}; raise it")
    tokens = sum(map(len, rows["input_ids"]))
    answer_tokens = sum(label != -100 for labels in rows["labels"] for label in labels)
    job.log_metrics({"rows": len(rows["labels"]), "rows_cut": cut, "tokens": tokens, "answer_tokens": answer_tokens})
    return Table.from_dict(rows)


def arguments(config: TrainSft, checkpoints: Path) -> "SFTConfig":
    """Translate the config into TRL's arguments."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    full = isinstance(config.adapter, Full)
    return SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_length=config.max_tokens,
        # Adapters compute in their base's own precision; only full training needs autocast over float32 weights.
        bf16=full and config.dtype == "bfloat16",
        fp16=full and config.dtype == "float16",
        # Rows of like length share a batch: on short rows padding is most of the cost otherwise.
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=False,
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=1,
        logging_steps=5,
        logging_first_step=True,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; the trainer writes `trainer_state.json` last."""
    numbered = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for number in sorted(numbered, reverse=True):
        if _is_complete(numbered[number] / "trainer_state.json"):
            return numbered[number]
    return None


def _is_complete(state: Path) -> bool:
    # The state ends with a closing brace; a kill while it was written leaves it without.
    return state.exists() and state.read_text(encoding="utf-8").rstrip().endswith("}")


def dtype_of(config: TrainSft) -> "torch.dtype":
    """Return the torch type of the config's `dtype`."""
    import torch

    return getattr(torch, config.dtype)


def _adapter_draft(config: TrainSft, lora: Lora, model: "PreTrainedModel", out: Path) -> Draft:
    import json

    base = config.model
    model.save_pretrained(out)
    # PEFT names the base by a path of this machine and writes sets in any order; neither may reach the digest.
    (out / "README.md").unlink(missing_ok=True)
    file = out / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = f"artifact://{base.digest}"
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = sorted(settings["target_modules"])
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = AdapterFacts(
        method=lora.kind,
        rank=lora.rank,
        parameters=trained,
        base=base.digest,
        base_architecture=base.facts.architecture,
        template_sha256=base.facts.template_sha256,
        stop_token_ids=base.facts.stop_token_ids,
    )
    return Adapter.draft(out, facts)
