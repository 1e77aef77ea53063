"""What passes between the flow and a step's process: a spec going in, a result coming out, both JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from steps.frame.config import Resources

SPEC_NAME = "spec.json"
RESULT_NAME = "result.json"
LOG_NAME = "log.txt"
METRICS_NAME = "metrics.jsonl"
PROGRESS_NAME = "progress.json"
PLOTS_NAME = "plots"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class InputSpec(_Message):
    """One input artifact: its place on this machine and its digest."""

    path: Path
    digest: str


class StepSpec(_Message):
    """All a process needs to run one step."""

    name: str
    """Name in the recipe."""
    kind: str
    key: str
    config: Mapping[str, Any]
    """The config without its inputs."""
    inputs: Mapping[str, tuple[InputSpec, ...]]
    """Artifacts by field; several where the field is a list."""
    lists: tuple[str, ...] = ()
    """Fields of `inputs` that are lists."""
    work: Path
    """Directory of this step: spec, log, result, staging, scratch. Survives a restart."""
    store: Path
    cache: Path
    """Directory for downloads, shared by all steps."""
    resolved: Mapping[str, InputSpec] = {}
    """`registry://` sources, already fetched by the flow."""
    sources: Mapping[str, str] = {}
    """Fingerprint, as it entered the key, of each other source that the step reads."""
    code: str = ""
    """Digest of the step's code, as it entered the key."""
    code_files: Mapping[Path, int] = {}
    """The files behind it, and when each was changed last (nanoseconds)."""
    resources: Resources = Resources()
    devices: tuple[str, ...] = ()
    """GPUs that it may use, as `CUDA_VISIBLE_DEVICES` names them, where it asks for some."""


class StepResult(_Message):
    """What became of a step."""

    status: Literal["finished", "refused", "failed"]
    outputs: Mapping[str, str] = {}
    """Artifact digest by output name."""
    message: str = ""
    """Why it was refused (bad input) or failed."""
    metrics: Mapping[str, float] = {}
    """Last value of each metric."""
    notes: tuple[str, ...] = ()
    """What a person must know of the result, a sentence each."""
    seconds: float = 0
    peak_memory: int = 0
    """Largest resident set of the process in bytes."""
    load_seconds: float = 0
    """Of `seconds`, what the frame itself took: start, digests, publishing."""

    def write(self, work: Path, writer: str) -> None:
        """Write it whole, as what became of the step that works in `work`.

        Args:
            work: the step's directory.
            writer: which process writes, where several may.
        """
        partial = work / f"{RESULT_NAME}.{writer}"
        partial.write_text(self.model_dump_json())
        partial.replace(work / RESULT_NAME)
