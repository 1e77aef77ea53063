"""The run's graph as a drawing: one box a step with its kind, status and time, and the edges between them."""

from collections.abc import Sequence

from markupsafe import Markup

from flows.report.layout import Layout, layered
from flows.report.run import ReportStep
from flows.report.svg import drawing, tag, text
from flows.units import duration

BOX = (150.0, 62.0)
"""Width and height of a step's box, pixels."""
ACROSS, DOWN, MARGIN = 42.0, 16.0, 6.0
"""Pixels between columns, between boxes of a column, and around the drawing."""
TIMED = {"finished", "cached", "failed"}
"""Statuses of steps that took time."""


def graph_drawing(steps: Sequence[ReportStep]) -> Markup:
    """Return the `<svg>` of a run's steps; edges lead from left to right."""
    layout = layered({step.name: step.parents for step in steps}, box=BOX[1], gap=DOWN)
    width = 2 * MARGIN + layout.columns * (BOX[0] + ACROSS) - ACROSS
    label = "The steps of the run and what each takes from which: " + ", ".join(step.name for step in steps)
    boxes = [_box(step, layout) for step in steps]
    # A wide graph shrinks with the page to three quarters, then scrolls.
    style = f"min-width: {0.75 * width:.0f}px"
    return drawing(width, layout.height + 2 * MARGIN, label, _edges(layout), *boxes, class_="graph", style=style)


def _left(column: int) -> float:
    return MARGIN + column * (BOX[0] + ACROSS)


def _edges(layout: Layout) -> Markup:
    """Curves between the columns, and the straight pieces of trunks that pass a column."""
    curves = []
    for start, end in layout.links:
        x1, y1 = _left(start[1]) + BOX[0], layout.centre[start] + MARGIN
        x2, y2 = _left(end[1]), layout.centre[end] + MARGIN
        bend = ACROSS * 0.55
        path = f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        passes = layout.column[end[0]] != end[1]
        curves.append(tag("path", d=path + (f"h{BOX[0]:.1f}" if passes else ""), class_="edge"))
        if not passes:
            head = f"M{x2 - 6:.1f} {y2 - 4:.1f}L{x2:.1f} {y2:.1f}L{x2 - 6:.1f} {y2 + 4:.1f}Z"
            curves.append(tag("path", d=head, class_="head"))
    return Markup("").join(curves)


def _box(step: ReportStep, layout: Layout) -> Markup:
    column = layout.column[step.name]
    left, top = _left(column), layout.centre[step.name, column] + MARGIN - BOX[1] / 2
    took = f"{step.status} \N{MIDDLE DOT} {duration(step.seconds)}" if step.status in TIMED else step.status
    title = f"{step.name} ({step.kind}): {took}" + (f"\n{step.message}" if step.message else "")
    return tag(
        "g",
        tag("title", title),
        tag("rect", x=left, y=top, width=BOX[0], height=BOX[1], rx=9, class_="box"),
        tag("rect", x=left + 10, y=top + 11, width=4, height=BOX[1] - 22, rx=2, class_="mark"),
        text(left + 23, top + 22, _short(step.name, 16), "name"),
        text(left + 23, top + 37, _cut(step.kind, 18), "kind"),
        text(left + 23, top + 52, _cut(took, 22), "took"),
        class_=f"step {step.status}",
    )


def _short(name: str, letters: int) -> str:
    """Cut a step's name before its round and matrix values, which tell it from its like."""
    family, bracket, rest = name.partition("[")
    room = letters - len(bracket + rest)
    return _cut(family, room) + bracket + rest if room > 4 else _cut(name, letters)


def _cut(label: str, letters: int) -> str:
    return label if len(label) <= letters else label[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"
