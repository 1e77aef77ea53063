"""A comparison read for people: figures with intervals, differences to the reference, and which are real.

The figures are those of the Report artifact. Their uncertainty comes from its rows by a paired bootstrap: samples are
drawn with replacement, the same for every candidate, so that what all find hard cancels out of a difference (Efron
and Tibshirani, 1993; for language tasks Koehn, 2004, https://aclanthology.org/W04-3250).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.report import units
from flows.report.run import RunReport

DRAWS = 2000
"""Bootstrap resamples."""
Range = tuple[float, float]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a figure of a candidate is read and written."""

    name: str
    """As in `summary.json`."""
    label: str
    better: int
    """1 where more is better, -1 where less is."""
    write: Callable[[float], str]
    difference: Callable[[float], str]
    """Writes the difference to the reference."""
    relative: bool
    """The difference is relative, value / reference - 1."""
    column: str = ""
    """The row's column whose mean it is; none for figures of a whole candidate."""
    exponential: bool = False
    """It is the exponential of that mean."""
    weighted: bool = False
    """Rows count by their answer tokens."""
    distance: bool = False
    """It measures against the reference, which therefore has none."""


METRICS = (
    Metric("answer_score", "Answer score", 1, units.fixed, units.signed, False, "score"),
    Metric(
        "perplexity", "Perplexity", -1, units.significant, units.signed_percent, True, "nll", exponential=True, weighted=True
    ),
    Metric("kl", "KL to reference", -1, units.significant, units.signed, False, "kl", weighted=True, distance=True),
    Metric("top1_agreement", "Top-1 agreement", 1, units.percent, units.signed, False, "top1", weighted=True, distance=True),
    Metric("size_bytes", "Size", -1, units.size, units.factor, True),
    Metric("tokens_per_second", "Tokens/s", 1, units.significant, units.factor, True),
    Metric("peak_memory_bytes", "Peak memory", -1, units.size, units.factor, True),
)


@dataclass(frozen=True)
class Figure:
    """One metric of one candidate."""

    metric: Metric
    value: float
    interval: Range | None = None
    """95 % interval of the value."""
    difference: float | None = None
    """To the reference; None for the reference itself."""
    verdict: str = ""
    """`better` or `worse` where the 95 % interval of the difference leaves out zero, else `even`; empty where the
    samples say nothing about it."""
    best: bool = False

    @property
    def text(self) -> str:
        """The value as written in the table."""
        return self.metric.write(self.value)

    @property
    def interval_text(self) -> str:
        """The interval as written in the table, or nothing."""
        return f"{self.metric.write(self.interval[0])} to {self.metric.write(self.interval[1])}" if self.interval else ""

    @property
    def difference_text(self) -> str:
        """The difference as written in the table, or nothing."""
        return "" if self.difference is None else self.metric.difference(self.difference)


@dataclass(frozen=True)
class Candidate:
    """One model of a comparison."""

    name: str
    role: str
    """`reference`, `base` (the model before training) or `member`."""
    colour: str
    """Class that carries its colour through the page."""
    figures: Mapping[str, Figure]
    """By metric name; a metric that was not measured is absent."""


@dataclass(frozen=True)
class Comparison:
    """What one comparing step found."""

    step: str
    reference: Candidate
    candidates: Sequence[Candidate]
    """The base first, then the reference, then the others."""
    rows: Mapping[str, Mapping[str, Row]]
    """By sample, then by candidate."""

    @property
    def base(self) -> Candidate | None:
        """The model before training, if it was compared."""
        return next((candidate for candidate in self.candidates if candidate.role == "base"), None)

    @property
    def metrics(self) -> list[Metric]:
        """What was measured for any candidate."""
        return [metric for metric in METRICS if any(metric.name in each.figures for each in self.candidates)]


def read_comparisons(run: RunReport) -> list[Comparison]:
    """Read a run's comparisons, in the order of its steps."""
    timings = {step.name: step.metrics for step in run.steps}
    order = [step.name for step in run.steps if step.name in run.comparisons]
    return [read_comparison(name, run.comparisons[name], timings[name]) for name in order]


def read_comparison(step: str, folder: Path, step_metrics: Mapping[str, float]) -> Comparison:
    """Read one Report artifact; figures that are no part of it (speed, memory) come from the step's metrics."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    values: dict[str, dict[str, float]] = {name: dict(found) for name, found in summary["candidates"].items()}
    for key, value in step_metrics.items():
        name, _, metric = key.rpartition("/")
        if name in values:
            values[name].setdefault(metric, value)
    rows: dict[str, dict[str, Row]] = {}
    for row in _read_rows(folder / "rows.jsonl"):
        rows.setdefault(row["sample"], {})[row["candidate"]] = row
    reference = summary["reference"]
    values.setdefault(reference, {})
    names = sorted(values, key=lambda name: (name != "base", name != reference))
    draws = _Draws(rows, names)
    figures = {name: dict(_figures(name, reference, values, draws)) for name in names}
    _mark_best(figures)
    candidates = [
        Candidate(name, _role(name, reference), f"c{index}", figures[name])
        for index, name in enumerate(names, start=0 if "base" in names else 1)
    ]
    return Comparison(step, next(each for each in candidates if each.name == reference), candidates, rows)


def _read_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _role(name: str, reference: str) -> str:
    return "reference" if name == reference else "base" if name == "base" else "member"


def _figures(
    name: str, reference: str, values: Mapping[str, Mapping[str, float | None]], draws: "_Draws"
) -> Iterator[tuple[str, Figure]]:
    for metric in METRICS:
        value, anchor = values[name].get(metric.name), values[reference].get(metric.name)
        if value is None or (metric.distance and name == reference):
            continue
        interval = draws.interval(name, metric)
        if name == reference or metric.distance or anchor is None or (metric.relative and not anchor):
            yield metric.name, Figure(metric, value, interval)
            continue
        difference = value / anchor - 1 if metric.relative else value - anchor
        verdict = draws.verdict(name, reference, metric)
        yield metric.name, Figure(metric, value, interval, difference, verdict)


def _mark_best(figures: dict[str, dict[str, Figure]]) -> None:
    """Mark, for each metric, every candidate whose written value is the best one."""
    for metric in METRICS:
        found = {name: own[metric.name] for name, own in figures.items() if metric.name in own}
        if len(found) < 2:
            continue
        best = max(found.values(), key=lambda figure: metric.better * figure.value).text
        for name, figure in found.items():
            if figure.text == best:
                figures[name][metric.name] = Figure(
                    metric, figure.value, figure.interval, figure.difference, figure.verdict, best=True
                )


class _Draws:
    """Bootstrap means of the rows' columns over the samples that every candidate answered."""

    def __init__(self, rows: Mapping[str, Mapping[str, Row]], names: Sequence[str]) -> None:
        import numpy as np

        shared = [own for own in rows.values() if all(name in own for name in names)]
        self._rows = {name: [own[name] for own in shared] for name in names}
        generator, count = np.random.default_rng(0), len(shared)
        drawn = [np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(DRAWS if count else 0)]
        self._counts = np.array(drawn, dtype=np.float32)
        """How often each draw (first axis) holds each sample (second axis)."""
        self._known: dict[tuple[str, str], Any] = {}

    def interval(self, name: str, metric: Metric) -> Range | None:
        """Return the 95 % interval of a candidate's figure, None where the rows do not give it."""
        means = self._means(name, metric)
        return None if means is None else _middle(means)

    def verdict(self, name: str, reference: str, metric: Metric) -> str:
        """Say whether the difference to the reference is real."""
        own, other = self._means(name, metric), self._means(reference, metric)
        if own is None or other is None:
            return ""
        low, high = sorted(metric.better * end for end in _middle(own - other))
        return "better" if low > 0 else "worse" if high < 0 else "even"

    def _means(self, name: str, metric: Metric) -> Any:
        """Return the figure of each draw, shape (DRAWS,); None where a row lacks the column or samples are too few."""
        import numpy as np

        if (name, metric.name) not in self._known:
            column = [row.get(metric.column) for row in self._rows[name]]
            means = None
            if metric.column and len(column) > 1 and None not in column:
                weights = np.array([row["tokens"] if metric.weighted else 1 for row in self._rows[name]], dtype=np.float32)
                shares = self._counts @ (weights * np.array(column, dtype=np.float32)) / (self._counts @ weights)
                means = np.exp(shares) if metric.exponential else shares
                means = means if np.isfinite(means).all() else None
            self._known[name, metric.name] = means
        return self._known[name, metric.name]


def _middle(means: Any) -> Range:
    import numpy as np

    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
