"""What a recipe publishes, checked before anything runs: its members, and the reports that its gates read."""

import math
from typing import TYPE_CHECKING

from flows.rounds import called, check_clear, written
from flows.yaml_file import Place
from registry.gates import Gate
from steps.artifacts import Adapter, Quantized, Report
from steps.frame import Metric, Ref
from steps.frame.config import name_fields_of
from steps.frame.errors import did_you_mean

if TYPE_CHECKING:
    from flows.graph import Graph, Node

_SHOWN = 6
"""Names that a sentence lists at most."""


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
    _check_distinct(graph, published(graph))
    for index, gate in enumerate(publish.gates):
        place = ("publish", "gates", index)
        report = _report(graph, place, gate)
        metric = _metric(graph, place, gate, report)
        for node in _judged(graph, index, gate):
            _check_measured(graph, place, gate, report, metric, node)


def published(graph: "Graph") -> "list[Node]":
    """Return the steps whose models a recipe publishes, the principal one first; none where it publishes nothing."""
    publish = graph.loaded.recipe.publish
    return [node for member in publish.members for node in graph.members(member)] if publish else []


def judged_gates(graph: "Graph") -> list[tuple[int, Gate]]:
    """Return a recipe's gates, each once for every member that it judges, by its full name, and with its index.

    Raises:
        UserError: a gate's member is not published.
    """
    publish = graph.loaded.recipe.publish
    return [
        (index, gate.model_copy(update={"member": node.name}))
        for index, gate in enumerate(publish.gates if publish else ())
        for node in _judged(graph, index, gate)
    ]


def _judged(graph: "Graph", index: int, gate: Gate) -> "list[Node]":
    """Return the published members that a gate judges, which names them as `members` does; the first by default."""
    members = published(graph)
    if gate.member is None:
        return members[:1]
    place = ("publish", "gates", index, "member")
    check_clear(graph.loaded, place, graph.nodes.values(), gate.member)
    found = called(members, gate.member)
    if not found:
        names = {name for node in members for name in (node.family, written(graph.loaded, node), node.name)}
        near = did_you_mean(gate.member, names)
        raise graph.loaded.error(place, f"`{gate.member}` is not among the published members{near}")
    return found


def _report(graph: "Graph", place: Place, gate: Gate) -> "Node":
    """Return the report step that a gate reads."""
    check_clear(graph.loaded, (*place, "metric"), graph.nodes.values(), gate.step)
    reports = [node for node in graph.members(gate.step) if node.outputs.get("") is Report]
    if len(reports) > 1:
        choice = " or ".join(f"`{written(graph.loaded, node)}.{gate.written_name}`" for node in reports)
        raise graph.loaded.error((*place, "metric"), f"`{gate.step}` is several reports; name one: {choice}")
    if not reports:
        known = [each.name for each in graph.nodes.values() if each.outputs.get("") is Report]
        raise graph.loaded.error((*place, "metric"), f"no report step `{gate.step}`{did_you_mean(gate.step, known)}")
    return reports[0]


def _metric(graph: "Graph", place: Place, gate: Gate, report: "Node") -> Metric:
    """Return the metric that a gate names, which must be one that its condition can be put on."""
    declared = {each.name: each for each in report.config.metrics}
    metric = declared.get(gate.name)
    if metric is None:
        said = f"`{gate.step}` ({report.kind.name}) has no metric `{gate.written_name}`"
        raise graph.loaded.error((*place, "metric"), f"{said}{did_you_mean(gate.written_name, declared)}")
    if gate.against and metric.distance:
        raise graph.loaded.error(
            (*place, "against"),
            f"{gate.metric} is the distance to tonight's reference, and the champion's to it says nothing of which is "
            "better; write `at_most:` or `at_least:` with a bound instead",
        )
    if gate.against and not metric.paired:
        paired = ", ".join(each.name for each in declared.values() if each.paired)
        raise graph.loaded.error(
            (*place, "against"),
            f"{gate.metric} has no value sample by sample, so no paired test with the champion; write `at_most:` or "
            f"`at_least:` with a bound instead, or name one of {paired}",
        )
    for bound in ("at_most", "at_least", "no_worse_by"):
        value = getattr(gate, bound)
        if value is not None and not math.isfinite(value):
            raise graph.loaded.error((*place, bound), f"{value} is no bound; give a finite number")
    if not metric.summed_up and (gate.at_most, gate.at_least) != (None, None):
        figures = ", ".join(each.name for each in declared.values() if each.summed_up)
        said = f"the report has {gate.metric} by rows only, on which no bound can be put; name one of {figures}"
        raise graph.loaded.error((*place, "metric"), said)
    return metric


def _check_measured(graph: "Graph", place: Place, gate: Gate, report: "Node", metric: Metric, judged: "Node") -> None:
    """Refuse a gate on a member that its report does not measure, or not by this metric."""
    measured = _measured(report)
    name, key = judged.name, (*place, "member" if gate.member else "metric")
    if (ref := measured.get(name)) is None or ref.step != name:
        others = [called for called, ref in measured.items() if ref.step == name]
        named = ", ".join(
            [*(f"`{each}`" for each in [*measured][:_SHOWN]), *(["..."] if len(measured) > _SHOWN else [])]
        )
        said = f"does not measure `{name}`, but {named}; name it among its `candidates`, or another `member` here"
        if others:
            said = f"calls `{name}` `{others[0]}`, and gates know it by its step's name; leave its `names` out"
        raise graph.loaded.error(key, f"`{gate.step}` {said}")
    if metric.distance and name == next(iter(measured)):
        said = f"`{name}` is the reference of `{gate.step}`, so it has no {gate.written_name}; name another `member`"
        raise graph.loaded.error(key, said)
    if gate.against and judged.outputs[""] is Adapter:
        raise graph.loaded.error(
            (*place, "against"),
            f"`{name}` is an Adapter, which cannot be measured once it is the champion; publish a merged model first "
            "in `members`, or leave `against` out",
        )


def _measured(report: "Node") -> dict[str, Ref]:
    """Return the models that a report measures under the names by which it calls them, its reference first."""
    found: dict[str, Ref] = {}
    for field, source in name_fields_of(report.kind.config).items():
        names = getattr(report.config, field)
        names = (names,) if isinstance(names, str) else names or ()
        for name, ref in zip(names, report.edges.get(source, ()), strict=False):
            found.setdefault(name, ref)
    return found


def _check_distinct(graph: "Graph", published: "list[Node]") -> None:
    """Refuse members that the registry could not tell apart; it tells quantized ones by their scheme."""
    first: dict[object, Node] = {}
    for node in published:
        if any(node is other for other in first.values()):
            raise graph.loaded.error(("publish", "members"), f"`{node.name}` is named twice; name it once")
        kind = node.outputs[""]
        same: object = (node.config.scheme_made or node.name) if kind is Quantized else kind
        if (other := first.setdefault(same, node)) is not node:
            alike = f"{kind.named()} of the same scheme" if kind is Quantized else kind.named()
            raise graph.loaded.error(
                ("publish", "members"),
                f"`{other.name}` and `{node.name}` are each {alike}, and a family has one; name one",
            )
