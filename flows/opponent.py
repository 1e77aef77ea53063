"""The champion in the comparison: a gate `against: champion` needs it measured on tonight's rows."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flows.graph import Graph, Node
from flows.plan import graph_keys
from registry.family import load
from registry.home import Home
from registry.index import Index
from registry.members import Family, Release
from steps.frame import Ref, load_kind

CHAMPION = "champion"


def with_opponent(graph: Graph, home: Home, root: Path) -> Graph:
    """Add the champion as a candidate to the comparisons that a gate against it looks at.

    A model is compared with the champion that it meets or met, not with itself: once it has been promoted, a second
    run still compares it with the champion before it, so that its steps stay cached.
    """
    publish = graph.loaded.recipe.publish
    steps = {gate.step for gate in publish.gates if gate.against} if publish else set()
    if publish is None or not steps or not Index(home.index).families():
        return graph
    if publish.family not in Index(home.index).families():
        return graph
    lead = graph.members(publish.members[0])[0]
    release = opponent_of(load(home, publish.family), graph_keys(graph, home, root)[0][lead.name])
    if release is None:
        return graph
    uri = f"registry://{publish.family}@{release.version}"
    kind = load_kind("model.source")
    champion = Node(CHAMPION, CHAMPION, kind, kind.config.model_validate({"uri": uri}), resources=kind.resources)
    judged = {node.name for step in steps for node in graph.members(step)}
    nodes: dict[str, Node] = {CHAMPION: champion}
    for node in graph.nodes.values():
        compared = node.name in judged and "candidates" in node.edges
        nodes[node.name] = _with_candidate(node) if compared else node
    return replace(graph, nodes=nodes)


def opponent_of(family: Family, key: str) -> Release | None:
    """Return the release that a model with this key is judged against; None for a family's first model."""
    release = next((each for each in reversed(family.releases) if each.members[0].key == key), None)
    version = family.aliases.get(CHAMPION) if release is None or release.succeeds is None else release.succeeds
    seen: set[int] = set()
    while version is not None and version not in seen:
        seen.add(version)
        found = family.release(str(version))
        if found.members[0].key != key:
            return found
        version = found.succeeds
    return None


def _with_candidate(node: Node) -> Node:
    edges: Mapping[str, tuple[Ref, ...]] = {
        **node.edges,
        "candidates": (*node.edges["candidates"], Ref(CHAMPION)),
    }
    names = (*getattr(node.config, "names", ()), CHAMPION)
    return replace(node, edges=edges, config=node.config.model_copy(update={"names": names}))
