"""The plan: every step's key, and whether it must run, before anything does. Imports neither torch nor MLflow."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from flows.blocking import REGISTRY, blocked, is_to_run
from flows.graph import Graph, Node
from flows.publish_check import published
from flows.runtimes import Say, imported, needed, prove_unproven
from registry.errors import RegistryError
from registry.family import member_at
from registry.home import Home
from registry.index import Entry, Index
from registry.record import Recorder
from steps.artifacts import Report
from steps.artifacts.manifest import canonical_json
from steps.frame import UserError
from steps.frame.code import StepCode
from steps.frame.config import sources_of
from steps.frame.keys import plain_config, step_key
from steps.frame.kinds import modules_of
from steps.frame.spec import RESULT_NAME, SPEC_NAME, StepResult
from steps.sources import fingerprint

Status = Literal["cached", "record", "resume", "run", "blocked"]


@dataclass(frozen=True)
class Prediction:
    """What a step cost the last time that it ran with these settings, after steps with theirs."""

    seconds: float
    peak_memory: int
    """Bytes."""
    size: int
    """Bytes of its outputs."""


@dataclass(frozen=True)
class PlannedStep:
    """One step and what is to be done about it.

    `cached`: finished before, its files are sound. `record`: finished, but a crash came before MLflow knew. `resume`:
    begun before, goes on from its last checkpoint. `blocked`: it cannot run, `reason` says why.
    """

    node: Node
    key: str
    status: Status
    reason: str = ""
    entry: Entry | None = None
    result: StepResult | None = None
    """What the interrupted attempt left, for `record`."""
    damaged: bool = False
    """Whether files of a cached step are unsound here and have to be fetched from the server."""
    predicted: Prediction | None = None
    likeness: str = ""
    """Digest of its settings and those of all steps before it."""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def outputs(self) -> Mapping[str, str] | None:
        """Artifact digest by output name, where the step has finished."""
        return self.entry.outputs if self.entry else self.result.outputs if self.result else None


@dataclass(frozen=True)
class Plan:
    """A graph with keys and statuses."""

    graph: Graph
    steps: Mapping[str, PlannedStep]
    registry: Mapping[str, str] = field(default_factory=dict)
    """Artifact digest of each `registry://` source."""
    prints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By step, the fingerprint of each other source that it reads."""
    code: Mapping[str, StepCode] = field(default_factory=dict)
    """By step kind, the code that its keys speak of."""

    @property
    def todo(self) -> list[PlannedStep]:
        """Steps that are not cached."""
        return [step for step in self.steps.values() if step.status != "cached"]

    @property
    def blocked(self) -> list[PlannedStep]:
        """Steps that cannot run."""
        return [step for step in self.steps.values() if step.status == "blocked"]

    @property
    def preload(self) -> list[str]:
        """Modules that the steps to run want imported in the fork server, in the order of first need."""
        return modules_of(step.node.kind for step in self.todo)


def make_plan(graph: Graph, home: Home, root: Path, *, thorough: bool, say: Say = lambda _: None) -> Plan:
    """Compute every step's key and look up what is done.

    Args:
        graph: the checked graph.
        home: where finished steps are found.
        root: directory to which relative paths in sources refer.
        thorough: check every byte of finished artifacts, and prove native runtimes that this machine has never called,
            as a run must; else artifacts by names and sizes only, and runtimes by their last verdicts.
        say: told what takes seconds.

    Raises:
        UserError: a source that the key depends on cannot be read.
    """
    keys, registry, prints, code = graph_keys(graph, home, root)
    index = Index(home.index)
    known = _Known(index, home, thorough)
    alike = likenesses(graph)
    steps = {name: known.planned(node, keys[name], alike[name]) for name, node in graph.nodes.items()}
    steps = known.with_made_again(graph, steps)
    if thorough:
        todo = [step.node for step in steps.values() if is_to_run(step)]
        prove_unproven((name for node in todo for name in (*imported(node), *needed(graph, node))), say)
    reachable = {name: blocked(graph, step, known.recorder, root) for name, step in steps.items()}
    return Plan(graph, reachable, registry, prints, code)


class Keys(NamedTuple):
    """What is known of a graph before anything runs."""

    keys: dict[str, str]
    """By node."""
    registry: dict[str, str]
    """Artifact digest of each `registry://` source."""
    prints: dict[str, dict[str, str]]
    """By node, the fingerprint of each other source."""
    code: dict[str, StepCode]
    """By step kind, its code as the keys speak of it."""


def graph_keys(graph: Graph, home: Home, root: Path) -> Keys:
    """Compute the key of every node, from what its sources hold now.

    Raises:
        UserError: a source cannot be read.
    """
    keys: dict[str, str] = {}
    registry: dict[str, str] = {}
    read: dict[str, dict[str, str]] = {}
    kinds = {node.kind.name: node.kind for node in graph.nodes.values()}
    code = {name: StepCode.of(kind.run.__module__) for name, kind in kinds.items()}
    for node in graph.nodes.values():
        prints = {}
        for name, uris in sources_of(node.config).items():
            for uri in uris:
                prints[uri] = _fingerprint(graph, node, name, uri, home, root, registry)
        parents = {name: [f"{keys[ref.step]}:{ref.output}" for ref in refs] for name, refs in node.edges.items()}
        known = code[node.kind.name].digest
        keys[node.name] = step_key(node.kind, node.config, parents, prints, node.resources.world, known)
        read[node.name] = {uri: found for uri, found in prints.items() if not uri.startswith(REGISTRY)}
    return Keys(keys, registry, read, code)


def likenesses(graph: Graph) -> dict[str, str]:
    """Return a digest for every node, of its settings, its resources and its parents' digests: no data, no code."""
    found: dict[str, str] = {}
    for node in graph.nodes.values():
        content = {
            "kind": node.kind.name,
            "config": plain_config(node.kind, node.config),
            "resources": node.resources.model_dump(mode="json"),
            "parents": {name: [f"{found[ref.step]}:{ref.output}" for ref in refs] for name, refs in node.edges.items()},
        }
        found[node.name] = hashlib.sha256(canonical_json(content)).hexdigest()[:32]
    return found


class _Known:
    """What the index, the store and the work directories say of a key."""

    def __init__(self, index: Index, home: Home, thorough: bool) -> None:
        # Opens embedded MLflow only where the index was lost; asks a server always, which knows what others made.
        self.recorder = Recorder(home)
        self.home = home
        self.thorough = thorough
        self.entries = index.entries()
        self._faults: dict[str, str | None] = {}

    def planned(self, node: Node, key: str, likeness: str) -> PlannedStep:
        step = PlannedStep(node, key, "run", predicted=self.prediction(likeness), likeness=likeness)
        entry = self.recorder.find(key)
        if entry is not None:
            return self.made(step, entry)
        work = self.home.work(key)
        if (result := _left_result(work)) and self.fault(result.outputs) is None:
            return replace(step, status="record", result=result, reason="finished, not yet recorded")
        if (work / SPEC_NAME).exists() and any((work / "scratch").glob("*")):
            return replace(step, status="resume", reason="interrupted before")
        return step

    def made(self, step: PlannedStep, entry: Entry) -> PlannedStep:
        """Return a step that was made before: sound here, or on the server, or to be made again."""
        if not self.home.has_server:
            fault = self.fault(entry.outputs)
            return replace(step, reason=f"made before, but {fault}") if fault else _cached(step, entry)
        # What is not here the server has; it is fetched when a step or the report asks for it.
        here = {name: digest for name, digest in entry.outputs.items() if self.home.store.has(digest)}
        if fault := self.fault(here):
            return replace(_cached(step, entry), damaged=True, reason=f"{fault}; the server has it")
        return replace(_cached(step, entry), reason="" if len(here) == len(entry.outputs) else "made elsewhere")

    def with_made_again(self, graph: Graph, steps: Mapping[str, PlannedStep]) -> dict[str, PlannedStep]:
        """Return the steps; those whose outputs are needed, and are neither here nor on the server, are to run.

        Needed are the inputs of what is to run, each report, and what is published: that must be on the server in the
        end, so it is asked about, and given again, also where it is here. Of all else only what is not here is.
        """
        found = dict(steps)
        if not self.home.has_server:
            return found
        needed = {name: {*(step.outputs or {})} for name, step in steps.items() if _is_read(step)}
        members = {node.name for node in published(graph)}
        for name, node in reversed(list(graph.nodes.items())):
            is_member = name in members
            found[name] = self._had(found[name], {*needed.get(name, ()), *([""] if is_member else [])}, is_member)
            if is_to_run(found[name]):
                for ref in itertools.chain.from_iterable(node.edges.values()):
                    needed.setdefault(ref.step, set()).add(ref.output)
        return found

    def _had(self, step: PlannedStep, outputs: Set[str], is_member: bool) -> PlannedStep:
        """Return a cached step of which outputs must be had: as it is, by another run of it, or to be made again."""
        entry = step.entry
        if step.status != "cached" or entry is None or not (why := self._lost(entry, outputs, is_member)):
            return step
        for other in self.recorder.others(entry):
            if outputs <= other.outputs.keys() and not self._lost(other, outputs, is_member):
                self.recorder.index.put(other)
                return self.made(replace(step, damaged=False, reason=""), other)
        again = replace(step, status="run", entry=None, damaged=False, reason=f"made before, but {why}")
        if self.fault(entry.outputs):
            return again
        result = StepResult(
            status="finished",
            outputs=entry.outputs,
            notes=entry.notes,
            seconds=entry.seconds,
            peak_memory=entry.peak_memory,
        )
        return replace(again, status="record", result=result, reason=f"{why}; it is here, and given again")

    def _lost(self, entry: Entry, outputs: Iterable[str], is_member: bool) -> str:
        """Return why outputs of a finished step cannot be had, or nothing; what is published is to be on the server."""
        digests = {name: entry.outputs[name] for name in outputs}
        asked = [each for name, each in digests.items() if (is_member and name == "") or self.fault({"": each})]
        return next(filter(None, (self.recorder.lost(digest, entry) for digest in asked)), "")

    def fault(self, outputs: Mapping[str, str]) -> str | None:
        """Return what is wrong with the first unsound output, or None."""
        for digest in outputs.values():
            if digest not in self._faults:
                store = self.home.store
                self._faults[digest] = store.fault(digest) if self.thorough else store.quick_fault(digest)
            if fault := self._faults[digest]:
                return f"{fault} in artifact {digest[:12]}"
        return None

    def prediction(self, likeness: str) -> Prediction | None:
        last = next((entry for entry in self.entries if entry.likeness == likeness), None)
        return Prediction(last.seconds, last.peak_memory, last.size) if last else None


def _is_read(step: PlannedStep) -> bool:
    """Whether a cached step's outputs are opened, whatever is to run: a damaged one's, and a report."""
    return step.damaged or step.node.outputs.get("") is Report


def _cached(step: PlannedStep, entry: Entry) -> PlannedStep:
    """Return a step as finished before."""
    return replace(step, status="cached", entry=entry)


def _left_result(work: Path) -> StepResult | None:
    try:
        result = StepResult.model_validate_json((work / RESULT_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return result if result.status == "finished" else None


def _fingerprint(
    graph: Graph, node: Node, name: str, uri: str, home: Home, root: Path, registry: dict[str, str]
) -> str:
    try:
        if not uri.startswith(REGISTRY):
            return fingerprint(uri, root)
        if uri not in registry:
            registry[uri] = member_at(home, uri).digest
        return registry[uri]
    except (UserError, RegistryError) as error:
        raise graph.loaded.error((*node.place, name) if node.name != "base" else ("base",), str(error)) from None
