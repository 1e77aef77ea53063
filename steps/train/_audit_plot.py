"""The picture of a reinforcement learning run: rewards, lengths, entropy and ratios over the steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "accuracy": {"accuracy": "sampled", "held_out": "held out, greedy"},
    "length in tokens": {"length/mean": "mean", "length/right": "right", "length/wrong": "wrong"},
    "share of answers": {
        "truncated": "truncated",
        "repetition": "repeated text",
        "hacking/rewarded_wrong": "rewarded, wrong",
    },
    "share of groups": {"groups/zero_variance": "zero variance", "groups/distinct": "distinct answers"},
    "entropy and divergence": {"entropy": "entropy", "kl": "KL to reference"},
    "importance ratio": {"ratio/mean": "mean", "ratio/p99": "99th percentile", "ratio/max": "largest"},
}


def audit_figure(
    history: Sequence[Mapping[str, float]], held_out: Sequence[tuple[int, float]], rewards: Sequence[str]
) -> "Figure":
    """Draw one panel a question; a panel whose metrics were never logged is left out.

    Args:
        history: metrics by step; each mapping holds its `step`.
        held_out: step and score of each look at the held-out tasks; the best is marked in every panel.
        rewards: names of the rewards, drawn beside each other: format may rise while accuracy does not.
    """
    from matplotlib.figure import Figure

    panels = {"rewards": {f"reward/{name}": name for name in rewards}, **_PANELS}
    shown = {title: lines for title, lines in panels.items() if any(key in row for row in history for key in lines)}
    figure = Figure(figsize=(11, 2.6 * ((len(shown) + 1) // 2)), layout="constrained")
    all_axes = figure.subplots((len(shown) + 1) // 2, 2, squeeze=False).flatten().tolist()
    best = max(held_out, key=lambda each: (each[1], -each[0]))[0] if held_out else None
    for axes, (title, lines) in zip(all_axes, shown.items(), strict=False):
        for key, label in lines.items():
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=label, marker="o" if len(points) < 12 else None, markersize=3)
        if best is not None:
            axes.axvline(best, color="0.6", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    for axes in all_axes[len(shown) :]:
        axes.set_visible(False)
    return figure
