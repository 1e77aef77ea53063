"""The artifact kinds: the types by which a recipe is checked before it runs."""

from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from steps.artifacts.facts import (
    AdapterFacts,
    DatasetFacts,
    DocumentsFacts,
    Facts,
    ModelFacts,
    PackageFacts,
    PreferencesFacts,
    QuantizedFacts,
    ReportFacts,
    SamplesFacts,
)
from steps.artifacts.manifest import Manifest

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
