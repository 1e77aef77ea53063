"""One execution of a plan: runs steps in processes of their own and records them. Knows nothing of Prefect."""

import importlib.metadata
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from flows.blocking import environment_python
from flows.gpu_claims import claim, release
from flows.plan import Plan, PlannedStep
from registry.errors import Lost, RegistryError
from registry.family import member_with
from registry.home import Home
from registry.index import Entry
from registry.record import Recorder, StepRecord
from steps.artifacts import Report
from steps.frame import Resources
from steps.frame.keys import plain_config
from steps.frame.launch import Launcher
from steps.frame.spec import LOG_NAME, METRICS_NAME, PLOTS_NAME, InputSpec, StepResult, StepSpec
from steps.runtime.gpus import gpus

if TYPE_CHECKING:
    from flows.ending import Ending

Outcome = Literal["finished", "cached", "refused", "failed", "skipped"]
OnProgress = Callable[[str, Mapping[str, Any]], None]

_LOOK_SECONDS = 0.5
_SHAPING = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "gptqmodel",
    "llama-cpp-python",
    "mlflow",
    "prefect",
)


@dataclass
class StepState:
    """What became of one step in this execution."""

    planned: PlannedStep
    outcome: Outcome = "skipped"
    entry: Entry | None = None
    message: str = ""
    began: datetime | None = None
    ended: datetime | None = None

    @property
    def seconds(self) -> float:
        """Wall time in this execution, 0 for a step that did not run."""
        return (self.ended - self.began).total_seconds() if self.began and self.ended else 0.0


class Execution:
    """Runs the steps of one plan. Thread-safe: several steps may run at once within the machine's limits."""

    def __init__(self, plan: Plan, home: Home, cpus: int, on_progress: OnProgress | None = None) -> None:
        self.plan = plan
        self.home = home
        self.on_progress = on_progress
        self.began = datetime.now(UTC)
        self.states = {name: StepState(step) for name, step in plan.steps.items()}
        self.launcher = Launcher(plan.preload, home.root / "logs" / "forkserver.log")
        self.recorder = Recorder(home)
        self._slots = Slots(cpus, gpus())
        self.ending: Ending | None = None
        self._record = None
        self._early: dict[str, Future[StepState]] = {}
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Start what takes seconds in the background: the fork server's imports, and MLflow."""
        if any(step.status in ("run", "resume") for step in self.plan.steps.values()):
            self.launcher.warm_up()
        threading.Thread(target=self.recorder.warm_up, daemon=True, name="mlflow-warm-up").start()

    @property
    def record(self) -> Any:
        """The parent run in MLflow, begun with the first step that is recorded."""
        with self._lock:
            if self._record is None:
                loaded = self.plan.graph.loaded
                self._record = self.recorder.begin(loaded.name, loaded.yaml, versions(), {})
            return self._record

    def run_early(self) -> None:
        """Start the steps that wait for nothing, in the background; `run` then joins them.

        Prefect's server takes seconds to answer, longer on a busy machine: the first step need not wait for it.
        """
        for name, step in self.plan.steps.items():
            if not step.node.parents:
                self._early[name] = Future()
                threading.Thread(target=self._run_early, args=(name,), daemon=True, name=f"early-{name}").start()

    def _run_early(self, name: str) -> None:
        try:
            self._early[name].set_result(self._run(name))
        except BaseException as error:
            self._early[name].set_exception(error)

    def run(self, name: str) -> StepState:
        """Bring one step to its end: take it from the cache, record what a crash left, or run it."""
        early = self._early.pop(name, None)
        return early.result() if early else self._run(name)

    def _run(self, name: str) -> StepState:
        state = self.states[name]
        state.began = datetime.now(UTC)
        step = state.planned
        try:
            if step.status == "cached" and step.entry and not step.damaged:
                self._take(state, step.entry)
            else:
                # Two runs of one home wait for each other here, and the second finds what the first made.
                with self.recorder.index.lock(f"step-{step.key}"):
                    self._make(state)
        except (RegistryError, OSError) as error:
            state.outcome, state.message = "failed", str(error)
        finally:
            state.ended = datetime.now(UTC)
        return state

    def digests(self, name: str) -> Mapping[str, str]:
        """Artifact digest by output name of a finished step."""
        entry = self.states[name].entry
        assert entry is not None, f"{name} has not finished"
        return entry.outputs

    def close(self, *, ok: bool) -> None:
        """End the parent run and the fork server."""
        self.launcher.close()
        if self._record is not None:
            for state in self.states.values():
                if state.outcome == "cached" and state.entry:
                    self._record.note_cached(state.planned.name, state.entry)
            self._record.finish("FINISHED" if ok else "FAILED")

    def _take(self, state: StepState, entry: Entry) -> None:
        """Take a finished step; a report that another machine made is fetched, because the gates read it."""
        for digest in entry.outputs.values():
            if state.planned.node.outputs.get("") is Report and not self.home.store.has(digest):
                self.recorder.fetch(digest, entry)
        state.entry, state.outcome = entry, "cached"

    def _make(self, state: StepState) -> None:
        """Run a step, or only record it, unless another run of this home has done so since the plan."""
        step = state.planned
        made = self.recorder.index.get(step.key)
        left = step.result if step.status == "record" else None
        # What is only to be recorded is so again where it was before: MLflow may have lost it.
        if made and not (left and left.outputs == made.outputs) and self._is_sound(made):
            return self._take(state, made)
        result = left or self._launch(state)
        state.message = result.message
        if result.status == "finished":
            assert state.began is not None
            state.entry = self._remember(step, result, state.began)
        state.outcome = result.status
        return None

    def _is_sound(self, entry: Entry) -> bool:
        """Whether a finished step's files are as they were: here, or on the server, which gives anew what is damaged.

        What is not here at all is fetched when it is asked for.

        Raises:
            RegistryError: the server gives no answer: the step may well be sound.
        """
        store, has_server = self.home.store, self.home.has_server
        for digest in entry.outputs.values():
            if has_server and not store.has(digest):
                if self.recorder.lost(digest, entry):
                    return False
                continue
            if store.fault(digest) is None:
                continue
            if not has_server:
                return False
            try:
                self.recorder.fetch(digest, entry)
            except Lost:
                return False
        return True

    def _launch(self, state: StepState) -> StepResult:
        step = state.planned
        kind = step.node.kind
        python = str(environment_python(kind.environment)) if kind.environment else ""
        with self._slots.taken(step.node.resources) as devices:
            # Waiting for cores is not the step's own time.
            state.began = datetime.now(UTC)
            spec = self.spec(step, devices)
            return self.launcher.run(spec, lambda shown: self._show(step.name, shown), python)

    def _show(self, name: str, values: Mapping[str, Any]) -> None:
        # Looked up each time: a step that began early is shown once there is something to show it on.
        if self.on_progress:
            self.on_progress(name, values)

    def spec(self, step: PlannedStep, devices: tuple[str, ...] = ()) -> StepSpec:
        """Write down all that the step's process needs; `devices` are the GPUs that were granted to it."""
        node = step.node
        inputs = {
            name: tuple(self._input(self.digests(ref.step)[ref.output], ref.step) for ref in refs)
            for name, refs in node.edges.items()
        }
        resolved = {uri: self._input(digest, None, uri) for uri, digest in self.plan.registry.items()}
        return StepSpec(
            name=node.name,
            kind=node.kind.name,
            key=step.key,
            config=plain_config(node.kind, node.config),
            inputs=inputs,
            lists=tuple(name for name in node.edges if node.kind.edges[name].many),
            work=self.home.work(step.key),
            store=self.home.store.root,
            cache=self.home.cache,
            resolved=resolved,
            sources=self.plan.prints.get(node.name, {}),
            code=self.plan.code[node.kind.name].digest,
            code_files=self.plan.code[node.kind.name].files,
            resources=node.resources,
            devices=devices,
        )

    def _input(self, digest: str, producer: str | None, uri: str = "") -> InputSpec:
        """Return where an artifact lies here, fetched from the registry where another machine made it."""
        store = self.home.store
        if not store.has(digest):
            if producer is not None:
                entry = self.states[producer].entry
                assert entry is not None
                self.recorder.fetch(digest, entry)
            else:
                self.recorder.kept_model(member_with(self.home, uri, digest).model_id, digest).fetch()
        return InputSpec(path=store.path(digest), digest=digest)

    def _remember(self, step: PlannedStep, result: StepResult, began: datetime) -> Entry:
        """Record a finished step in MLflow, then drop its scratch space."""
        node, work = step.node, self.home.work(step.key)
        inputs = {
            name if not node.kind.edges[name].many else f"{name}.{index}": self.digests(ref.step)[ref.output]
            for name, refs in node.edges.items()
            for index, ref in enumerate(refs)
        }
        entry = self.record.record(
            StepRecord(
                name=node.name,
                kind=node.kind.name,
                key=step.key,
                config=plain_config(node.kind, node.config),
                likeness=step.likeness,
                libraries=node.kind.library_versions(node.config),
                inputs=inputs,
                outputs=dict(result.outputs),
                notes=result.notes,
                metrics_file=work / METRICS_NAME,
                plots_dir=work / PLOTS_NAME,
                log_file=work / LOG_NAME,
                seconds=result.seconds,
                peak_memory=result.peak_memory,
                began=began,
                ended=datetime.now(UTC),
            )
        )
        shutil.rmtree(work / "scratch", ignore_errors=True)
        return entry


class Slots:
    """Cores and GPUs of this machine, handed to steps so that they do not slow each other down."""

    def __init__(self, cpus: int, gpus: list[str]) -> None:
        self.total = cpus
        self.free = cpus
        self.gpus = list(gpus)
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: Resources) -> Iterator[tuple[str, ...]]:
        """Hold cores (0: all) and GPUs for the length of the context; yields the GPUs' names.

        A GPU is held against every other run of this machine.
        """
        cpus = min(wanted.cpus or self.total, self.total)
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self.free >= cpus)
                claimed = claim(self.gpus, wanted.gpus)
                if claimed is not None:
                    break
                # Other runs do not say when they give one back.
                self._changed.wait(_LOOK_SECONDS)
            self.free -= cpus
        try:
            yield tuple(claimed)
        finally:
            with self._changed:
                self.free += cpus
                release(claimed)
                self._changed.notify_all()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape results, without importing them."""
    found = {"python": platform.python_version()}
    for name in _SHAPING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clean(home: Home) -> None:
    """Remove what crashes left behind: artifacts that were being discarded. A step clears its own work as it runs."""
    for grave in (home.root / "artifacts").glob(".discarded-*"):
        shutil.rmtree(grave, ignore_errors=True)
