"""The graph: a recipe's steps with their edges, checked for kinds and cycles before anything runs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from flows.recipe import LoadedRecipe, StepEntry, validation_error
from steps.artifacts import Artifact, Report
from steps.frame import Follow, Ref, Resources, StepConfig, StepKind, UserError, load_kind
from steps.frame.config import EdgeSpec, name_fields_of
from steps.frame.errors import did_you_mean

BASE = "base"


@dataclass(frozen=True)
class Node:
    """One step to run."""

    name: str
    """As in the recipe; a member of a matrix carries its values, `gguf[Q4_K_M]`."""
    family: str
    """Name in the recipe without the matrix values."""
    kind: StepKind
    config: StepConfig
    edges: Mapping[str, tuple[Ref, ...]] = field(default_factory=dict)
    """References by input field, resolved to existing nodes."""
    resources: Resources = field(default_factory=Resources)

    @property
    def outputs(self) -> dict[str, type[Artifact[Any]]]:
        """Kind of each output."""
        return self.kind.outputs_of(self.config)

    @property
    def parents(self) -> list[str]:
        """Names of the nodes it needs, each once."""
        return list(dict.fromkeys(ref.step for refs in self.edges.values() for ref in refs))


@dataclass(frozen=True)
class Graph:
    """All nodes of a recipe in an order in which they can run."""

    loaded: LoadedRecipe
    nodes: Mapping[str, Node]

    def members(self, name: str) -> list[Node]:
        """Return the node of that name, or all of a matrix step's members."""
        return [node for node in self.nodes.values() if name in (node.name, node.family)]

    def children(self, name: str) -> list[str]:
        """Names of the nodes that need this one."""
        return [node.name for node in self.nodes.values() if name in node.parents]


def build_graph(loaded: LoadedRecipe) -> Graph:
    """Type and connect every step of a recipe.

    Raises:
        UserError: unknown kind or key, missing or unknown reference, an artifact kind that does not fit, a cycle;
            one sentence with file, line, key and the nearest thing that would work.
    """
    drafts = _draft_nodes(loaded)
    connected = {name: _connect(loaded, node, drafts) for name, node in drafts.items()}
    followed = {name: _named(_follow(loaded, node, connected)) for name, node in connected.items()}
    ordered = _ordered(loaded, followed)
    for node in ordered.values():
        _check_kinds(loaded, node, ordered)
    graph = Graph(loaded, ordered)
    _check_publish(graph)
    return graph


def place_of(node: Node) -> tuple[str, ...]:
    """Where a node stands in the recipe."""
    return (BASE,) if node.name == BASE else ("steps", node.family)


def _draft_nodes(loaded: LoadedRecipe) -> dict[str, Node]:
    """Expand matrices and validate each step's own keys; edges are still as written."""
    entries: dict[str, StepEntry] = {}
    base = loaded.recipe.base
    if base is not None:
        entries[BASE] = (
            StepEntry.model_validate({"uses": "model.source", "uri": base}) if isinstance(base, str) else base
        )
    entries.update(loaded.recipe.steps)
    nodes: dict[str, Node] = {}
    for family, entry in entries.items():
        place = (BASE,) if family == BASE else ("steps", family)
        try:
            kind = load_kind(entry.uses)
        except UserError as error:
            raise loaded.error((*place, "uses"), str(error)) from None
        for name, values in _matrix(family, entry):
            nodes[name] = _draft(loaded, place, name, family, entry, kind, values)
    return nodes


def _draft(
    loaded: LoadedRecipe,
    place: tuple[str, ...],
    name: str,
    family: str,
    entry: StepEntry,
    kind: StepKind,
    values: Mapping[str, Any],
) -> Node:
    given = {**entry.config, **values}
    if "seed" in kind.config.model_fields:
        given.setdefault("seed", loaded.recipe.seed)
    # A single reference where a list is asked for is a list of one; a matrix step fans in.
    for edge in kind.edges.values():
        if edge.many and isinstance(given.get(edge.field), str):
            given[edge.field] = [given[edge.field]]
    try:
        config = kind.config.model_validate(given)
    except ValidationError as error:
        raise validation_error(error, loaded.file, place, kind.config) from None
    return Node(name, family, kind, config, resources=entry.resources or kind.resources)


def _matrix(family: str, entry: StepEntry) -> list[tuple[str, dict[str, Any]]]:
    """Return name and values of each combination; one nameless combination without a matrix."""
    if not entry.matrix:
        return [(family, {})]
    combinations = itertools.product(*entry.matrix.values())
    return [
        (f"{family}[{','.join(map(str, values))}]", dict(zip(entry.matrix, values, strict=True)))
        for values in combinations
    ]


def _connect(loaded: LoadedRecipe, node: Node, nodes: Mapping[str, Node]) -> Node:
    """Resolve the references that the recipe writes."""
    edges: dict[str, tuple[Ref, ...]] = {}
    for name, edge in node.kind.edges.items():
        value = getattr(node.config, name)
        written = value if isinstance(value, list) else [] if value is None else [value]
        refs = [ref for each in written for ref in _resolve(loaded, node, edge, each, nodes)]
        if refs:
            edges[name] = tuple(refs)
    return replace(node, edges=edges)


def _resolve(loaded: LoadedRecipe, node: Node, edge: EdgeSpec, ref: Ref, nodes: Mapping[str, Node]) -> list[Ref]:
    """Return the nodes that a reference means: several where it names a matrix step and the field is a list."""
    place = (*place_of(node), edge.field)
    targets = [each for each in nodes.values() if ref.step in (each.name, each.family)]
    if not targets:
        names = {name for each in nodes.values() for name in (each.name, each.family)}
        raise loaded.error(place, f"there is no step `{ref.step}`{did_you_mean(ref.step, names - {node.name})}")
    if len(targets) > 1 and not edge.many:
        choice = " or ".join(f"`{each.name}`" for each in targets)
        raise loaded.error(place, f"`{ref.step}` is a matrix of {len(targets)} steps; name one: {choice}")
    for target in targets:
        if ref.output not in target.kind.outputs:
            outputs = [str(Ref(target.name, output)) for output in target.kind.outputs]
            raise loaded.error(place, f"`{ref}` does not exist{did_you_mean(str(ref), outputs)}")
    return [Ref(target.name, ref.output) for target in targets]


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
                (*place_of(node), name),
                f"`{edges[name][0]}` is not what `{edges[via][0]}` was trained on; that is `{target}`",
            )
        if name not in edges:
            if target is None and edge.follow.required:
                raise loaded.error((*place_of(node), name), "this key is required (the recipe has no `base:` to take)")
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
            ring = " → ".join([*path[path.index(name) :], name])
            raise loaded.error(place_of(nodes[name]), f"the steps form a cycle: {ring}")
        path.append(name)
        for parent in nodes[name].parents:
            visit(parent)
        path.pop()
        ordered[name] = nodes[name]

    for name in nodes:
        visit(name)
    return ordered


def _check_kinds(loaded: LoadedRecipe, node: Node, nodes: Mapping[str, Node]) -> None:
    for name, refs in node.edges.items():
        wanted = node.kind.edges[name].kinds
        for ref in refs:
            given = nodes[ref.step].outputs[ref.output]
            if not issubclass(given, wanted):
                names = " or ".join(kind.kind for kind in wanted)
                raise loaded.error(
                    (*place_of(node), name),
                    f"{node.kind.name} takes a {names} here, `{ref}` ({nodes[ref.step].kind.name}) gives a "
                    f"{given.kind}{_fitting(node, wanted, nodes)}",
                )


def _fitting(node: Node, wanted: tuple[type[Artifact[Any]], ...], nodes: Mapping[str, Node]) -> str:
    """Name the steps before this one whose output would fit."""
    fits = [
        str(Ref(each.name, output))
        for each in itertools.takewhile(lambda other: other.name != node.name, nodes.values())
        for output, kind in each.outputs.items()
        if issubclass(kind, wanted)
    ]
    return f"; `{fits[-1]}` would fit" if fits else ""


def _check_publish(graph: Graph) -> None:
    publish = graph.loaded.recipe.publish
    if publish is None:
        return
    names = {name for node in graph.nodes.values() for name in (node.name, node.family)}
    for index, member in enumerate(publish.members):
        if not graph.members(member):
            raise graph.loaded.error(("publish", "members", index), f"no step `{member}`{did_you_mean(member, names)}")
        for node in graph.members(member):
            given = node.outputs.get("")
            if given is None or given.kind not in ("Model", "Adapter", "Quantized", "Package", "RewardModel"):
                raise graph.loaded.error(
                    ("publish", "members", index), f"`{member}` ({node.kind.name}) does not give a model to publish"
                )
    for index, gate in enumerate(publish.gates):
        step = gate.metric.partition(".")[0]
        if not any(node.outputs.get("") is Report for node in graph.members(step)):
            reports = [each.name for each in graph.nodes.values() if each.outputs.get("") is Report]
            raise graph.loaded.error(
                ("publish", "gates", index, "metric"), f"no report step `{step}`{did_you_mean(step, reports)}"
            )
