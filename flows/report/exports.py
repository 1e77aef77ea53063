"""Parts of the report for other places: a table for Prefect, a picture for MLflow and Prefect."""

import io
from typing import TYPE_CHECKING, Any

from flows import units
from flows.report.charts import quality_metric
from flows.report.comparison import Candidate, Metric, read_comparisons
from flows.report.run import RunReport
from flows.report.svg import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#8a919e", "#3563d6", "#0f9a86", "#d17a1c", "#b0489a", "#6a8f1f", "#7a5bd0", "#c2453f")
"""Of the classes c0 to c7 in the style sheet, light."""
INCHES = (8.0, 4.5)


def prefect_table(run: RunReport) -> list[dict[str, Any]]:
    """Return one row a step, for a Prefect table artifact."""
    return [
        {
            "step": step.name,
            "kind": step.kind,
            "status": step.status,
            "time": units.duration(step.seconds),
            "peak memory": units.size(step.peak_memory) if step.peak_memory else units.ABSENT,
            "outputs": ", ".join(f"{name} {digest[:12]}".strip() for name, digest in sorted(step.outputs.items())),
            "message": step.message,
        }
        for step in run.steps
    ]


def comparison_png(run: RunReport) -> bytes | None:
    """Return quality against size as a PNG of 1280 by 720 pixels; None where no comparison measured both."""
    for comparison in read_comparisons(run):
        metric = quality_metric(comparison)
        if metric is None:
            continue
        shown = [each for each in comparison.candidates if {metric.name, "size_bytes"} <= each.figures.keys()]
        if shown:
            title = f"{run.recipe}: quality against size ({comparison.step})"
            return _quality_png(title, metric, shown)
    return None


def _quality_png(title: str, metric: Metric, shown: list[Candidate]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], INCHES[1]), dpi=160, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    unit, divisor = units.size_unit(max(each.figures["size_bytes"].value for each in shown))
    points = [(each.figures["size_bytes"].value / divisor, each.figures[metric.name].value) for each in shown]
    for (across, value), candidate in zip(points, shown, strict=True):
        low, high = candidate.figures[metric.name].interval or (value, value)
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        colour = COLOURS[int(candidate.colour[1:])]
        axes.errorbar([across], [value], yerr=reach, fmt="o", color=colour, markersize=8, elinewidth=2, capsize=0)
    axes.set_xlim(0, 1.08 * max(across for across, _ in points))
    axes.set_title(_plain(title), loc="left", fontsize=11)
    axes.set_xlabel(f"Size, {unit}")
    axes.set_ylabel(f"{metric.label}, 95 % interval")
    axes.grid(color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()
    _label_points(axes, points, [each.name for each in shown])
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _label_points(axes: "Axes", points: list[tuple[float, float]], names: list[str]) -> None:
    """Write each name beside its point, clear of the others; in units of 1/72 inch, y downwards."""
    across, up = axes.transData.transform(points).T * 72 / axes.figure.dpi
    at = [(float(x), -float(y)) for x, y in zip(across, up, strict=True)]
    for point, name, (left, baseline, anchor), (x, y) in zip(
        points, names, place_labels(at, names, 72 * INCHES[0]), at, strict=True
    ):
        offset, side = (left - x, y - baseline), "left" if anchor == "start" else "right"
        axes.annotate(_plain(name), point, offset, textcoords="offset points", ha=side, fontsize=9)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a formula between dollar signs."""
    return text.replace("$", r"\$")
