"""The report of solved tasks: summary, table, figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steps.frame import Job

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = Mapping[str, Mapping[int | None, Mapping[str, float]]]
"""Figures by candidate and thinking budget."""


def summary(verifier: str, tasks: int, samples: int, last: int | None, measured: Measured) -> dict[str, Any]:
    """Return the content of `summary.json`; the first candidate is the reference."""
    content: dict[str, Any] = {
        "reference": next(iter(measured)),
        "score": verifier,
        "rows": tasks,
        "samples": samples,
        "candidates": {name: _plain(own[last]) for name, own in measured.items()},
        "intervals": {name: {"accuracy": _interval(own[last])} for name, own in measured.items()},
    }
    if any(len(own) > 1 for own in measured.values()):
        content["budgets"] = {
            name: [
                {"thinking_tokens": budget, **_plain(values), "interval": _interval(values)}
                for budget, values in own.items()
            ]
            for name, own in measured.items()
        }
    return content


def table(content: Mapping[str, Any]) -> str:
    """Return `summary.json`'s figures as a Markdown table, the reference first."""
    several = content["samples"] > 1
    head = ["model", "accuracy", *([f"maj@{content['samples']}"] if several else []), "tokens", "truncated", "p"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, metrics in content["candidates"].items():
        low, high = content["intervals"][name]["accuracy"]
        cells = [
            name,
            f"{metrics['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            *([f"{metrics['majority']:.1%}"] if several else []),
            f"{metrics['mean_tokens']:.1f}",
            f"{metrics['truncated']:.1%}",
            f"{metrics['p_value']:.2g}" if "p_value" in metrics else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{content['rows']} tasks, verified by `{content['score']}`; in brackets 95 % intervals over the tasks "
        f"(Wilson's for one answer a task, else a bootstrap); p is that of an exact sign test against "
        f"{content['reference']}, task by task, corrected for the number of candidates (Holm)."
    )
    return "\n".join([*lines, "", *(f"{each}.\n" for each in (*content["notes"], note.removesuffix(".")))])


def draw(content: Mapping[str, Any], job: Job) -> None:
    """Log the figures: accuracy by candidate, and by thinking budget where there are several."""
    job.log_figure("accuracy", accuracy(content))
    if "budgets" in content:
        job.log_figure("thinking_budget", accuracy_by_budget(content))


def accuracy(content: Mapping[str, Any]) -> "Figure":
    """Draw a bar per candidate with its 95 % interval."""
    from matplotlib.figure import Figure

    names = list(content["candidates"])
    values = [content["candidates"][name]["accuracy"] for name in names]
    ends = [content["intervals"][name]["accuracy"] for name in names]
    reach = [[max(0, value - low) for value, (low, _) in zip(values, ends, strict=True)]]
    reach.append([max(0, high - value) for value, (_, high) in zip(values, ends, strict=True)])
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, values, xerr=reach, capsize=3, color="#4878a8", ecolor="#30404f")
    axes.invert_yaxis()
    axes.set(xlabel=f"share of {content['rows']} tasks solved (95 % interval)", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy_by_budget(content: Mapping[str, Any]) -> "Figure":
    """Draw accuracy over the thinking budget, a line per candidate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels: list[str] = []
    for name, points in content["budgets"].items():
        values = [point["accuracy"] for point in points]
        low = [max(0, point["accuracy"] - point["interval"][0]) for point in points]
        high = [max(0, point["interval"][1] - point["accuracy"]) for point in points]
        axes.errorbar(range(len(points)), values, yerr=[low, high], marker="o", capsize=3, label=name)
        labels = ["no limit" if point["thinking_tokens"] is None else str(point["thinking_tokens"]) for point in points]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="thinking budget, tokens", ylabel="share of tasks solved (95 % interval)", ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in ("accuracy_low", "accuracy_high")}


def _interval(metrics: Mapping[str, float]) -> list[float]:
    return [metrics["accuracy_low"], metrics["accuracy_high"]]
