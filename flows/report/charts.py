"""The report's charts: curves of training, quality against size, and distance from the reference."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flows import units
from flows.report.comparison import Candidate, Comparison, Figure, Metric
from flows.report.run import ReportStep
from flows.report.svg import (
    LETTER,
    Point,
    Scale,
    dot,
    drawing,
    horizontal_axis,
    line,
    linear,
    logarithmic,
    place_labels,
    polyline,
    text,
    vertical_axis,
)
from registry.run_data import read_points

WIDTH, HEIGHT = 560.0, 300.0
LOSS, SMALL = (740.0, 316.0), (360.0, 150.0)
"""Pixels of the chart of losses and of the small charts beside it."""
LEFT, RIGHT, TOP, BOTTOM = 52.0, 18.0, 30.0, 42.0
"""Pixels around the plotted area."""
KL_FLOOR = 1e-4
"""A smaller divergence is drawn here; its figure stands beside it."""
BESIDE = ("reward", "eval_mean_token_accuracy", "mean_token_accuracy", "learning_rate", "grad_norm", "entropy")
"""Curves worth a small chart beside the loss, the first first."""
LOSS_LABELS = {"loss": "training", "train_loss": "training", "eval_loss": "held out"}
Curves = Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class TrainingCharts:
    """The curves of one training step."""

    step: str
    kind: str
    loss: Markup
    small: Sequence[Markup]


def training_charts(steps: Sequence[ReportStep]) -> list[TrainingCharts]:
    """Return the charts of every step that logged a loss more than once."""
    charts = []
    for step in steps:
        curves = _curves(step)
        losses = {name: curve for name, curve in curves.items() if name.endswith("loss")}
        if losses:
            small = [small_chart(name, curves[name]) for name in BESIDE if name in curves][:2]
            charts.append(TrainingCharts(step.name, step.kind, loss_chart(step.name, losses), small))
    return charts


def _curves(step: ReportStep) -> dict[str, list[Point]]:
    """Return each metric that has at least two finite values, by step."""
    curves: dict[str, list[Point]] = {}
    for point in read_points(step.metrics_file):
        if math.isfinite(point.value):
            curves.setdefault(point.name, []).append((point.step, point.value))
    return {name: sorted(curve) for name, curve in curves.items() if len(curve) > 1}


def loss_chart(step: str, losses: Curves) -> Markup:
    """Return losses over optimizer steps: training as a line over its raw values, held-out with points."""
    width, height = LOSS
    points = [point for curve in losses.values() for point in curve]
    x = Scale(min(at for at, _ in points), max(at for at, _ in points), LEFT, width - RIGHT - 48)
    y = linear([value for _, value in points], height - BOTTOM, TOP)
    parts = [
        vertical_axis(y, LEFT, "Loss", _tick, x.end),
        horizontal_axis(x, y.start, "Optimizer step", _count, y.start),
    ]
    labels: list[tuple[float, str, str]] = []
    for name, curve in sorted(losses.items()):
        held_out = name.startswith("eval")
        path = [(x(at), y(value)) for at, value in curve]
        smooth = path if held_out or len(path) < 40 else _smooth(path)
        colour = "held-out" if held_out else "training"
        parts += [polyline(path, f"raw {colour}")] if smooth is not path else []
        parts.append(polyline(smooth, f"curve {colour}"))
        if held_out:
            parts += [
                dot(at, f"point {colour}", f"{name} {value:.4g}", 3.5)
                for at, (_, value) in zip(path, curve, strict=True)
            ]
        labels.append((smooth[-1][1], LOSS_LABELS.get(name, name), colour))
    parts += [text(x.end + 8, at + 4, label, f"end {colour}") for at, label, colour in _apart(labels)]
    return drawing(width, height, f"Loss of {step} over optimizer steps", *parts)


def small_chart(name: str, curve: Sequence[Point]) -> Markup:
    """Return one curve with its name, without an axis title."""
    width, height = SMALL
    x = Scale(curve[0][0], curve[-1][0], LEFT, width - RIGHT)
    y = linear([value for _, value in curve], height - 24, TOP)
    parts = [
        vertical_axis(y, LEFT, name.replace("_", " ").capitalize(), _tick, x.end),
        polyline([(x(at), y(value)) for at, value in curve], "curve other"),
    ]
    return drawing(width, height, f"{name} over optimizer steps", *parts)


def quality_chart(comparison: Comparison) -> Markup | None:
    """Return quality against size: a point a candidate, with its 95 % interval; None where either was not measured."""
    metric = quality_metric(comparison)
    shown = [each for each in comparison.candidates if metric and {metric.name, "size_bytes"} <= each.figures.keys()]
    if metric is None or not shown:
        return None
    sizes = [each.figures["size_bytes"].value for each in shown]
    quality = [each.figures[metric.name] for each in shown]
    ends = [end for figure in quality for end in (figure.value, *(figure.interval or ()))]
    x, (unit, divisor) = linear(sizes, LEFT, WIDTH - RIGHT, zero=True), units.size_unit(max(sizes))
    y = linear(ends, HEIGHT - BOTTOM, TOP)
    x_ticks = Scale(x.low / divisor, x.high / divisor, x.start, x.end)
    parts = [
        vertical_axis(y, LEFT, _axis(metric), _tick, x.end),
        horizontal_axis(x_ticks, y.start, f"Size, {unit}", _count, y.end),
    ]
    points = [(x(size), y(figure.value)) for size, figure in zip(sizes, quality, strict=True)]
    for candidate, figure, (across, down) in zip(shown, quality, points, strict=True):
        if figure.interval:
            parts.append(
                line((across, y(figure.interval[0])), (across, y(figure.interval[1])), f"interval {candidate.colour}")
            )
        size = candidate.figures["size_bytes"].text
        parts.append(dot((across, down), f"point {candidate.colour}", f"{candidate.name}: {figure.text}, {size}"))
    labels = [each.name for each in shown]
    parts += [
        text(left, baseline, label, "label", anchor)
        for label, (left, baseline, anchor) in zip(labels, place_labels(points, labels, WIDTH), strict=True)
    ]
    return drawing(WIDTH, HEIGHT, f"{metric.label} against size", *parts)


def drift_chart(comparison: Comparison) -> Markup | None:
    """Return each candidate's KL divergence from the reference on a logarithmic axis; None where none was measured."""
    title = f"KL divergence from {comparison.reference.name}, nats a token (log scale)"
    return _bars(comparison, "kl", title, lambda ends, left, right: logarithmic(ends, left, right, KL_FLOOR), "{:g}")


def accuracy_chart(comparison: Comparison) -> Markup | None:
    """Return each candidate's share of tasks solved with its 95 % interval; None where none was measured."""
    title = "Share of tasks solved, 95 % interval"
    return _bars(comparison, "accuracy", title, lambda _, left, right: Scale(0.0, 1.0, left, right), "{:.0%}")


def _bars(
    comparison: Comparison, name: str, title: str, scale: Callable[[list[float], float, float], Scale], tick: str
) -> Markup | None:
    """Return a bar a candidate with its interval, below one another; None where the metric was not measured."""
    shown = [each for each in comparison.candidates if name in each.figures]
    if not shown:
        return None
    left = 14 + LETTER * min(24, max(len(each.name) for each in shown))
    figures = [each.figures[name] for each in shown]
    x = scale([end for figure in figures for end in (figure.value, *(figure.interval or ()))], left, WIDTH - 76)
    height = max(HEIGHT, TOP + BOTTOM + 24 * len(shown))
    bottom = height - BOTTOM
    parts = [horizontal_axis(x, bottom, "", tick.format, TOP), text(0, TOP - 12, title, "axis")]
    apart = (bottom - TOP) / len(shown)
    for index, (candidate, figure) in enumerate(zip(shown, figures, strict=True)):
        parts += _bar(candidate, figure, x, TOP + apart * (index + 0.5), min(22.0, apart * 0.55))
    return drawing(WIDTH, height, title, *parts)


def _bar(candidate: Candidate, figure: Figure, x: Scale, y: float, thick: float) -> Iterator[Markup]:
    at, end = x(figure.value), x(max(figure.interval or (figure.value,)))
    name = candidate.name if len(candidate.name) <= 24 else candidate.name[:23] + "\N{HORIZONTAL ELLIPSIS}"
    yield text(x.start - 12, y + 4, name, "label", "end")
    yield line((x.start, y), (max(at, x.start + 2), y), f"bar {candidate.colour}")
    if figure.interval:
        yield line((x(figure.interval[0]), y), (end, y), "whisker")
        yield from (line((x(edge), y - thick / 4), (x(edge), y + thick / 4), "whisker") for edge in figure.interval)
    yield text(max(at, end) + 9, y + 4, figure.text, "label strong")


def budget_chart(comparison: Comparison) -> Markup | None:
    """Return accuracy over the thinking budget, a line a candidate; None where there was one budget."""
    if not comparison.budgets:
        return None
    labels = [point.label for point in max(comparison.budgets.values(), key=len)]
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    x = Scale(0.0, max(1, len(labels) - 1), LEFT + 24, WIDTH - RIGHT - 60)
    title = "Share of tasks solved by thinking budget, tokens"
    parts = [vertical_axis(y, LEFT, title, "{:.0%}".format, WIDTH - RIGHT)]
    parts += [text(x(place), y.start + 17, label, "tick", "middle") for place, label in enumerate(labels)]
    ends: list[tuple[float, str, str]] = []
    for candidate in comparison.candidates:
        points = comparison.budgets.get(candidate.name, ())
        path = [(x(place), y(point.value)) for place, point in enumerate(points)]
        parts.append(polyline(path, f"curve own {candidate.colour}"))
        for (across, down), point in zip(path, points, strict=True):
            low, high = point.interval
            parts.append(line((across, y(low)), (across, y(high)), f"interval {candidate.colour}"))
            note = f"{candidate.name}, {point.label}: {units.percent(point.value)}"
            parts.append(dot((across, down), f"point {candidate.colour}", note))
        ends += [(path[-1][1], candidate.name, "label")] if path else []
    parts += [text(x.end + 10, at + 4, label, class_) for at, label, class_ in _apart(ends)]
    return drawing(WIDTH, HEIGHT, title, *parts)


def quality_metric(comparison: Comparison) -> Metric | None:
    """Return the metric that stands for quality: the answer score, else perplexity."""
    by_name = {metric.name: metric for metric in comparison.metrics}
    return by_name.get("answer_score") or by_name.get("perplexity")


def _axis(metric: Metric) -> str:
    return f"{metric.label} ({'higher' if metric.better > 0 else 'lower'} is better, 95 % interval)"


def _smooth(path: Sequence[Point]) -> list[Point]:
    """Return the moving average over a tenth of the curve, centred so that it does not lag."""
    smooth, reach = [], len(path) // 20
    for index, (x, _) in enumerate(path):
        window = path[max(0, index - reach) : index + reach + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _apart(labels: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move labels at a curve's end down until they stand at least a line apart."""
    placed: list[tuple[float, str, str]] = []
    for at, label, colour in sorted(labels):
        placed.append((max(at, placed[-1][0] + 14) if placed else at, label, colour))
    return placed


def _count(value: float) -> str:
    return f"{value:,.6g}"


def _tick(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 0.001 else f"{value:.4g}"
