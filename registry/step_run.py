"""The MLflow run of one step: params, curves, inputs, files, and a logged model per output that is a model."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict

from registry.importing import importing
from registry.index import Entry, Index
from registry.location import Location
from registry.run_data import Point, flatten, json_tag, last_values, mlflow_name, read_points
from registry.tracking import Tracking
from steps.artifacts import MANIFEST_NAME, Artifact, Manifest, Report, Store

if TYPE_CHECKING:
    from mlflow.entities import Run

MODEL_KINDS = frozenset({"Model", "Adapter", "Quantized", "RewardModel", "Package"})
"""Artifact kinds that MLflow keeps as logged models; the files of the others lie in the run."""

ENTRY_NAME = "entry.json"
_BATCH_PARAMS = 100
_BATCH_METRICS = 1000

T = TypeVar("T")


class StepRecord(BaseModel):
    """What the flow says of a finished step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name in the recipe, e.g. `gguf[Q4_K_M]`."""
    kind: str
    key: str
    config: Mapping[str, Any]
    """The resolved config."""
    likeness: str = ""
    """Digest of its settings and those of all steps before it: steps that are alike take alike."""
    libraries: Mapping[str, str] = {}
    inputs: Mapping[str, str] = {}
    """Artifact digest by role (`model`, `candidates.0`)."""
    outputs: Mapping[str, str]
    """Artifact digest by output name (empty where there is one)."""
    notes: tuple[str, ...] = ()
    """What a person must know of the result, a sentence each."""
    metrics_file: Path | None = None
    """Lines `{"step": int | null, "time": seconds, "values": {name: float}}`."""
    plots_dir: Path | None = None
    log_file: Path | None = None
    seconds: float
    peak_memory: int
    """Bytes."""
    began: datetime
    ended: datetime
    subjects: Mapping[str, str] = {}
    """For metrics named `PREFIX/...`: the digest of the input model that the prefix stands for."""


def format_of(manifest: Manifest) -> tuple[str, str]:
    """Return the format (`hf`, `adapter`, `gguf`, `gptq`, ...) and scheme (`Q4_K_M`, or empty) of a model artifact."""
    if manifest.kind == "Quantized":
        return str(manifest.facts["format"]), str(manifest.facts["scheme"])
    plain = {"Model": "hf", "Adapter": "adapter", "RewardModel": "reward", "Package": "package"}
    return plain[manifest.kind], ""


def output_folder(output: str) -> str:
    """Return the folder of a run in which the files of one of its outputs lie."""
    return f"outputs/{output or 'output'}"


class StepRun:
    """Fills one child run. Nothing here says that the run is finished: `Recorder` does, when all of it is there."""

    def __init__(
        self, tracking: Tracking, index: Index, store: Store, run: "Run", recipe: str, step: StepRecord
    ) -> None:
        self.tracking = tracking
        self.client = tracking.client
        self.index = index
        self.store = store
        self.run_id: str = run.info.run_id
        self.experiment: str = run.info.experiment_id
        self.location = tracking.of_run(run)
        self.recipe = recipe
        self.step = step

    def write(self) -> Entry:
        """Write everything and return the entry, which is also the run's last file."""
        artifacts = {name: self.store.open(digest) for name, digest in self.step.outputs.items()}
        self._log_config()
        self._log_inputs()
        models = {name: self._log_model(name, made) for name, made in artifacts.items() if made.kind in MODEL_KINDS}
        for name, made in artifacts.items():
            self.location.share(made.path / MANIFEST_NAME, f"manifests/{name or 'output'}/{MANIFEST_NAME}")
            if made.kind not in MODEL_KINDS:
                share_files(made, self.location, f"{output_folder(name)}/")
        self._log_work()
        if self.step.notes:
            text = "".join(f"{note}.\n\n" for note in self.step.notes)
            self.client.set_tag(self.run_id, "mlflow.note.content", text[:8000])
        metrics = self._log_metrics(artifacts, models)
        if models:
            with importing():
                from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, 0) for model_id in models.values()])
        entry = Entry(
            key=self.step.key,
            recipe=self.recipe,
            step=self.step.name,
            kind=self.step.kind,
            likeness=self.step.likeness,
            outputs=self.step.outputs,
            models=models,
            run_id=self.run_id,
            metrics=metrics,
            notes=self.step.notes,
            seconds=self.step.seconds,
            peak_memory=self.step.peak_memory,
            size=sum(made.size for made in artifacts.values()),
            finished_at=self.step.ended,
        )
        self.location.write(entry.model_dump_json(indent=1).encode(), ENTRY_NAME)
        return entry

    def _log_config(self) -> None:
        with importing():
            from mlflow.entities import Param

        params = {mlflow_name(name): value for name, value in flatten(self.step.config)}
        for batch in _batches([Param(name, value) for name, value in params.items()], _BATCH_PARAMS):
            self.client.log_batch(self.run_id, params=batch)

    def _log_inputs(self) -> None:
        """Link the run to its parents: datasets as MLflow datasets, models as logged models."""
        with importing():
            from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        datasets, models = [], set()
        for role, digest in self.step.inputs.items():
            artifact = self.store.open(digest)
            entry = self.index.get(artifact.manifest.key)
            output = artifact.manifest.output
            if artifact.kind in MODEL_KINDS and entry and output in entry.models:
                models.add(entry.models[output])
            elif artifact.kind in ("Dataset", "Documents", "Samples", "Preferences"):
                name = f"{entry.step}.{output}".rstrip(".") if entry else artifact.manifest.step
                where = {"digest": digest}
                if entry:
                    where["uri"] = f"runs:/{entry.run_id}/{output_folder(output)}"
                # MLflow keeps 36 characters of a data set's digest; the whole one is in the source.
                dataset = Dataset(
                    name, digest[:36], "posttrain", json.dumps(where), profile=json.dumps(dict(artifact.manifest.facts))
                )
                datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
        if datasets or models:
            self.client.log_inputs(self.run_id, datasets, [LoggedModelInput(model_id) for model_id in sorted(models)])

    def _log_model(self, output: str, artifact: Artifact[Any]) -> str:
        """Make the logged model of one output, its files linked or uploaded; return its id."""
        manifest = artifact.manifest
        form, scheme = format_of(manifest)
        name = re.sub(r"[/:.%\"']", "-", f"{self.step.name}-{output}".rstrip("-"))
        tags = {
            "posttrain.kind": manifest.kind,
            "posttrain.digest": artifact.digest,
            "posttrain.key": manifest.key,
            "posttrain.format": form,
            "posttrain.scheme": scheme,
            "posttrain.parents": json_tag({role: parent.digest for role, parent in manifest.parents.items()}),
        }
        facts = {mlflow_name(fact): value for fact, value in flatten(manifest.facts)}
        model = self.client.create_logged_model(
            self.experiment, name, self.run_id, tags, facts, model_type=manifest.kind
        )
        share_files(artifact, self.tracking.of_model(model.model_id, artifact.digest), "")
        self.client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    def _log_work(self) -> None:
        """Copy what lies in the step's work directory, which the next run of the step will reuse: plots and log."""
        if self.step.plots_dir and self.step.plots_dir.is_dir():
            for path in sorted(path for path in self.step.plots_dir.rglob("*") if path.is_file()):
                self.location.write(path.read_bytes(), f"plots/{path.relative_to(self.step.plots_dir).as_posix()}")
        if self.step.log_file and self.step.log_file.is_file():
            self.location.write(self.step.log_file.read_bytes(), "log.txt")

    def _log_metrics(self, artifacts: Mapping[str, Artifact[Any]], models: Mapping[str, str]) -> dict[str, float]:
        """Log the curves to the run, and the last value of each metric to the models it speaks of."""
        with importing():
            from mlflow.entities import Metric

        points = read_points(self.step.metrics_file)
        last = last_values(points)
        ended = self.step.ended.timestamp()
        totals = {"seconds": self.step.seconds, "peak_memory_bytes": float(self.step.peak_memory)}
        for artifact in artifacts.values():
            totals |= artifact.facts.metrics if isinstance(artifact, Report) else {}
        extra = {name: Point(name, 0, ended, value) for name, value in totals.items() if name not in last}
        points, last = [*points, *extra.values()], last | extra
        logged, booked = [], []
        for point in points:
            key, stamp = mlflow_name(point.name), int(point.time * 1000)
            models_meant = self._subjects(point.name, models) if last[point.name] == point else []
            first, *others = models_meant or [None]
            logged.append(Metric(key, point.value, stamp, point.step, model_id=first, run_id=self.run_id))
            booked += [Metric(key, point.value, stamp, point.step, model_id=m, run_id=self.run_id) for m in others]
        for batch in [*_batches(logged, _BATCH_METRICS), *_batches(booked, _BATCH_METRICS)]:
            self.client.log_batch(self.run_id, metrics=batch)
        return {name: point.value for name, point in last.items()}

    def _subjects(self, metric: str, models: Mapping[str, str]) -> list[str]:
        """Return the models that a metric speaks of: an input named by its prefix, else the step's own outputs."""
        prefix, slash, _ = metric.partition("/")
        digest = self.step.subjects.get(prefix) if slash else None
        if digest is None:
            return list(models.values())
        manifest = self.store.open(digest).manifest
        entry = self.index.get(manifest.key)
        return [entry.models[manifest.output]] if entry and manifest.output in entry.models else []


def share_files(artifact: Artifact[Any], location: Location, prefix: str) -> None:
    """Give a location all files of an artifact, the manifest last."""
    for name in [*sorted(artifact.manifest.files), MANIFEST_NAME]:
        location.share(artifact.path / name, f"{prefix}{name}")


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
