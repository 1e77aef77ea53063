"""The report's pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"rouge_l": "answers: ROUGE-L F", "exact": "answers: exact match"}


def quality_against_size(content: Mapping[str, Any]) -> "Figure":
    """Plot perplexity (lower is better) and answer score (higher is better) over the size of the weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, content, "perplexity")
    left.set_title("perplexity of held-out answers")
    _scatter(right, content, "answer_score")
    right.set_title(_TITLES[content["score"]])
    return figure


def divergence(content: Mapping[str, Any]) -> "Figure":
    """Draw a bar per candidate: its mean KL divergence from the reference."""
    from matplotlib.figure import Figure

    bars = {name: metrics["kl"] for name, metrics in content["candidates"].items() if "kl" in metrics}
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), list(bars.values()), color="#4878a8")
    axes.bar_label(drawn, fmt="%.4f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"KL({content['reference']} || model), nats per answer token")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scatter(axes: "Axes", content: Mapping[str, Any], metric: str) -> None:
    for name, metrics in content["candidates"].items():
        if metric not in metrics:
            continue
        x, y = metrics["size_bytes"] / 1e6, metrics[metric]
        low, high = content["intervals"][name][metric]
        color = "#b04030" if name == content["reference"] else "#4878a8"
        axes.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", capsize=3, color=color)
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("weights, MB (95 % bootstrap interval)")
    axes.set_xlim(0, 1.25 * max(metrics["size_bytes"] for metrics in content["candidates"].values()) / 1e6)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
