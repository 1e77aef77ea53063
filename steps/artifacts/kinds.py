"""The artifact kinds: the types by which a recipe is checked before it runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from steps.artifacts.manifest import Manifest


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


F = TypeVar("F", bound=Facts)


class Artifact(Generic[F]):
    """A published artifact: its directory and its manifest. Subclasses are the kinds."""

    kind: ClassVar[str]
    Facts: ClassVar[type[Facts]]

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.facts: F = self.Facts.model_validate(manifest.facts)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def rows_sha256(self) -> str:
        """Of its `rows.jsonl`: the same for equal rows, whatever step made them; its own digest where it has none."""
        entry = self.manifest.files.get("rows.jsonl")
        return entry.sha256 if entry else self.digest

    @property
    def all_rows(self) -> set[str]:
        """sha256 of its rows and of those from which they were made; of a report, of those that it is about."""
        own = getattr(self.facts, "rows_sha256", self.rows_sha256)
        return {*([own] if own else []), *getattr(self.facts, "made_of", ())}

    def __repr__(self) -> str:
        return f"{self.kind}({self.digest[:12]} at {self.path})"

    @property
    def digest(self) -> str:
        """sha256 of the manifest: the artifact's name everywhere."""
        return self.manifest.digest

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return self.manifest.size

    @classmethod
    def named(cls) -> str:
        """The kind with its article, as sentences use it: `an Adapter`."""
        return f"{'an' if cls.kind[0] in 'AEIOU' else 'a'} {cls.kind}"

    @classmethod
    def of(cls, artifact: "Artifact[Any]") -> Self:
        """Return an artifact as this kind.

        Raises:
            TypeError: it is of another.
        """
        if not isinstance(artifact, cls):
            raise TypeError(f"{artifact!r} is no {cls.kind}")
        return artifact

    @classmethod
    def draft(cls, path: Path, facts: F) -> "Draft":
        """Say that the files under `path` are an artifact of this kind; the frame digests and publishes them."""
        return Draft(cls, path, facts)


class Draft:
    """What a step returns: files that are complete but not yet published."""

    def __init__(self, kind: type[Artifact[Any]], path: Path, facts: Facts) -> None:
        if not isinstance(facts, kind.Facts):
            raise TypeError(f"{kind.kind} has facts of type {kind.Facts.__name__}, not {type(facts).__name__}")
        self.kind = kind
        self.path = path
        self.facts = facts


class Dataset(Artifact[DatasetFacts]):
    """Conversations, one JSON object a line, in `rows.jsonl`: `{id, messages, source, task?}`.

    The last message is the assistant's: what fine-tuning learns, and the reference answer where rows are used as
    tasks. `task` is what a task's own verifier needs (`reasoning-gym://`).
    """

    kind = "Dataset"
    Facts = DatasetFacts

    @property
    def rows_file(self) -> Path:
        """The file of rows."""
        return self.path / "rows.jsonl"


class Documents(Artifact[DocumentsFacts]):
    """Plain texts, one JSON object a line, in `rows.jsonl`: `{id, prompt, text, source}`.

    `text` is what is learned, without a chat template, after `prompt`, which is empty for whole documents.
    """

    kind = "Documents"
    Facts = DocumentsFacts

    @property
    def rows_file(self) -> Path:
        """The file of rows."""
        return self.path / "rows.jsonl"


class Samples(Artifact[SamplesFacts]):
    """Tasks with sampled answers, in `rows.jsonl`.

    Each row is a Dataset's row and `samples: [{text, tokens, truncated, score, steps?}]`: the answer's text, its length
    in tokens, whether it ran out of tokens, what the verifier gave (null where none was asked), and the label of each
    reasoning step where those are known.
    """

    kind = "Samples"
    Facts = SamplesFacts

    @property
    def rows_file(self) -> Path:
        """The file of rows."""
        return self.path / "rows.jsonl"


class Preferences(Artifact[PreferencesFacts]):
    """Preferences, in `rows.jsonl`: `{id, prompt, chosen, rejected, source}`.

    `prompt` is a list of messages that ends with the user's; `chosen` and `rejected` are the texts of answers. One of
    the two may be null: an answer that was liked, or disliked, alone.
    """

    kind = "Preferences"
    Facts = PreferencesFacts

    @property
    def rows_file(self) -> Path:
        """The file of rows."""
        return self.path / "rows.jsonl"


class Model(Artifact[ModelFacts]):
    """A full Hugging Face checkpoint: safetensors only, with tokenizer and chat template."""

    kind = "Model"
    Facts = ModelFacts


class RewardModel(Artifact[ModelFacts]):
    """A checkpoint whose head gives a scalar reward."""

    kind = "RewardModel"
    Facts = ModelFacts


class Adapter(Artifact[AdapterFacts]):
    """PEFT weights and a reference to their base."""

    kind = "Adapter"
    Facts = AdapterFacts


class Quantized(Artifact[QuantizedFacts]):
    """A quantized model: GGUF file, or a GPTQ/AWQ/... checkpoint directory."""

    kind = "Quantized"
    Facts = QuantizedFacts

    @property
    def gguf_file(self) -> Path:
        """The one `.gguf` file of a GGUF artifact.

        Raises:
            ValueError: the format is another.
        """
        files = sorted(self.path.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(f"{self!r} is {self.facts.format}, it holds {len(files)} GGUF files")
        return files[0]


class Report(Artifact[ReportFacts]):
    """Metrics in the facts, per-sample rows in `rows.jsonl`, plots beside them."""

    kind = "Report"
    Facts = ReportFacts

    @property
    def rows_file(self) -> Path:
        """The file of per-sample rows."""
        return self.path / "rows.jsonl"


class Package(Artifact[PackageFacts]):
    """A bundle to hand out: weights, tokenizer, template, card, checksums."""

    kind = "Package"
    Facts = PackageFacts


KINDS: dict[str, type[Artifact[Any]]] = {
    kind.kind: kind
    for kind in (
        Dataset,
        Documents,
        Samples,
        Preferences,
        Model,
        RewardModel,
        Adapter,
        Quantized,
        Report,
        Package,
    )
}


def kind_named(name: str) -> type[Artifact[Any]]:
    """Return the artifact class of a kind's name; KeyError where there is none."""
    return KINDS[name]
