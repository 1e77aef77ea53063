"""A comparison read for people: figures with intervals, differences to the reference, and which are real.

The figures are those of the Report artifact. Their uncertainty comes from its rows by a paired bootstrap: samples are
drawn with replacement, the same for every candidate, so that what all find hard cancels out of a difference (Efron
and Tibshirani, 1993; for language tasks Koehn, 2004, https://aclanthology.org/W04-3250).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import units
from flows.report.run import RunReport

DRAWS = 2000
"""Bootstrap resamples."""
_SHARES = ("score", "top1")
"""Columns of which a sample's value lies between 0 and 1."""
SCORES = {"rouge_l": "ROUGE-L F (0 to 1)", "exact": "the share of exact answers"}
"""What an answer score is, by its name in `summary.json`."""
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
    Metric("accuracy", "Accuracy", 1, units.percent, units.signed, False, "score"),
    Metric("majority", "Majority vote", 1, units.percent, units.signed, False),
    Metric("truncated", "Cut off", -1, units.percent, units.signed, False),
    Metric("answer_score", "Answer score", 1, units.fixed, units.signed, False, "score"),
    Metric("stopped", "Ends by itself", 1, units.percent, units.signed, False, "stopped"),
    Metric(
        "perplexity",
        "Perplexity",
        -1,
        units.significant,
        units.signed_percent,
        True,
        "nll",
        exponential=True,
        weighted=True,
    ),
    Metric("kl", "KL to reference", -1, units.significant, units.signed, False, "kl", weighted=True, distance=True),
    Metric(
        "top1_agreement", "Top-1 agreement", 1, units.percent, units.signed, False, "top1", weighted=True, distance=True
    ),
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
        return (
            f"{self.metric.write(self.interval[0])} to {self.metric.write(self.interval[1])}" if self.interval else ""
        )

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
class BudgetPoint:
    """A candidate's accuracy at one thinking budget."""

    label: str
    """The budget in tokens, or `no limit`."""
    value: float
    interval: Range
    """95 % interval of the value."""


@dataclass(frozen=True)
class Comparison:
    """What one comparing step found."""

    step: str
    reference: Candidate
    candidates: Sequence[Candidate]
    """The base first, then the reference, then the others."""
    rows: Mapping[str, Mapping[str, Row]]
    """By sample, then by candidate."""
    score: str = ""
    """What the answer score is, or what verified the answers, as part of a sentence."""
    budgets: Mapping[str, Sequence[BudgetPoint]] = field(default_factory=dict)
    """By candidate, where several thinking budgets were evaluated."""
    notes: Sequence[str] = ()
    """What must be known beside the figures, a sentence each."""

    @property
    def base(self) -> Candidate | None:
        """The model before training, if it was compared."""
        return next((candidate for candidate in self.candidates if candidate.role == "base"), None)

    @property
    def answered(self) -> dict[str, Mapping[str, Row]]:
        """Those of `rows` that every candidate was asked to answer."""
        names = [each.name for each in self.candidates]
        return {
            sample: own
            for sample, own in self.rows.items()
            if all(name in own and own[name]["answer"] is not None for name in names)
        }

    @property
    def metrics(self) -> list[Metric]:
        """What was measured for any candidate."""
        return [metric for metric in METRICS if any(metric.name in each.figures for each in self.candidates)]


def read_comparisons(run: RunReport) -> list[Comparison]:
    """Read a run's comparisons, in the order of its steps."""
    timings = {step.name: step.metrics for step in run.steps}
    order = [step.name for step in run.steps if step.name in run.comparisons]
    return [read_comparison(name, run.comparisons[name], timings[name]) for name in order]


def read_notes(run: RunReport) -> list[str]:
    """Return what must be known of a run's results and beside the figures of its comparisons, `STEP: ...` each."""
    found = [f"{step.name}: {note}" for step in run.steps for note in step.notes]
    for name, folder in run.comparisons.items():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found += [f"{name}: {note}" for note in summary.get("notes", ())]
    return found


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
        Candidate(name, _role(name, reference), _colour(name, index), figures[name])
        for index, name in enumerate(names, start=0 if "base" in names else 1)
    ]
    tuned = next(each for each in candidates if each.name == reference)
    return Comparison(
        step, tuned, candidates, rows, _score(summary, values), _budgets(summary), summary.get("notes", ())
    )


def _score(summary: Mapping[str, Any], values: Mapping[str, Mapping[str, float]]) -> str:
    """Say what an answer is judged by; nothing where the summary does not tell."""
    name = summary.get("score", "")
    if any("accuracy" in own for own in values.values()):
        return f"right is what {name} says" if name else ""
    return f"answer score is {SCORES[name]}" if name in SCORES else ""


def _budgets(summary: Mapping[str, Any]) -> dict[str, list[BudgetPoint]]:
    def point(found: Mapping[str, Any]) -> BudgetPoint:
        tokens, (low, high) = found["thinking_tokens"], found["interval"]
        return BudgetPoint("no limit" if tokens is None else f"{tokens:,}", found["accuracy"], (low, high))

    return {name: [point(each) for each in points] for name, points in summary.get("budgets", {}).items()}


def _read_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _role(name: str, reference: str) -> str:
    return "reference" if name == reference else "base" if name == "base" else "member"


def _colour(name: str, index: int) -> str:
    """Grey for the base, else one of the seven colours in turn."""
    return "c0" if name == "base" else f"c{1 + (index - 1) % 7}"


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
    """Bootstrap means of the rows' columns over the samples that all candidates share."""

    def __init__(self, rows: Mapping[str, Mapping[str, Row]], names: Sequence[str]) -> None:
        self._shared = [own for own in rows.values() if all(name in own for name in names)]
        self._names = names
        self._means: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], list[float]] = {}
        self._counts: dict[int, Any] = {}

    def interval(self, name: str, metric: Metric) -> Range | None:
        """Return the 95 % interval of a candidate's figure, None where the rows do not give it.

        Where every sample is simply right or wrong, or all are alike, it is that of a share: a bootstrap of eight right
        answers in eight has no width.
        """
        means = self._figure(name, metric)
        if means is None:
            return None
        values = self._values[name, metric.name]
        if metric.column in _SHARES and (set(values) <= {0, 1} or (len(set(values)) == 1 and 0 <= values[0] <= 1)):
            from steps.lm.scoring import wilson_interval

            return wilson_interval(sum(values) / len(values), len(values))
        return _middle(means)

    def verdict(self, name: str, reference: str, metric: Metric) -> str:
        """Say whether the difference to the reference is real."""
        own, other = self._figure(name, metric), self._figure(reference, metric)
        if own is None or other is None:
            return ""
        low, high = sorted(metric.better * end for end in _middle(own - other))
        return "better" if low > 0 else "worse" if high < 0 else "even"

    def _figure(self, name: str, metric: Metric) -> Any:
        """Return the figure of each draw, shape (DRAWS,), None where the rows do not give it."""
        if (name, metric.name) not in self._means:
            self._means[name, metric.name] = self._drawn(name, metric) if metric.column else None
        return self._means[name, metric.name]

    def _drawn(self, name: str, metric: Metric) -> Any:
        import numpy as np

        column = metric.column
        # Only some samples are answered, and a reference has no distance to itself.
        measured = [each for each in self._names if any(own[each].get(column) is not None for own in self._shared)]
        rows = [own[name] for own in self._shared if all(own[each].get(column) is not None for each in measured)]
        if name not in measured or len(rows) < 2:
            return None
        self._values[name, metric.name] = [float(row[column]) for row in rows]
        values = np.array(self._values[name, metric.name], dtype=np.float32)
        weights = np.array([row["tokens"] if metric.weighted else 1 for row in rows], dtype=np.float32)
        counts = self._counted(len(rows))
        means = counts @ (weights * values) / (counts @ weights)
        return np.exp(means) if metric.exponential else means

    def _counted(self, samples: int) -> Any:
        """Return how often each draw (first axis) holds each sample (second axis)."""
        import numpy as np

        if samples not in self._counts:
            generator = np.random.default_rng(0)
            picks = (generator.integers(0, samples, samples) for _ in range(DRAWS))
            self._counts[samples] = np.array([np.bincount(each, minlength=samples) for each in picks], dtype=np.float32)
        return self._counts[samples]


def _middle(means: Any) -> Range:
    import numpy as np

    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
