"""The champion in the comparison: a gate `against: champion` needs it measured on tonight's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flows.graph import Graph, Node, Opponent
from flows.plan import REGISTRY, graph_keys
from flows.publish_check import judged_gates
from flows.publish_check import published as published_nodes
from flows.rounds import round_of
from registry.family import find, release_id
from registry.home import Home
from registry.members import Family, Member, Release
from registry.record import Recorder
from steps.artifacts import kind_named
from steps.frame import Ref, load_kind

CHAMPION = "champion"


def with_opponent(graph: Graph, home: Home, root: Path) -> Graph:
    """Add the champion's members as candidates to the comparisons that gates against it look at.

    Each published member that is judged meets the champion's of the same name, in whichever round; the principal one,
    and one that the champion has not, its principal. A member that both share is equal to itself and not measured
    twice. A release that is champion is compared with the one that it succeeded, so that its steps stay cached on a
    second run.

    Raises:
        UserError: a gate's report cannot measure the champion.
        RegistryError: the tracking server does not answer.
    """
    publish = graph.loaded.recipe.publish
    if publish is None or not any(gate.against for gate in publish.gates):
        return graph
    family = find(home, publish.family)
    if family is None:
        return graph
    published = [node.name for node in published_nodes(graph)]
    keys = {name: key for name, key in graph_keys(graph, home, root).keys.items() if name in published}
    release = opponent_of(family, _own_release(home, [keys[name] for name in published]))
    return graph if release is None else _with_release(graph, published, keys, release)


def _own_release(home: Home, keys: Sequence[str]) -> str:
    """Return the id of the release that steps with these keys gave, the principal one first; empty where one has to
    run yet: nobody has published that.
    """
    recorder = Recorder(home)
    made = [entry for key in keys if (entry := recorder.find(key))]
    return release_id([entry.outputs[""] for entry in made]) if len(made) == len(keys) else ""


def _with_release(graph: Graph, published: Sequence[str], keys: Mapping[str, str], release: Release) -> Graph:
    names: dict[str, str] = {}
    shared: set[str] = set()
    champions: dict[str, Node] = {}
    compared: dict[str, list[str]] = {}
    for index, gate in judged_gates(graph):
        if not gate.against or not gate.member:
            continue
        member = counterpart(release, graph.nodes[gate.member], is_principal=gate.member == published[0])
        if member.key == keys[gate.member]:
            shared.add(gate.member)
            continue
        name = CHAMPION if member is release.members[0] else f"{CHAMPION}[{member.role}]"
        names[gate.member] = name
        champions.setdefault(name, _node(name, release, member))
        for report in graph.members(gate.step):
            _check_fits(graph, index, report, member)
            compared.setdefault(report.name, []).append(name)
    nodes = {**champions}
    for node in graph.nodes.values():
        nodes[node.name] = _with_candidates(node, compared.get(node.name, ()))
    return replace(graph, nodes=nodes, opponent=Opponent(release.version, names, frozenset(shared)))


def opponent_of(family: Family, release: str) -> Release | None:
    """Return the release that the one with this id is judged against; None where there is none, or none left.

    That is the champion. What is champion itself keeps the one that it succeeded, or that stands behind it now where
    that one was deleted in MLflow.
    """
    if CHAMPION not in family.aliases:
        return None
    champion = family.release(CHAMPION)
    if champion.id != release:
        return champion
    before = (champion.succeeds, family.aliases.get("previous"))
    return next((each for version in before for each in family.releases if each.version == version), None)


def counterpart(release: Release, node: Node, *, is_principal: bool) -> Member:
    """Return the champion's member that a candidate's meets.

    Args:
        release: the champion.
        node: the step that gives the candidate's member.
        is_principal: whether it is the candidate's principal member.
    """
    if is_principal:
        return release.members[0]
    known = {member.role: member for member in release.members}
    if not node.round:
        return known.get(node.name, release.members[0])
    # The champion may come of fewer rounds, or of more: what is alike is its last one.
    alike = [(round, role) for role in known if (round := round_of(role, node))]
    return known[max(alike)[1]] if alike else release.members[0]


def _node(name: str, release: Release, member: Member) -> Node:
    kind = load_kind("model.member")
    given = {"uri": f"{REGISTRY}{release.family}@{release.version}/{member.selector}", "kind": member.kind}
    # Of a kind that no report measures: `_check_fits` says so.
    config = kind.config.model_validate(given if member.kind in ("Model", "Quantized") else {"uri": given["uri"]})
    return Node(name, CHAMPION, kind, config, resources=kind.resources)


def _check_fits(graph: Graph, index: int, report: Node, member: Member) -> None:
    edge = report.kind.edges.get("candidates")
    taken = edge.kinds if edge else ()
    if not any(issubclass(kind_named(member.kind), kind) for kind in taken) or member.kind == "Adapter":
        raise graph.loaded.error(
            ("publish", "gates", index, "against"),
            f"the champion's `{member.role}` is {kind_named(member.kind).named()}, which `{report.name}` "
            f"({report.kind.name}) cannot measure; publish a merged model first in `members`, or leave `against` out",
        )


def _with_candidates(node: Node, names: Sequence[str]) -> Node:
    """Add steps to a report's candidates, each once."""
    added = tuple(dict.fromkeys(names))
    if not added:
        return node
    edges: Mapping[str, tuple[Ref, ...]] = {
        **node.edges,
        "candidates": (*node.edges["candidates"], *map(Ref, added)),
    }
    names = (*getattr(node.config, "names", ()), *added)
    return replace(node, edges=edges, config=node.config.model_copy(update={"names": names}))
