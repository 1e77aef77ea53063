"""The publication: a recipe's members registered as one release, promoted where its gates hold."""

from dataclasses import dataclass

from flows.execution import Execution
from flows.publish_check import judged_gates, published
from registry.family import load, publish, release_id
from registry.gates import Evidence, Gate, GateDecision, decide, terms_of
from registry.home import Home
from registry.index import Entry, Index
from registry.members import Release
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
    members = [step.entry for step in execution.plan.steps.values() if step.entry]
    if len(members) < len(execution.plan.steps) or not _is_known(execution.home, wanted.family):
        return Publication("")
    release = release_id([digest for _, digest, _ in _members(execution, {e.step: e for e in members})])
    family = load(execution.home, wanted.family)
    found = next((each for each in family.releases if each.id == release), None)
    return Publication(_sentence(found), found) if found and _still_holds(execution, found) else Publication("")


def _still_holds(execution: Execution, release: Release) -> bool:
    """Whether a release was judged by the gates of today, and against the champion that it meets today."""
    graph, decision = execution.plan.graph, release.decision
    if decision is None or decision.terms != terms_of(*_terms(execution)):
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
    return Publication(_sentence(release), release)


def judge(
    execution: Execution, entries: dict[str, Entry]
) -> tuple[GateDecision, dict[str, tuple[str, Entry]]]:  # fmt: skip
    """Judge the recipe's gates; return the decision and the reports it rests on."""
    graph = execution.plan.graph
    wanted = graph.loaded.recipe.publish
    assert wanted is not None
    store = execution.home.store
    found = {step: entries[graph.members(step)[0].name] for step in sorted({gate.step for gate in wanted.gates})}
    reports = {step: (entry.outputs[""], entry) for step, entry in found.items()}
    evidence = {step: Evidence.of(Report.of(store.open(digest))) for step, (digest, _) in reports.items()}
    gates, names = _terms(execution)
    opponent = graph.opponent
    if opponent is None:
        return decide(gates, names, evidence), reports
    decision = decide(gates, names, evidence, evidence, opponent.names, opponent.shared)
    return decision.model_copy(update={"against": opponent.version}), reports


def _terms(execution: Execution) -> tuple[list[Gate], list[str]]:
    """Return the gates, each on one member, and the members' names."""
    graph = execution.plan.graph
    return [gate for _, gate in judged_gates(graph)], [node.name for node in published(graph)]


def _members(execution: Execution, entries: dict[str, Entry]) -> list[tuple[str, str, Entry]]:
    names = [node.name for node in published(execution.plan.graph)]
    return [(name, entries[name].outputs[""], entries[name]) for name in names]


def _is_known(home: Home, family: str) -> bool:
    return not home.embedded or family in Index(home.index).families()


def _sentence(release: Release) -> str:
    aliases = ", ".join(release.aliases) or "no alias"
    said = f" {release.decision.sentence}" if release.decision else ""
    return f"Family {release.family}, version {release.version} ({aliases}), {len(release.members)} members.{said}"
