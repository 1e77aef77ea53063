"""What a report is made of: a run, its steps, and where their results lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class ReportStep:
    """One step of a run and what became of it."""

    name: str
    """As in the recipe; a member of a matrix carries its values, `gguf[Q4_K_M]`."""
    kind: str
    """The step kind, `quantize.gguf`."""
    status: str
    """`finished`, `cached`, `failed`, `refused` or `skipped`."""
    seconds: float
    """Wall time; of a cached step, what it took to find it."""
    peak_memory: int
    """Bytes; 0 where it is not known."""
    parents: tuple[str, ...]
    """Names of the steps it takes artifacts from."""
    outputs: Mapping[str, str]
    """Digest of each output; the only output of a step has the name ``."""
    output_kinds: Mapping[str, str]
    """Artifact kind of each output, `Model`."""
    metrics: Mapping[str, float]
    """Last value of each metric."""
    metrics_file: Path | None
    """`metrics.jsonl`, lines of `{"step": int | null, "time": float, "values": {...}}`: the curves."""
    message: str = ""
    """Why it failed, was refused or skipped."""
    notes: Sequence[str] = ()
    """What a person must know of its result, a sentence each."""
    chosen: str = ""
    """Name of the step whose output it chose among several (`evaluate.best`)."""


@dataclass(frozen=True)
class RunReport:
    """One run of a recipe, complete: what the report shows and nothing else."""

    recipe: str
    """The recipe's name."""
    description: str
    """The comment that opens the recipe."""
    yaml: str
    """The resolved recipe."""
    began: datetime
    seconds: float
    """Wall time of the whole run."""
    steps: Sequence[ReportStep]
    comparisons: Mapping[str, Path]
    """By step name, the directory of its Report artifact: `rows.jsonl` and `summary.json`."""
    publication: str
    """One sentence on family, version and gate decision; empty where nothing was published."""
    versions: Mapping[str, str]
    """Versions of the packages it ran with."""
