"""What every trainer has in common: the model, what of it is trained, and how the optimizer runs."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from steps.artifacts import Adapter, Artifact, Model
from steps.frame import Input, Job, Resources, Seed, StepConfig, UserError
from steps.frame.hardware import fast_dtype
from steps.lm.checkpoint import Dtype, give_padding, load_tokenizer
from steps.train._adapters import AdapterMethod, Full, Lora, Oft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRELOAD = ("torch", "transformers", "datasets", "peft", "trl.trainer.sft_trainer")
"""Modules that every trainer needs."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "bitsandbytes")
"""Distributions that shape every trainer's result."""

MUON = "matrices=muon"
"""`optim_args` of a trainer whose matrices Muon is to train: transformers has no name for it, see `train`."""
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "muon": "adamw_torch"}


class Training(StepConfig):
    """Settings of every trainer."""

    model: Input[Model]
    adapter: AdapterMethod = Lora()
    """`{kind: lora, rank: 16}`, another kind of adapter, or `{kind: full}` to train every weight."""
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """AdamW; the same with its state in 8 bits (a quarter of the memory); or Muon for matrices, AdamW for the rest."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    final_rate: float = Field(default=0.0, ge=0, lt=1)
    """Share of the learning rate at which a cosine ends."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, about a third more time."""
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Of the frozen weights (adapters) or of the forward pass (full; the trained weights are float32); unset, what this
    machine is fastest in."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """A crash loses at most so many optimizer steps."""
    seed: Seed = 0

    processes_shape_result: ClassVar[bool] = True

    @model_validator(mode="after")
    def _settings_agree(self) -> "Training":
        if self.final_rate and self.schedule != "cosine":
            raise ValueError(f"final_rate: only a cosine schedule ends above zero, not {self.schedule}; leave it out")
        if self.optimizer == "muon" and isinstance(self.adapter, Oft):
            raise ValueError(
                "optimizer: Muon trains matrices, and OFT's weights are none (rows of rotation angles); use adamw"
            )
        return self

    def check_resources(self, resources: Resources) -> None:
        """Processes share the rows of an optimizer step, and divide the weights where `launch` says so."""
        if self.optimizer == "muon" and resources.divided:
            raise ValueError(
                f"optimizer: Muon trains whole matrices, which `launch: {resources.launcher}` divides; use adamw, or "
                "launch: ddp"
            )
        if self.optimizer == "adamw_8bit" and resources.world > 1 and resources.launcher == "fsdp2":
            raise ValueError(
                "optimizer: 8-bit AdamW cannot step weights that `launch: fsdp2` divides; use adamw, or launch: zero2"
            )

    def check_tied(self, fields: Collection[str]) -> None:
        """An adapter on an embedding that is the output layer, too, is no sum that could be merged."""
        if "model" in fields and not isinstance(self.adapter, Full):
            self.adapter.check_tied()

    @property
    def runtimes(self) -> tuple[str, ...]:
        """bitsandbytes, where it holds the base in 4 bits or steps the weights in 8."""
        return ("bitsandbytes",) if self.optimizer == "adamw_8bit" else self.opened_by

    @property
    def opened_by(self) -> tuple[str, ...]:
        """bitsandbytes, where the base of the adapter is in 4 bits."""
        four_bit = not isinstance(self.adapter, Full) and self.adapter.four_bit
        return ("bitsandbytes",) if four_bit else ()

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter drops inputs: TRL's preference trainers turn all dropout off, unless told not to."""
        return getattr(self.adapter, "dropout", 0.0) > 0

    def produced(self) -> type[Artifact]:
        """Kind of the output: it depends on what is trained."""
        return Model if isinstance(self.adapter, Full) else Adapter


def training_tokenizer(config: Training, job: Job) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of the model that is trained, with a padding and an end token, which trainers ask for.

    What is given out with the trained weights is the base's own tokenizer, without what is added here.

    Raises:
        UserError: the model stops at no token, or at none that both it and its tokenizer have.
    """
    tokenizer, facts = load_tokenizer(config.model.path), config.model.facts
    own: Any = tokenizer.eos_token_id
    if own is None or own >= facts.vocabulary:
        texts = [tokenizer.convert_ids_to_tokens(stop) for stop in facts.stop_token_ids if stop < facts.vocabulary]
        named = next((text for text in texts if text is not None), None)
        if named is None:
            raise UserError(_no_end(config, job, own))
        tokenizer.eos_token = str(named)
    give_padding(tokenizer, facts.stop_token_ids, facts.vocabulary)
    return tokenizer


def _no_end(config: Training, job: Job, own: int | None) -> str:
    known = sorted({*config.model.facts.stop_token_ids, *([] if own is None else [own])})
    if not known:
        return (
            f"step `{job.name}`: `model` has no end token, so that it would never learn to stop; name one as "
            "`eos_token` in its tokenizer_config.json, or give it a chat template that ends a turn with a token"
        )
    return (
        f"step `{job.name}`: `model` stops at {', '.join(map(str, known))}, which is no token of both its tokenizer "
        f"and its embedding of {config.model.facts.vocabulary}; name one that is as `eos_token` in its "
        "tokenizer_config.json and as `eos_token_id` in its generation_config.json"
    )


def common_arguments(config: Training, checkpoints: Path) -> dict[str, Any]:
    """Translate the common settings into arguments of any of TRL's configs."""
    import torch

    full = isinstance(config.adapter, Full)
    floor = {"min_lr_rate": config.final_rate} if config.final_rate else {}
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "optim": _OPTIMIZERS[config.optimizer],
        "optim_args": MUON if config.optimizer == "muon" else None,
        "lr_scheduler_type": "cosine_with_min_lr" if floor else config.schedule,
        "lr_scheduler_kwargs": floor,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        # Trained weights are float32. On processors adapters compute so (they are small, and casting costs more); on
        # GPUs they must not, and float16 needs its gradients scaled.
        "bf16": (full or torch.cuda.is_available()) and config.dtype == "bfloat16",
        "fp16": (full or torch.cuda.is_available()) and config.dtype == "float16",
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "save_total_limit": 1,
        "logging_steps": 5,
        "logging_first_step": True,
        # transformers would log a loss that is no number as the mean of the others, and train on.
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }
