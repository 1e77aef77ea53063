"""What a recipe publishes, checked before anything runs: its members, and the reports that its gates read."""

from typing import TYPE_CHECKING, Any

from flows.rounds import check_clear, written
from steps.artifacts import Artifact, Quantized, Report
from steps.frame.errors import did_you_mean

if TYPE_CHECKING:
    from flows.graph import Graph, Node


def check_publish(graph: "Graph") -> None:
    """Check what a recipe publishes and by which gates.

    Raises:
        UserError: a member or a report does not exist, does not fit, or cannot be told from another.
    """
    publish = graph.loaded.recipe.publish
    if publish is None:
        return
    names = {name for node in graph.nodes.values() for name in (node.name, node.family)}
    for index, member in enumerate(publish.members):
        check_clear(graph.loaded, ("publish", "members", index), graph.nodes.values(), member)
        if not graph.members(member):
            raise graph.loaded.error(("publish", "members", index), f"no step `{member}`{did_you_mean(member, names)}")
        for node in graph.members(member):
            given = node.outputs.get("")
            if given is None or given.kind not in ("Model", "Adapter", "Quantized", "Package", "RewardModel"):
                raise graph.loaded.error(
                    ("publish", "members", index), f"`{member}` ({node.kind.name}) does not give a model to publish"
                )
    published = [node for member in publish.members for node in graph.members(member)]
    _check_distinct(graph, published)
    for index, gate in enumerate(publish.gates):
        place = ("publish", "gates", index)
        metric = gate.metric.partition(".")[2]
        reports = [node for node in graph.members(gate.step) if node.outputs.get("") is Report]
        if len(reports) > 1:
            choice = " or ".join(f"`{written(graph.loaded, node)}.{metric}`" for node in reports)
            raise graph.loaded.error((*place, "metric"), f"`{gate.step}` is several reports; name one: {choice}")
        if not reports:
            known = [each.name for each in graph.nodes.values() if each.outputs.get("") is Report]
            raise graph.loaded.error(
                (*place, "metric"), f"no report step `{gate.step}`{did_you_mean(gate.step, known)}"
            )
        distances = [each.name for each in reports[0].config.metrics if each.distance]
        if gate.against and gate.name in distances:
            raise graph.loaded.error(
                (*place, "against"),
                f"{gate.metric} is the distance to tonight's reference, and the champion's to it says nothing of which "
                "is better; write `at_most:` or `at_least:` with a bound instead",
            )
        if gate.member is not None and not any(gate.member in (node.name, node.family) for node in published):
            near = did_you_mean(gate.member, {name for node in published for name in (node.name, node.family)})
            raise graph.loaded.error((*place, "member"), f"`{gate.member}` is not among the published members{near}")


def _check_distinct(graph: "Graph", published: "list[Node]") -> None:
    """Refuse members that the registry could not tell apart; it tells quantized ones by the scheme they end up with."""
    first: dict[type[Artifact[Any]], Node] = {}
    for node in published:
        kind = node.outputs[""]
        if kind is not Quantized and first.setdefault(kind, node) is not node:
            raise graph.loaded.error(
                ("publish", "members"),
                f"`{first[kind].name}` and `{node.name}` are each {kind.named()}, and a family has one; name one",
            )
