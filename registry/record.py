"""Executions and their steps, written into MLflow so that a step is either recorded whole or not at all."""

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from registry.errors import Lost, RegistryError, refusal
from registry.home import Home
from registry.importing import importing
from registry.index import Entry, Index
from registry.kept import Kept
from registry.location import LocalLocation, Location
from registry.processes import is_alive, own_tags, process_name
from registry.run_data import json_tag, mlflow_name
from registry.step_run import ENTRY_NAME, StepRecord, StepRun, output_folder, share_files
from registry.tracking import Tracking
from registry.versions import family_names, read_family
from steps.artifacts import Artifact

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["Execution", "Recorder", "StepRecord"]

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Recorder:
    """Writes executions and steps, and finds them again. May be shared by threads; MLflow opens at first use."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.index = Index(home.index)
        self.tracking = Tracking(home)

    def warm_up(self) -> None:
        """Open MLflow now (1.5 s to 9 s), e.g. in a thread while the first step runs."""
        self.tracking.client.search_experiments(max_results=1)

    def begin(
        self, recipe: str, resolved: str, environment: Mapping[str, str], tags: Mapping[str, str] | None = None
    ) -> "Execution":
        """Begin an execution: one parent run in the experiment named after the recipe.

        Args:
            recipe: name of the recipe.
            resolved: the resolved recipe as YAML, kept as `recipe.yaml`.
            environment: versions of packages, kept as `environment.txt`.
            tags: further tags of the run.

        Raises:
            RegistryError: the tracking server does not answer.
        """
        if self.home.embedded and not self.index.exists:
            self.rebuild_index()
        experiment = self.tracking.experiment(recipe)
        for dead in list(self.tracking.runs("tags.`posttrain.role` = 'execution' AND attributes.status = 'RUNNING'")):
            if not is_alive(dead):
                self.tracking.client.set_terminated(dead.info.run_id, "KILLED")
        own = {"posttrain.role": "execution", "posttrain.recipe": recipe, **own_tags()}
        run = self.tracking.client.create_run(experiment, tags={**own, **(tags or {})}, run_name=recipe)
        execution = Execution(self, run, recipe)
        execution.location.write(resolved.encode(), "recipe.yaml")
        lines = [f"{name}=={version}\n" for name, version in sorted(environment.items())]
        execution.location.write("".join(lines).encode(), "environment.txt")
        return execution

    def find(self, key: str) -> Entry | None:
        """Return the finished step with this key: from the local index, else from MLflow, which refreshes the index.

        Embedded MLflow is asked only if it may know more: the index was lost, or a record of this key was killed.

        Raises:
            RegistryError: the tracking server does not answer.
        """
        if entry := self.index.get(key):
            return entry
        if not self.tracking.may_exist:
            return None
        if self.home.embedded and not self.index.exists:
            self.rebuild_index()
            return self.index.get(key)
        if self.home.embedded and not self.index.is_pending(key):
            return None
        run = self.tracking.finished(key)
        entry = self._entry(run, key) if run else None
        if entry:
            self.index.put(entry)
        return entry

    def others(self, entry: Entry) -> Iterator[Entry]:
        """Yield what other finished runs of a step hold, the last to start first; the index is told of none."""
        condition = f"tags.`posttrain.key` = '{entry.key}' AND attributes.status = 'FINISHED'"
        for run in self.tracking.runs(condition):
            if run.info.run_id != entry.run_id and (found := self._entry(run, entry.key)):
                yield found

    def rebuild_index(self) -> int:
        """Write the index anew from all that MLflow knows, steps and families; return the number of steps."""
        found: dict[str, Entry] = {}
        condition = "tags.`posttrain.role` = 'step' AND attributes.status = 'FINISHED'"
        for run in self.tracking.runs(condition) if self.tracking.may_exist else ():
            key = run.data.tags.get("posttrain.key", "")
            if key not in found and (entry := self._entry(run, key)):
                found[key] = entry
        for name in family_names(self.tracking):
            if family := read_family(self.tracking, name):
                self.index.put_family(name, family.model_dump_json(indent=1).encode())
        for entry in found.values():
            self.index.put(entry)
        self.index.create()
        return len(found)

    def location(self, entry: Entry, digest: str) -> Location:
        """Return where MLflow keeps the files of one of a step's outputs.

        Raises:
            RegistryError: MLflow no longer holds it.
        """
        output = next((name for name, each in entry.outputs.items() if each == digest), None)
        if output is None:
            raise RegistryError(f"step `{entry.step}` ({entry.key[:12]}) did not make artifact {digest[:12]}")
        if output in entry.models:
            return self.tracking.of_model(entry.models[output], digest)
        return self.tracking.of_run(self._run(entry)).below(output_folder(output))

    def kept(self, digest: str, entry: Entry) -> Kept:
        """Return one of a step's outputs as MLflow keeps it."""
        models = (entry.models.get(name) for name, each in entry.outputs.items() if each == digest)
        place = next(models, None) or entry.run_id
        return Kept(self.home, digest, place, lambda: self.location(entry, digest))

    def kept_model(self, model_id: str, digest: str) -> Kept:
        """Return the artifact that a version of a family names as MLflow keeps it."""
        return Kept(self.home, digest, model_id, lambda: self.tracking.of_model(model_id, digest))

    def fetch(self, digest: str, entry: Entry) -> Artifact[Any]:
        """Return one of a step's outputs, see `Kept.fetch`."""
        return self.kept(digest, entry).fetch()

    def lost(self, digest: str, entry: Entry) -> str:
        """Return what MLflow no longer holds of one of a step's outputs, see `Kept.lost`."""
        return self.kept(digest, entry).lost()

    def write(self, execution: "Execution", step: StepRecord) -> Entry:
        """Record one finished step, see `Execution.record`."""
        with self.index.lock(step.key):
            known = self.find(step.key)
            if known and known.outputs == step.outputs and self._relink(known):
                self.index.end(step.key)
                return known
            if self.index.is_pending(step.key) or not self.home.embedded:
                self._bury(step.key)
            self.index.begin(step.key)
            run = self.tracking.client.create_run(
                execution.experiment,
                start_time=int(step.began.timestamp() * 1000),
                tags={**_step_tags(step, execution), **own_tags()},
                run_name=step.name,
            )
            try:
                entry = StepRun(self.tracking, self.index, self.home.store, run, execution.recipe, step).write()
                ended = int(step.ended.timestamp() * 1000)
                self.tracking.client.set_terminated(run.info.run_id, "FINISHED", ended)
            except BaseException:
                with suppress(Exception):
                    self._drop(run)
                raise
            self.index.put(entry)
            self.index.end(step.key)
            return entry

    def _entry(self, run: "Run", key: str) -> Entry | None:
        """Read the entry that a finished run holds; None where its files are gone or not of this key.

        Where there is no answer the step may be made: that is no reason to make it again.
        """
        try:
            entry = Entry.model_validate_json(self.tracking.of_run(run).read(ENTRY_NAME))
        except (Lost, ValueError):
            return None
        return entry if entry.key == key and entry.run_id == run.info.run_id else None

    def _run(self, entry: Entry) -> "Run":
        with importing():
            from mlflow.exceptions import MlflowException

        try:
            return self.tracking.client.get_run(entry.run_id)
        except MlflowException as error:
            raise refusal(error)(f"MLflow no longer holds the run of step `{entry.step}` ({entry.run_id})") from error

    def _relink(self, entry: Entry) -> bool:
        """Make sure that MLflow still holds a recorded step, and the very files that the store holds.

        A file that was damaged and re-made is a new one in the store; MLflow's link still shows the damaged bytes.
        """
        store = self.home.store
        try:
            if self._run(entry).info.lifecycle_stage != "active":
                return False
            places = {name: self.location(entry, digest) for name, digest in entry.outputs.items()}
        except RegistryError:
            return False
        for name, digest in entry.outputs.items():
            if isinstance(place := places[name], LocalLocation):
                share_files(store.open(digest), place, "")
            elif (kept := self.kept(digest, entry)).lost():
                kept.give()
        return True

    def _bury(self, key: str) -> None:
        """Drop the runs of this key that a killed process left half-written."""
        for run in list(self.tracking.runs(f"tags.`posttrain.key` = '{key}' AND attributes.status = 'RUNNING'")):
            # This process holds the key's lock, so a run of its own can only be one that failed.
            if not is_alive(run) or run.data.tags.get("posttrain.process") == process_name():
                self._drop(run)

    def _drop(self, run: "Run") -> None:
        """Remove a half-written run with its models and the links they hold.

        The run ends last, so that a drop which is killed itself is found and done again.
        """
        client, run_id = self.tracking.client, run.info.run_id
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
        places = {model.model_id: model.tags.get("posttrain.digest", "") for model in models}
        for place in [self.tracking.of_run(run), *(self.tracking.of_model(*each) for each in places.items())]:
            if isinstance(place, LocalLocation):
                shutil.rmtree(place.root, ignore_errors=True)
        for model_id in places:
            client.delete_logged_model(model_id)
        client.set_terminated(run_id, "KILLED")
        client.delete_run(run_id)


class Execution:
    """One run of a recipe. Methods may be called from several threads."""

    def __init__(self, recorder: Recorder, run: "Run", recipe: str) -> None:
        self.recorder = recorder
        self.recipe = recipe
        self.run_id: str = run.info.run_id
        self.experiment: str = run.info.experiment_id
        self.location = recorder.tracking.of_run(run)
        self._client = recorder.tracking.client
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()

    def record(self, step: StepRecord) -> Entry:
        """Record a finished step as a child run and return its index entry.

        The run is FINISHED, and the entry written, only when all of it is there. A call that was killed is made good
        by the next one for the same key; a step that is already recorded is linked again to the store's files.

        Raises:
            RegistryError: MLflow does not answer.
            OSError: a file cannot be linked or read, the disk is full.
        """
        entry = self.recorder.write(self, step)
        self._note(step.name, f"{step.seconds:.1f} s", entry)
        return entry

    def note_cached(self, name: str, entry: Entry) -> None:
        """Say which earlier run a cached step stands for."""
        self._client.set_tag(self.run_id, f"posttrain.cached.{mlflow_name(name)}", entry.run_id)
        self._note(name, "cached", entry)

    def log_file(self, content: bytes, name: str) -> None:
        """Write a small file (a report, a decision) into the execution."""
        self.location.write(content, name)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows as a table that MLflow's page shows, under `tables/`."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = {column: [row.get(column) for row in rows] for column in columns}
        self._client.log_table(self.run_id, data, f"tables/{name}.json")

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log headline metrics of the whole execution."""
        with importing():
            from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(mlflow_name(name), float(value), now, 0) for name, value in metrics.items()]
        for start in range(0, len(values), 1000):
            self._client.log_batch(self.run_id, metrics=values[start : start + 1000])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the execution."""
        for name, value in tags.items():
            self._client.set_tag(self.run_id, mlflow_name(name), value)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the execution; its description lists every step and the run that holds it."""
        with self._lock:
            table = "| step | | run |\n| --- | --- | --- |\n" + "".join(self._lines.values())
        self._client.set_tag(self.run_id, "mlflow.note.content", table[:8000])
        self._client.set_terminated(self.run_id, status)

    def _note(self, name: str, what: str, entry: Entry) -> None:
        with self._lock:
            self._lines[name] = f"| {name} | {what} | `{entry.run_id}` |\n"


def _step_tags(step: StepRecord, execution: Execution) -> dict[str, str]:
    return {
        "mlflow.parentRunId": execution.run_id,
        "posttrain.role": "step",
        "posttrain.recipe": execution.recipe,
        "posttrain.key": step.key,
        "posttrain.step": step.name,
        "posttrain.kind": step.kind,
        "posttrain.inputs": json_tag(dict(step.inputs)),
        "posttrain.outputs": json_tag(dict(step.outputs)),
        "posttrain.libraries": json_tag(dict(step.libraries)),
    }
