"""Tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from flows.cli.yaml_words import example_of, type_in_words, yaml_value
from flows.plain_table import PlainTable
from flows.plan import Plan
from flows.units import duration, size
from registry.members import Family
from steps.frame import StepKind

_COLOURS = {"cached": "blue", "run": "yellow", "resume": "cyan", "record": "cyan", "blocked": "red"}


def plan_table(plan: Plan) -> Table:
    """Draw a plan: a row a step."""
    todo = len(plan.todo)
    seconds = sum(step.predicted.seconds for step in plan.todo if step.predicted)
    title = f"{plan.graph.loaded.name}: {todo} of {len(plan.steps)} steps to run"
    table = _table("step", "uses", "needs", "status", "time", "memory", "disk", "", title=title)
    if seconds:
        table.caption = f"about {duration(seconds)} by what these steps took before"
    for step in plan.steps.values():
        predicted = step.predicted
        table.add_row(
            Text(step.name, style="bold"),
            step.node.kind.name,
            ", ".join(step.node.parents),
            Text(step.status, style=_COLOURS[step.status]),
            duration(predicted.seconds) if predicted else "?",
            size(predicted.peak_memory) if predicted else "?",
            size(predicted.size) if predicted else "?",
            step.reason,
        )
    return table


def families_table(families: Sequence[Mapping[str, Any]]) -> Table:
    """Draw all families: a row each."""
    table = _table("family", "champion", "previous", "candidate", "releases", "formats", "updated")
    for family in families:
        table.add_row(
            Text(family["family"], style="bold"),
            *(str(family["aliases"].get(alias, "")) for alias in ("champion", "previous", "candidate")),
            str(family["releases"]),
            ", ".join(family["formats"]),
            (family["updated"] or "")[:16],
        )
    return table


def family_table(family: Family) -> Table:
    """Draw one family: a row a member, the newest release first, each followed by its gate decision."""
    table = _table("version", "member", "--format", "size", "digest", "aliases", title=family.name)
    for release in reversed(family.releases):
        for member in release.members:
            table.add_row(
                str(member.version),
                Text(member.name, style="bold"),
                member.selector,
                size(member.size),
                member.digest[:12],
                ", ".join(release.aliases) if member.version == release.version else "",
            )
        table.add_row("", Text(family.told(release), style="dim", overflow="fold"), "", "", "", "", end_section=True)
    return table


def kinds_table(kinds: Sequence[StepKind]) -> Table:
    """Draw all step kinds."""
    table = _table("uses", "takes", "gives", "what it does")
    for kind in kinds:
        row = describe_kind(kind)
        takes = ", ".join(f"{name}: {' | '.join(each['kinds'])}" for name, each in row["inputs"].items())
        gives = ", ".join(f"{name}: {kinds}" if name else kinds for name, kinds in row["outputs"].items())
        table.add_row(Text(kind.name, style="bold"), takes, gives, kind.summary)
    return table


def kind_table(kind: StepKind) -> Table:
    """Draw the keys of one step kind."""
    row = describe_kind(kind)
    table = _table("key", "type", "default", "meaning", title=f"{kind.name}: {kind.summary}", caption=_below(row))
    for name, key in row["keys"].items():
        table.add_row(Text(name, style="bold"), key["type"], key["default"], key["meaning"])
    return table


def _below(row: Mapping[str, Any]) -> Text:
    """What stands below the keys of a kind: how it is written, and where it comes from."""
    return Text(f"NAME: {row['example']}\n{row['reference']}")


def describe_kind(kind: StepKind) -> dict[str, Any]:
    """Return a step kind as plain data."""
    fields = kind.config.model_fields
    keys = {}
    for name, info in fields.items():
        edge = kind.edges.get(name)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if "names_of" in extra:
            continue
        follows = extra.get("follows")
        default = "required" if info.is_required() else str(follows) if follows else _default_of(info)
        taken = " | ".join(each.kind for each in edge.kinds) if edge else ""
        step = f"step that gives {taken}"
        keys[name] = {
            "type": (f"[{step}, ...]" if edge.many else step) if edge else type_in_words(info.annotation),
            "default": default,
            "meaning": " ".join((info.description or "").split()),
        }
    return {
        "uses": kind.name,
        "summary": kind.summary,
        "example": example_of(kind),
        "reference": kind.reference,
        "inputs": {
            name: {"kinds": [k.kind for k in edge.kinds], "many": edge.many} for name, edge in kind.edges.items()
        },
        "outputs": {name: " | ".join(each.kind for each in kinds) for name, kinds in kind.outputs.items()},
        "keys": keys,
    }


def _default_of(info: FieldInfo) -> str:
    return yaml_value(info.get_default(call_default_factory=True))


def status_tables(found: Mapping[str, Any]) -> list[Table]:
    """Draw what is up, the deployments with their schedules, and the last runs."""
    services = _table("service", "", "pid", "where")
    for name, service in found["services"].items():
        state = Text("up", style="green") if service["up"] else Text("down", style="red")
        services.add_row(Text(name, style="bold"), state, str(service["pid"]), service["url"] or service["log"])
    deployments = _table("deployment", "pool", "recipe", "when", "next")
    for deployment in found["deployments"]:
        name, pool = Text(deployment["name"], style="bold"), deployment["pool"]
        for each in deployment["schedules"] or [None]:
            when = f"{each['cron']} {each['timezone']}" + ("" if each["active"] else " (paused)") if each else ""
            deployments.add_row(name, pool, each["recipe"] if each else "", when, (each["next"] or "") if each else "")
    runs = _table("last runs", "flow", "state", "began", "time", "")
    for run in found["runs"]:
        took = duration(run["seconds"])
        runs.add_row(run["name"], run["flow"], run["state"], run["started"] or "", took, run["message"] or "")
    return [services, deployments, runs]


def _table(*columns: str, title: str | None = None, caption: str | Text | None = None) -> Table:
    table = PlainTable(*columns, title=title, caption=caption, header_style="dim")
    table.title_justify = table.caption_justify = "left"
    return table


def describe(plan: Plan) -> list[dict[str, Any]]:
    """Return the plan as plain data, a row a step, for `--json` and for the table."""
    return [
        {
            "step": step.name,
            "uses": step.node.kind.name,
            "status": step.status,
            "key": step.key,
            "needs": step.node.parents,
            "reason": step.reason,
            "outputs": dict(step.outputs or {}),
            "predicted": None
            if step.predicted is None
            else {
                "seconds": round(step.predicted.seconds, 1),
                "peak_memory": step.predicted.peak_memory,
                "size": step.predicted.size,
            },
        }
        for step in plan.steps.values()
    ]
