"""What is trained of a model: every weight, or an adapter of one of PEFT's kinds."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from steps.artifacts import Adapter, AdapterFacts, Draft, FourBit, Model
from steps.frame import Job, UserError
from steps.lm.checkpoint import Dtype, load_model, load_tokenizer, model_facts, name_tokens_as, save_model
from steps.lm.four_bit import load_four_bit
from steps.train._adapter_fit import EMBEDDINGS, check_fit, tied
from steps.train._divided import whole_model
from steps.train._new_tokens import learn_new_tokens, show_bias

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, Trainer

    from steps.train._settings import Training


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keeps_base: ClassVar[bool] = True
    """Whether the model with its adapter switched off is the base: then it can serve as its own reference."""


class Full(_Method):
    """Train every weight."""

    kind: Literal["full"] = "full"
    keeps_base: ClassVar[bool] = False


class _AdapterMethod(_Method, ABC):
    """A few weights beside the frozen base's linear layers."""

    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all but the output layer, or those whose names end so."""

    @property
    def four_bit(self) -> FourBit | None:
        """How the base is held in 4 bits; None where it is not."""
        return None

    def check_tied(self) -> None:
        """Check that the targets are no embedding, for a model whose output layer is its embedding.

        Raises:
            ValueError: one is.
        """
        names = [] if isinstance(self.targets, str) else self.targets
        if embedding := next((name for name in names if name.rpartition(".")[2] in EMBEDDINGS), None):
            raise ValueError(tied(embedding))

    @abstractmethod
    def peft_config(self) -> "PeftConfig":
        """Return the method as PEFT writes it."""


class _LowRank(_AdapterMethod):
    """W + scale · B·A, with W frozen."""

    rank: int = Field(default=16, ge=1)
    alpha: int | None = Field(default=None, ge=1)
    """The update is scaled by alpha / rank; twice the rank when unset."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    options: ClassVar[Mapping[str, Any]] = {}
    """What makes PEFT's LoRA this variant."""

    @property
    def usual_alpha(self) -> int:
        """`alpha` when it is unset."""
        return 2 * self.rank

    def peft_config(self) -> "PeftConfig":
        """Return the method as PEFT writes it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.usual_alpha,
            lora_dropout=self.dropout,
            target_modules=_targets(self),
            task_type="CAUSAL_LM",
            **self.options,
        )


class Lora(_LowRank):
    """Low-rank adapter: W + (alpha / rank) · B·A, with W frozen (https://arxiv.org/abs/2106.09685)."""

    kind: Literal["lora"] = "lora"


class QLora(_LowRank):
    """LoRA on a base that is held in 4 bits (https://arxiv.org/abs/2305.14314)."""

    kind: Literal["qlora"] = "qlora"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code of a weight: NormalFloat or a 4-bit float."""
    double_quant: bool = True
    """Quantize the blocks' scales too: 0.37 bits less per weight."""

    @property
    def four_bit(self) -> FourBit:
        """How the base is held in 4 bits."""
        return FourBit(quant_type=self.quant_type, double_quant=self.double_quant)


class Dora(_LowRank):
    """LoRA for the direction of W's columns, and a trained vector for their lengths (https://arxiv.org/abs/2402.09353)."""

    kind: Literal["dora"] = "dora"
    options: ClassVar[Mapping[str, Any]] = {"use_dora": True}


class RsLora(_LowRank):
    """LoRA whose scale is alpha / √rank, so that high ranks learn as fast (https://arxiv.org/abs/2312.03732)."""

    kind: Literal["rslora"] = "rslora"
    alpha: int | None = Field(default=None, ge=1)
    """The update is scaled by alpha / √rank; 8 when unset, which at rank 16 is LoRA's usual scale of 2."""
    options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}

    @property
    def usual_alpha(self) -> int:
        """`alpha` when it is unset."""
        return 8


class Pissa(_LowRank):
    """LoRA that begins as W's principal singular directions; given out as LoRA of twice the rank on the base itself.

    https://arxiv.org/abs/2404.02948
    """

    kind: Literal["pissa"] = "pissa"
    alpha: int | None = Field(default=None, ge=1)
    """The update is scaled by alpha / rank; the rank when unset, as in the paper."""
    iterations: int | None = Field(default=None, ge=1)
    """Subspace iterations of a fast, approximate SVD (16 served the paper's 7B models); exact when unset."""
    # What the directions take is taken from the frozen weights.
    keeps_base: ClassVar[bool] = False

    @property
    def usual_alpha(self) -> int:
        """`alpha` when it is unset."""
        return self.rank

    def peft_config(self) -> "PeftConfig":
        """Return the method as PEFT writes it."""
        config = super().peft_config()
        start = "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"
        config.init_lora_weights = start  # pyright: ignore[reportAttributeAccessIssue]
        return config


class Oft(_AdapterMethod):
    """Orthogonal fine-tuning: W·R with R block-diagonal and orthogonal (https://arxiv.org/abs/2306.07280)."""

    kind: Literal["oft"] = "oft"
    block_size: int = Field(default=32, ge=2)
    """Side of R's blocks; it must divide the inputs of every target."""
    exact: bool = False
    """Make R by Cayley's own formula, which inverts a matrix, not by five terms of its Neumann series."""

    def peft_config(self) -> "PeftConfig":
        """Return the method as PEFT writes it."""
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block_size,
            use_cayley_neumann=not self.exact,
            target_modules=_targets(self),
            task_type="CAUSAL_LM",
        )


AdapterMethod = Annotated[Lora | QLora | Dora | RsLora | Pissa | Oft | Full, Field(discriminator="kind")]
"""What a trainer's `adapter:` may be."""


def trainable_model(base: Model, method: AdapterMethod, dtype: Dtype) -> "PreTrainedModel":
    """Load a model in the precision it is trained in, with a fresh adapter where one is asked for.

    Raises:
        UserError: the model has no layer that `adapter.targets` names, or the adapter does not fit one.
    """
    if isinstance(method, Full):
        return thaw_padding(load_model(base.path, "float32"))
    return _adapted(base, method, dtype)  # pyright: ignore[reportReturnType]


def thaw_padding(model: "PreTrainedModel") -> "PreTrainedModel":
    """Let every row of a model's embeddings learn, and return the model.

    transformers gives the row of the padding token no gradient, but it may be a token like any other: where a
    tokenizer has none for padding alone, trainers take the end or the beginning. What only pads learns nothing anyhow,
    since neither attention nor the loss sees it.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def trained_draft(
    config: "Training",
    job: Job,
    trainer: "Trainer",
    model: "PreTrainedModel",
    best: Path | None = None,
) -> Draft:
    """Save what was trained as an artifact: an Adapter, or a whole Model in `dtype`.

    Of several processes all must come here; only the main one returns.

    Args:
        config: the trainer's settings.
        job: the step's job.
        trainer: what trained the model.
        model: what was trained.
        best: trained weights to give out in place of the last ones.
    """
    import torch
    from safetensors.torch import load_file

    from steps.train._divergence import check_finite

    base, method, dtype = config.model, config.adapter, config.dtype
    model = whole_model(trainer, model, lambda: trainable_model(base, method, dtype))
    out = job.output()
    if best:
        model.load_state_dict(load_file(best), strict=False)
    check_finite(job, model)
    if isinstance(method, Full):
        model.to(dtype=getattr(torch, dtype))  # pyright: ignore[reportCallIssue]
        name_tokens_as(model, base.path)
        # Not the trainer's, which pads and ends as trainers ask for: a token made special splits text otherwise.
        save_model(model, load_tokenizer(base.path), out)
        return Model.draft(out, model_facts(out, origin=base.facts.origin, licence=base.facts.licence))
    if base.facts.new_tokens:
        job.note(f"beside the adapter the embeddings of {len(base.facts.new_tokens)} control tokens were learned")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if isinstance(method, Pissa):
        _save_as_lora(base, method, dtype, model, out)
    else:
        model.save_pretrained(out)
    settings = normalise_adapter(out, base)
    facts = AdapterFacts(
        method=method.kind,
        rank=settings["r"] if isinstance(method, _LowRank) else None,
        parameters=trained,
        base=base.digest,
        four_bit=method.four_bit,
        base_architecture=base.facts.architecture,
        template_sha256=base.facts.template_sha256,
        stop_token_ids=base.facts.stop_token_ids,
    )
    return Adapter.draft(out, facts)


def normalise_adapter(directory: Path, base: Model) -> dict[str, Any]:
    """Make a saved adapter the same bytes on every machine; return its settings.

    PEFT names the base by a path of this machine and writes sets in any order; neither may reach the digest.
    """
    (directory / "README.md").unlink(missing_ok=True)
    file = directory / "adapter_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    settings["base_model_name_or_path"] = f"artifact://{base.digest}"
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = sorted(settings["target_modules"])
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return settings


def _targets(method: _AdapterMethod) -> str | list[str]:
    return method.targets if isinstance(method.targets, str) else sorted(method.targets)


def _adapted(base: Model, method: _AdapterMethod, dtype: Dtype) -> "PeftModel":
    import torch
    from peft import get_peft_model

    frozen = load_four_bit(base.path, dtype, method.four_bit) if method.four_bit else load_model(base.path, dtype)
    thaw_padding(frozen)
    with torch.random.fork_rng(enabled=isinstance(method, Pissa)):
        if isinstance(method, Pissa):
            # The fast SVD draws random numbers, and the beginning must be found again at the end, see `_save_as_lora`.
            torch.manual_seed(0)
        config = method.peft_config()
        learn_new_tokens(frozen, config, base.facts.new_tokens)
        try:
            model = get_peft_model(frozen, config)
        except ValueError as error:
            raise UserError(f"adapter.targets: {error}") from error
    show_bias(model)
    check_fit(
        model,  # pyright: ignore[reportArgumentType]
        rank=method.rank if isinstance(method, Pissa) else None,
        block_size=method.block_size if isinstance(method, Oft) else None,
    )
    return model  # pyright: ignore[reportReturnType]


def _save_as_lora(base: Model, method: Pissa, dtype: Dtype, model: "PreTrainedModel", out: Path) -> None:
    """Save W_rest + B·A as W + (B·A − B₀·A₀), an ordinary LoRA of twice the rank, by PEFT's own conversion."""
    with TemporaryDirectory() as folder:
        initial = Path(folder) / "initial"
        _adapted(base, method, dtype).save_pretrained(str(initial))
        model.save_pretrained(out, path_initial_model_for_weight_conversion=str(initial))
