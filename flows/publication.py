"""The publication: a recipe's members registered as one release, promoted where its gates hold."""

from collections.abc import Mapping
from dataclasses import dataclass

from flows.execution import Execution
from flows.publish_check import judged_gates, published
from registry.family import find, load, publish, release_id
from registry.gates import Evidence, Gate, GateDecision, decide, terms_of
from registry.home import Home
from registry.index import Entry, Index
from registry.members import Family, Release
from steps.artifacts import Report


@dataclass(frozen=True)
class Publication:
    """What became of a recipe's `publish:`."""

    sentence: str
    release: Release | None = None
    """None where the recipe publishes nothing, or the release is not there yet."""
    nothing: bool = False
    """Whether the recipe publishes nothing."""

    def __bool__(self) -> bool:
        """Whether there is nothing left to publish."""
        return self.nothing or self.release is not None


def is_current(execution: Execution) -> Publication:
    """Say whether these very members are published already, without opening MLflow in embedded mode."""
    wanted = execution.plan.graph.loaded.recipe.publish
    if wanted is None:
        return Publication("The recipe publishes nothing.", nothing=True)
    entries = {name: step.entry for name, step in execution.plan.steps.items() if step.entry}
    if len(entries) < len(execution.plan.steps) or not _is_known(execution.home, wanted.family):
        return Publication("")
    release = release_id([digest for _, digest, _ in _members(execution, entries)])
    family = find(execution.home, wanted.family)
    if family is None:
        return Publication("")
    found = next((each for each in family.releases if each.id == release), None)
    if found is None or not _still_holds(execution, entries, found):
        return Publication("")
    return Publication(_sentence(family, found), found)


def _still_holds(execution: Execution, entries: Mapping[str, Entry], release: Release) -> bool:
    """Whether a release was judged by the gates and the reports of today, and against the champion that it meets today.

    What is told to be unchanged may have been measured anew: on more rows, or by a better report.
    """
    graph, decision = execution.plan.graph, release.decision
    reports = {step: digest for step, (digest, _) in _reports(execution, entries).items()}
    if decision is None or decision.terms != terms_of(*_gates(execution), reports):
        return False
    met = graph.opponent.version if graph.opponent else None
    return not decision.needs_champion or decision.against == met


def publish_release(execution: Execution) -> Publication:
    """Judge the gates and register the release; idempotent, and completed by the next run where it was killed."""
    wanted = execution.plan.graph.loaded.recipe.publish
    if wanted is None:
        return Publication("")
    entries = {name: state.entry for name, state in execution.states.items() if state.entry}
    members = _members(execution, entries)
    decision, reports = judge(execution, entries)
    release = publish(execution.record, wanted.family, members, decision, reports)
    return Publication(_sentence(load(execution.home, wanted.family), release), release)


def judge(
    execution: Execution, entries: Mapping[str, Entry]
) -> tuple[GateDecision, dict[str, tuple[str, Entry]]]:  # fmt: skip
    """Judge the recipe's gates; return the decision and the reports it rests on."""
    graph, store = execution.plan.graph, execution.home.store
    reports = _reports(execution, entries)
    evidence = {step: Evidence.of(Report.of(store.open(digest))) for step, (digest, _) in reports.items()}
    gates, names = _gates(execution)
    opponent = graph.opponent
    if opponent is None:
        return decide(gates, names, evidence), reports
    decision = decide(gates, names, evidence, evidence, opponent.names, opponent.shared)
    return decision.model_copy(update={"against": opponent.version}), reports


def _reports(execution: Execution, entries: Mapping[str, Entry]) -> dict[str, tuple[str, Entry]]:
    """Return the digest and the entry of every report that a gate reads, by its step as the gate has it."""
    graph = execution.plan.graph
    steps = sorted({gate.step for gate in _gates(execution)[0]})
    found = {step: entries[graph.members(step)[0].name] for step in steps}
    return {step: (entry.outputs[""], entry) for step, entry in found.items()}


def _gates(execution: Execution) -> tuple[list[Gate], list[str]]:
    """Return the gates, each on one member, and the members' names."""
    graph = execution.plan.graph
    return [gate for _, gate in judged_gates(graph)], [node.name for node in published(graph)]


def _members(execution: Execution, entries: Mapping[str, Entry]) -> list[tuple[str, str, Entry]]:
    names = [node.name for node in published(execution.plan.graph)]
    return [(name, entries[name].outputs[""], entries[name]) for name in names]


def _is_known(home: Home, family: str) -> bool:
    return not home.embedded or family in Index(home.index).families()


def _sentence(family: Family, release: Release) -> str:
    aliases, said = ", ".join(release.aliases) or "no alias", family.told(release)
    return f"Family {release.family}, version {release.version} ({aliases}), {len(release.members)} members. {said}"
