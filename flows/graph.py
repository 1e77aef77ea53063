"""The graph: a recipe's steps with their edges, checked for kinds and cycles before anything runs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from flows.kinds_check import check_kinds
from flows.publish_check import check_publish
from flows.recipe import LoadedRecipe, Rounds, StepEntry, validation_error
from flows.rounds import (
    Occurrence,
    called,
    check_carried,
    check_clear,
    check_names,
    check_round,
    known_names,
    latest,
    meant,
    occurrences,
    picked,
    same_round,
    titled,
)
from steps.artifacts import Artifact
from steps.frame import Follow, Ref, Resources, StepConfig, StepKind, UserError, load_kind
from steps.frame.config import EdgeSpec, name_fields_of

BASE = "base"


@dataclass(frozen=True)
class Node:
    """One step to run."""

    name: str
    """As in the recipe; with its round and its matrix values, `gguf[2,Q4_K_M]`, where it has those."""
    family: str
    """Name in the recipe without them."""
    kind: StepKind
    config: StepConfig
    edges: Mapping[str, tuple[Ref, ...]] = field(default_factory=dict)
    """References by input field, resolved to existing nodes."""
    resources: Resources = field(default_factory=Resources)
    place: tuple[str, ...] = ()
    """Keys that lead to it in the recipe."""
    group: str = ""
    """Group of rounds that it belongs to."""
    round: int = 0
    """Its round, from 1; 0 outside of any group."""
    member: str = ""
    """Its matrix values, `Q4_K_M`."""
    given: Mapping[str, type[Artifact[Any]]] = field(default_factory=dict)
    """Kind of what each input gets, once the graph is in order."""

    @property
    def outputs(self) -> dict[str, type[Artifact[Any]]]:
        """Kind of each output."""
        return self.kind.outputs_of(self.config, self.given)

    @property
    def parents(self) -> list[str]:
        """Names of the nodes it needs, each once."""
        return list(dict.fromkeys(ref.step for refs in self.edges.values() for ref in refs))


@dataclass(frozen=True)
class Opponent:
    """The champion that the published members are judged against."""

    version: int
    """Of its release in the family."""
    names: Mapping[str, str]
    """For each published member that a gate judges, the node of the champion's member that it meets."""
    shared: frozenset[str] = frozenset()
    """Published members that are the champion's own: there is nothing to measure."""


@dataclass(frozen=True)
class Graph:
    """All nodes of a recipe in an order in which they can run."""

    loaded: LoadedRecipe
    nodes: Mapping[str, Node]
    opponent: Opponent | None = None
    """The champion that gates compare with, once it is known."""

    def members(self, name: str) -> list[Node]:
        """Return the node of that name, or all of a matrix step's members; of a group's step, the last round's."""
        return latest(called(self.nodes.values(), name))

    def children(self, name: str) -> list[str]:
        """Names of the nodes that need this one."""
        return [node.name for node in self.nodes.values() if name in node.parents]


def build_graph(loaded: LoadedRecipe) -> Graph:
    """Type and connect every step of a recipe.

    Raises:
        UserError: unknown kind or key, missing or unknown reference, an artifact kind that does not fit, a cycle;
            one sentence with file, line, key and the nearest thing that would work.
    """
    check_names(loaded)
    drafts = _draft_nodes(loaded)
    check_carried(loaded, drafts, kinds=False)
    connected = {name: _connect(loaded, node, drafts) for name, node in drafts.items()}
    followed = {name: _named(_follow(loaded, node, connected)) for name, node in connected.items()}
    ordered = _ordered(loaded, followed)
    check_carried(loaded, ordered, kinds=True)
    for node in ordered.values():
        check_kinds(loaded, node, ordered)
    graph = Graph(loaded, ordered)
    check_publish(graph)
    return graph


def _draft_nodes(loaded: LoadedRecipe) -> dict[str, Node]:
    """Expand rounds and matrices and validate each step's own keys; edges are still as written."""
    base = loaded.recipe.base
    steps = list(occurrences(loaded.recipe))
    if base is not None:
        entry = StepEntry.model_validate({"uses": "model.source", "uri": base}) if isinstance(base, str) else base
        steps.insert(0, Occurrence(BASE, entry, (BASE,)))
    drafts: dict[str, Node] = {}
    given: dict[str, dict[str, Any]] = {}
    for step in steps:
        try:
            kind = load_kind(step.entry.uses)
        except UserError as error:
            raise loaded.error((*step.place, "uses"), str(error)) from None
        for member, values in step.entry.combinations:
            node = _blank(step, kind, member)
            drafts[node.name], given[node.name] = node, _given(loaded, step, kind, values)
    # What a list means is told by the names of all steps.
    return {name: _filled(loaded, node, given[name], drafts) for name, node in drafts.items()}


def _blank(step: Occurrence, kind: StepKind, member: str) -> Node:
    """Return a node that has its names, and no settings yet."""
    return Node(
        name=titled(step.family, step.round, member),
        family=step.family,
        kind=kind,
        config=kind.config.model_construct(),
        resources=step.entry.resources or kind.resources,
        place=step.place,
        group=step.group,
        round=step.round,
        member=member,
    )


def _given(loaded: LoadedRecipe, step: Occurrence, kind: StepKind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe gives to a member of a step."""
    given = _with_values(step.entry.config, values)
    if "seed" in kind.config.model_fields:
        # Each round draws anew, or it would only repeat the one before.
        given.setdefault("seed", loaded.recipe.seed + max(step.round - 1, 0))
    # A single reference where a list is asked for is a list of one; a matrix step fans in.
    for edge in kind.edges.values():
        if edge.many and isinstance(given.get(edge.field), str):
            given[edge.field] = [given[edge.field]]
        if given.get(edge.field) == [] and not edge.optional:
            raise loaded.error((*step.place, edge.field), "an empty list; name the steps that make what is wanted here")
    return given


def _filled(loaded: LoadedRecipe, node: Node, given: Mapping[str, Any], nodes: Mapping[str, Node]) -> Node:
    """Check a step's settings against what its lists mean; they then hold again what is written."""
    lists = {name: given[name] for name, edge in node.kind.edges.items() if edge.many and _are_names(given.get(name))}
    counted = {name: _meant_by(loaded, node, name, refs, nodes) for name, refs in lists.items()}
    try:
        config = node.kind.config.model_validate({**given, **counted})
    except ValidationError as error:
        raise validation_error(error, loaded.file, node.place, node.kind.config, given) from None
    try:
        config.check_resources(node.resources)
    except ValueError as error:
        raise loaded.error((*node.place, "resources"), str(error)) from None
    as_written = {name: [Ref.parse(text) for text in refs] for name, refs in lists.items()}
    return replace(node, config=config.model_copy(update=as_written))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _meant_by(
    loaded: LoadedRecipe, node: Node, name: str, texts: Sequence[str], nodes: Mapping[str, Node]
) -> list[Ref]:
    """Return what a list of names means; a name that means nothing stands as it is, to be refused in its place."""
    found: list[Ref] = []
    for ref in map(Ref.parse, texts):
        behind, output = _behind(loaded, node, ref, nodes)
        found += [Ref(each.name, output) for each in behind] or [ref]
    return _each_once(node, name, found)


def _each_once(node: Node, name: str, refs: Sequence[Ref]) -> list[Ref]:
    """Drop what is named before, where the step tells its inputs apart by name; two equal parts of a mix are two."""
    return list(dict.fromkeys(refs)) if name in name_fields_of(node.kind.config).values() else list(refs)


def _with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with a matrix member's values; a key may lead into a setting: `adapter.rank`."""
    given = dict(config)
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = given
        for parent in parents:
            below = inner.get(parent)
            inner[parent] = dict(below) if isinstance(below, dict) else {}
            inner = inner[parent]
        inner[last] = value
    return given


def _connect(loaded: LoadedRecipe, node: Node, nodes: Mapping[str, Node]) -> Node:
    """Resolve the references that the recipe writes."""
    edges: dict[str, tuple[Ref, ...]] = {}
    for name, edge in node.kind.edges.items():
        value = getattr(node.config, name)
        written = value if isinstance(value, list) else [] if value is None else [value]
        refs = [ref for each in written for ref in _resolve(loaded, node, edge, each, nodes)]
        if refs:
            edges[name] = tuple(_each_once(node, name, refs))
    return replace(node, edges=edges)


def _resolve(loaded: LoadedRecipe, node: Node, edge: EdgeSpec, ref: Ref, nodes: Mapping[str, Node]) -> list[Ref]:
    """Return the outputs that a reference means: several where the field is a list and the name means several."""
    place = (*node.place, edge.field)
    group = loaded.recipe.steps.get(node.group)
    within = isinstance(group, Rounds) and (
        ref.step in group.carry or same_round((node.group, node.round), ref.step, nodes.values())
    )
    if not within:
        if node.group:
            check_round(loaded, place, node.group, ref, nodes.values())
        check_clear(loaded, place, nodes.values(), ref.step)
    found, output = _behind(loaded, node, ref, nodes)
    found = found if edge.many else latest(found)
    known = () if found else known_names(loaded, node, nodes.values())
    return picked(loaded, place, Ref(ref.step, output), found, known, many=edge.many, inside=node.group)


def _behind(loaded: LoadedRecipe, node: Node, ref: Ref, nodes: Mapping[str, Node]) -> tuple[list[Node], str]:
    """Return the nodes that a step's reference means, and the output; nothing is checked yet."""
    group = loaded.recipe.steps.get(node.group)
    if isinstance(group, Rounds):
        return meant(group, (node.group, node.round), ref, nodes.values())
    return called(nodes.values(), ref.step), ref.output


def _follow(loaded: LoadedRecipe, node: Node, nodes: Mapping[str, Node]) -> Node:
    """Fill the inputs that the recipe leaves to their default, and refuse those that contradict it."""
    edges = dict(node.edges)
    for name, edge in node.kind.edges.items():
        if edge.follow is None:
            continue
        target = _followed(edge.follow, edges, nodes)
        if name in edges and target and "." in edge.follow.path and edges[name] != (target,):
            via = edge.follow.path.partition(".")[0]
            raise loaded.error(
                (*node.place, name),
                f"`{edges[name][0]}` is not what `{edges[via][0]}` was trained on; that is `{target}`",
            )
        if name not in edges:
            if target is None and edge.follow.required:
                raise loaded.error((*node.place, name), "this key is required (the recipe has no `base:` to take)")
            if target is not None:
                edges[name] = (target,)
    return replace(node, edges=edges)


def _followed(follow: Follow, edges: Mapping[str, tuple[Ref, ...]], nodes: Mapping[str, Node]) -> Ref | None:
    if "." not in follow.path:
        return Ref(follow.path) if follow.path in nodes else None
    field_name, _, inherited = follow.path.partition(".")
    if field_name not in edges:
        return None
    producer = nodes[edges[field_name][0].step]
    if inherited in producer.edges:
        return producer.edges[inherited][0]
    spec = producer.kind.edges.get(inherited)
    return _followed(spec.follow, producer.edges, nodes) if spec and spec.follow else None


def _named(node: Node) -> Node:
    """Tell a step the names of the steps behind its inputs, where its config has a place for them."""
    names = {
        field: tuple(ref.step for ref in node.edges.get(source, ()))
        for field, source in name_fields_of(node.kind.config).items()
    }
    lists = {name for name, edge in node.kind.edges.items() if edge.many}
    sources = name_fields_of(node.kind.config)
    values = {field: found if sources[field] in lists else "".join(found) for field, found in names.items()}
    unset = {field: value for field, value in values.items() if getattr(node.config, field) is None}
    return replace(node, config=node.config.model_copy(update=unset)) if unset else node


def _ordered(loaded: LoadedRecipe, nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Sort so that parents come first, keeping the recipe's order where it can."""
    ordered: dict[str, Node] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in path:
            raise _cycle(loaded, [nodes[each] for each in path[path.index(name) :]])
        path.append(name)
        for parent in nodes[name].parents:
            visit(parent)
        path.pop()
        given = {
            field: ordered[refs[0].step].outputs[refs[0].output] for field, refs in nodes[name].edges.items() if refs
        }
        ordered[name] = replace(nodes[name], given=given)

    for name in nodes:
        visit(name)
    return ordered


def _cycle(loaded: LoadedRecipe, ring: list[Node]) -> UserError:
    """Build the error for nodes of which each needs the next, and the last the first."""
    ring = [*ring, ring[0]]
    shown = " → ".join(node.name for node in ring)
    # Where rounds take part, the key that leads back into them is the one to mend, not one of the rounds' own.
    node, parent = next(((a, b) for a, b in itertools.pairwise(ring) if b.group and not a.group), (ring[0], ring[1]))
    field = next(name for name, refs in node.edges.items() if parent.name in [ref.step for ref in refs])
    said = "the steps form a cycle"
    if parent.group and not node.group:
        said = f"`{parent.family}` is made in the rounds of `{parent.group}`, which need `{node.name}` themselves"
    return loaded.error((*node.place, field), f"{said}: {shown}")
