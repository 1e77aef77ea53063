"""The graph: a recipe's steps with their edges, checked for kinds and cycles before anything runs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

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
    written,
)
from steps.artifacts import Artifact
from steps.frame import Follow, Like, Ref, Resources, StepConfig, StepKind, UserError, load_kind
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
        _check_kinds(loaded, node, ordered)
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
    nodes: dict[str, Node] = {}
    for step in steps:
        try:
            kind = load_kind(step.entry.uses)
        except UserError as error:
            raise loaded.error((*step.place, "uses"), str(error)) from None
        for member, values in step.entry.combinations:
            node = _draft(loaded, step, kind, member, values)
            nodes[node.name] = node
    return nodes


def _draft(loaded: LoadedRecipe, step: Occurrence, kind: StepKind, member: str, values: Mapping[str, Any]) -> Node:
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
    config = _config(loaded, kind, step.place, given)
    resources = step.entry.resources or kind.resources
    try:
        config.check_resources(resources)
    except ValueError as error:
        raise loaded.error((*step.place, "resources"), str(error)) from None
    return Node(
        name=titled(step.family, step.round, member),
        family=step.family,
        kind=kind,
        config=config,
        resources=resources,
        place=step.place,
        group=step.group,
        round=step.round,
        member=member,
    )


def _config(loaded: LoadedRecipe, kind: StepKind, place: tuple[str, ...], given: Mapping[str, Any]) -> StepConfig:
    """Check a step's settings."""
    try:
        return kind.config.model_validate(given)
    except ValidationError as error:
        raise validation_error(error, loaded.file, place, kind.config, given) from None


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
            edges[name] = tuple(dict.fromkeys(refs))
    # What a list means may be longer than what is written, or shorter: settings for each of its steps count those.
    lists = {name: list(refs) for name, refs in edges.items() if node.kind.edges[name].many}
    if lists:
        given = {name: getattr(node.config, name) for name in node.config.model_fields_set}
        _config(loaded, node.kind, node.place, given | lists)
    return replace(node, edges=edges)


def _resolve(loaded: LoadedRecipe, node: Node, edge: EdgeSpec, ref: Ref, nodes: Mapping[str, Node]) -> list[Ref]:
    """Return the outputs that a reference means: several where the field is a list and the name means several."""
    place = (*node.place, edge.field)
    group = loaded.recipe.steps.get(node.group)
    if isinstance(group, Rounds):
        spot = (node.group, node.round)
        if ref.step not in group.carry and not same_round(spot, ref.step, nodes.values()):
            check_round(loaded, place, node.group, ref, nodes.values())
            check_clear(loaded, place, nodes.values(), ref.step)
        found, output = meant(group, spot, ref, nodes.values())
    else:
        check_clear(loaded, place, nodes.values(), ref.step)
        found, output = called(nodes.values(), ref.step), ref.output
    found = found if edge.many else latest(found)
    known = () if found else known_names(loaded, node, nodes.values())
    return picked(loaded, place, Ref(ref.step, output), found, known, many=edge.many, inside=node.group)


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


def _check_kinds(loaded: LoadedRecipe, node: Node, nodes: Mapping[str, Node]) -> None:
    for name, refs in node.edges.items():
        wanted = node.kind.edges[name].kinds
        for ref in refs:
            given = nodes[ref.step].outputs[ref.output]
            if not issubclass(given, wanted):
                names = " or ".join(kind.named() for kind in wanted)
                raise loaded.error(
                    (*node.place, name),
                    f"{node.kind.name} takes {names} here, `{ref}` ({nodes[ref.step].kind.name}) gives {given.named()}"
                    f"{_fitting(loaded, node, wanted, nodes)}",
                )
    for declared in node.kind.produces.values():
        if isinstance(declared, Like):
            _check_alike(loaded, node, declared.field, nodes)


def _check_alike(loaded: LoadedRecipe, node: Node, name: str, nodes: Mapping[str, Node]) -> None:
    """Refuse inputs of several kinds where one of them is what the step gives."""
    first, *others = node.edges.get(name, ())
    for ref in others:
        found, wanted = nodes[ref.step].outputs[ref.output], node.given[name]
        if found is not wanted:
            raise loaded.error(
                (*node.place, name),
                f"`{first}` gives {wanted.named()}, `{ref}` {found.named()}; name steps of one kind",
            )


def _fitting(
    loaded: LoadedRecipe, node: Node, wanted: tuple[type[Artifact[Any]], ...], nodes: Mapping[str, Node]
) -> str:
    """Name the last step before this one whose output would fit."""
    fits = [
        str(Ref(written(loaded, each, node.group), output))
        for each in itertools.takewhile(lambda other: other.name != node.name, nodes.values())
        for output, kind in each.outputs.items()
        if issubclass(kind, wanted)
    ]
    return f"; `{fits[-1]}` would fit" if fits else ""
