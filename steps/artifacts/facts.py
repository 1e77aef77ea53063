"""What a later step must know of each kind of artifact without opening its files."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """What a later step must know of an artifact without opening its files."""

    # A perplexity may be no number at all; JSON has words for that only as strings.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def as_plain(self) -> dict[str, Any]:
        """Return what a manifest keeps of them."""
        return json.loads(self.model_dump_json())


class DatasetFacts(Facts):
    """Facts of rows in `rows.jsonl`."""

    rows: int
    format: Literal["messages"] = "messages"
    template_sha256: str | None = None
    """Chat template by which the rows' lengths were measured."""
    statistics: Mapping[str, float] = {}
    made_of: tuple[str, ...] = ()
    """sha256 of the rows from which a step drew or made these (a mix, a filter), and of those behind them."""


class DocumentsFacts(Facts):
    """Facts of texts in `rows.jsonl`."""

    rows: int
    layout: Literal["text", "completion"]
    """Whole documents, or texts that go on from a prompt."""
    statistics: Mapping[str, float] = {}
    made_of: tuple[str, ...] = ()
    """As `DatasetFacts.made_of`."""


class SamplesFacts(Facts):
    """Facts of sampled answers in `rows.jsonl`."""

    rows: int
    """Tasks."""
    samples: int
    """Answers of all tasks together."""
    pass_rate: float | None = None
    """Mean share of answers that the verifier passed; None where none was asked."""
    statistics: Mapping[str, float] = {}
    made_of: tuple[str, ...] = ()
    """As `DatasetFacts.made_of`."""


class PreferencesFacts(Facts):
    """Facts of preferences in `rows.jsonl`."""

    rows: int
    paired: bool
    """Whether every row has both sides; unpaired rows (liked or disliked alone) are for KTO."""
    statistics: Mapping[str, float] = {}
    made_of: tuple[str, ...] = ()
    """As `DatasetFacts.made_of`."""


class ModelFacts(Facts):
    """Facts of a full Hugging Face checkpoint (safetensors, config, tokenizer)."""

    architecture: str
    """Class name in `config.json`, e.g. `LlamaForCausalLM`."""
    parameters: int
    dtype: str
    hidden_size: int
    vocabulary: int
    tied_embeddings: bool
    tokenizer_sha256: str
    """sha256 of `tokenizer.json`."""
    template_sha256: str | None
    """sha256 of the chat template's text; None where the tokenizer has none."""
    stop_token_ids: tuple[int, ...]
    licence: str | None = None
    origin: str | None = None
    """URI of the pretrained model at the root of the lineage."""
    new_tokens: tuple[int, ...] = ()
    """Control tokens of a chat template that it was given, of which it has learned nothing yet."""
    chosen_on: tuple[str, ...] = ()
    """sha256 of the rows by which it, or what it was made of, was chosen, and of those behind them (`made_of`); on all
    of these it looks better than it is."""


class FourBit(Facts):
    """How bitsandbytes holds a frozen base in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    """Whether the blocks' scales are quantized too."""


class AdapterFacts(Facts):
    """Facts of PEFT weights; `base` is the digest of the model they were trained on."""

    method: str
    """`lora`, `qlora`, `dora`, `rslora`, `pissa`, `oft`."""
    rank: int | None
    """None where the method has none (OFT)."""
    parameters: int
    base: str
    four_bit: FourBit | None = None
    """How the base was held while the adapter was trained; None: not quantized."""
    base_architecture: str
    template_sha256: str | None
    stop_token_ids: tuple[int, ...]
    chosen_on: tuple[str, ...] = ()
    """As `ModelFacts.chosen_on`."""


class QuantizedFacts(Facts):
    """Facts of a quantized model."""

    format: Literal["gguf", "gptq", "awq", "bnb", "fp8"]
    scheme: str
    """The field's own name: `Q4_K_M`, `Int4-g128`, ..."""
    bits_per_weight: float
    template_sha256: str | None
    stop_token_ids: tuple[int, ...]
    architecture: str
    parameters: int
    fallbacks: int = 0
    """Tensors stored in another type than the scheme's own (rows that do not divide into its blocks)."""
    unmarked_stop_token_ids: tuple[int, ...] = ()
    """Those of `stop_token_ids` that the files cannot name: a runtime must be told to stop at them."""
    chosen_on: tuple[str, ...] = ()
    """As `ModelFacts.chosen_on`."""


class ReportFacts(Facts):
    """Facts of a report: its headline metrics; the per-sample rows are in its files."""

    metrics: Mapping[str, float]
    rows_sha256: str = ""
    """Of the `rows.jsonl` that the models were measured on; empty where it is about none."""
    made_of: tuple[str, ...] = ()
    """sha256 of all rows among its inputs, and of those from which these were made."""


class PackageFacts(Facts):
    """Facts of a package: what it holds."""

    members: tuple[str, ...]
