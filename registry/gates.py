"""Gates: statistical conditions under which a candidate becomes champion."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.bootstrap import paired_bootstrap
from registry.errors import RegistryError, nearest
from steps.artifacts import Report

FEWEST_SAMPLES = 10
"""Below this many common samples a paired test says nothing and the gate does not hold."""

Row = Mapping[str, Any]
"""A row of a comparison report: `sample`, `candidate`, `score`, `nll`, `tokens`."""


class Gate(BaseModel):
    """One condition. Either against the champion, on the same samples, or a bound on a headline metric, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str = Field(pattern=r"^[^.].*\.[a-z0-9_]+$")
    """`STEP.METRIC`: a report step of the recipe and one of its metrics, e.g. `quality.answer_score`."""
    member: str | None = None
    """Published step that is judged, named as in `members`; a matrix step stands for each of its members. Default: the
    first member."""
    against: Literal["champion"] | None = None
    """Compare with the family's champion, sample by sample: what the rows say of a model by itself. A distance to the
    report's reference (`kl`, `top1_agreement`) takes a bound."""
    test: Literal["paired_bootstrap"] = "paired_bootstrap"
    """Bootstrap over samples with 10,000 resamples (Koehn 2004, https://aclanthology.org/W04-3250/)."""
    no_worse_by: float = Field(default=0.0, ge=0)
    """Largest loss against the champion, in the metric's unit, that must be ruled out."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence with which it must be ruled out (one-sided)."""
    at_most: float | None = None
    """Upper bound of the metric."""
    at_least: float | None = None
    """Lower bound of the metric."""

    @model_validator(mode="after")
    def _has_condition(self) -> Self:
        if self.against is None and self.at_most is None and self.at_least is None:
            raise ValueError("give one of `against: champion`, `at_most`, `at_least`")
        if self.against is None and self.no_worse_by:
            raise ValueError("`no_worse_by` needs `against: champion`")
        return self

    @property
    def step(self) -> str:
        """The report step."""
        return self.metric.rpartition(".")[0]

    @property
    def written_name(self) -> str:
        """The metric's name within the report, as the recipe has it."""
        return self.metric.rpartition(".")[2]

    @property
    def name(self) -> str:
        """The metric's name within the report, by its common aliases."""
        name = self.written_name
        return {"kl_to_reference": "kl", "score": "answer_score", "top1": "top1_agreement"}.get(name, name)


class Evidence(BaseModel):
    """What one report says: headline metrics named `CANDIDATE/METRIC`, and its rows by candidate."""

    model_config = ConfigDict(frozen=True)

    metrics: Mapping[str, float]
    rows: Mapping[str, tuple[dict[str, Any], ...]] = {}
    digest: str = ""
    """Of the report."""

    @classmethod
    def of(cls, report: Report) -> Self:
        """Read a report artifact."""
        rows: dict[str, list[dict[str, Any]]] = {}
        with report.rows_file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                # Prompts and answers are not judged; a large report would fill the memory with them.
                kept = {name: row.get(name) for name in _JUDGED}
                rows.setdefault(row["candidate"], []).append(kept)
        by_candidate = {name: tuple(each) for name, each in rows.items()}
        return cls(metrics=report.facts.metrics, rows=by_candidate, digest=report.digest)


class GateOutcome(BaseModel):
    """What one gate says of one member."""

    # A perplexity may be no number at all; JSON has words for that only as strings.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    gate: Gate
    member: str
    passed: bool
    value: float | None
    """The candidate's value of the metric."""
    champion: float | None = None
    """The champion's value on the same samples."""
    difference: float | None = None
    """Candidate minus champion."""
    interval: tuple[float, float] | None = None
    """Bounds of the difference; each holds with the gate's confidence."""
    samples: int = 0
    """Samples compared."""
    sentence: str


class GateDecision(BaseModel):
    """Whether a candidate may become champion, and why."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    promote: bool
    outcomes: tuple[GateOutcome, ...] = ()
    sentence: str
    against: int | None = None
    """Version of the champion that the candidate met; None where there was none to meet."""
    terms: str = ""
    """Digest of the gates, the members' names in order and the reports: what it was decided by, see `terms_of`."""

    @property
    def needs_champion(self) -> bool:
        """Whether it rests on a comparison with the champion, or on there being none."""
        return any(outcome.gate.against for outcome in self.outcomes)


class Statistic(NamedTuple):
    """How a metric is computed from rows: the mean of a field, weighted by another, then perhaps exponentiated."""

    field: str
    higher_is_better: bool
    weight: str | None = None
    exponential: bool = False


STATISTICS = {
    # No distance to the reference: the champion was made from another one, and is far from tonight's however good.
    "accuracy": Statistic("score", higher_is_better=True),
    "answer_score": Statistic("score", higher_is_better=True),
    "stopped": Statistic("stopped", higher_is_better=True),
    "nll": Statistic("nll", higher_is_better=False, weight="tokens"),
    "perplexity": Statistic("nll", higher_is_better=False, weight="tokens", exponential=True),
}
"""By metric: what a paired test can compare two models by."""
_JUDGED = ("sample", "tokens", *dict.fromkeys(statistic.field for statistic in STATISTICS.values()))
"""Fields of a row that a gate may need."""


def terms_of(gates: Sequence[Gate], members: Sequence[str], reports: Mapping[str, str]) -> str:
    """Return a digest of what a decision is made by: the gates, the published members in order, and the reports.

    Args:
        gates: as for `decide`.
        members: as for `decide`.
        reports: digest of the report that a gate reads, by its step.
    """
    terms: dict[str, Any] = {"gates": [gate.model_dump(mode="json") for gate in gates], "members": list(members)}
    terms["reports"] = dict(reports)
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def decide(
    gates: Sequence[Gate],
    members: Sequence[str],
    evidence: Mapping[str, Evidence],
    champion: Mapping[str, Evidence] | None = None,
    champion_members: Mapping[str, str] | None = None,
    shared: Collection[str] = (),
) -> GateDecision:
    """Judge all gates.

    Args:
        gates: the conditions, each on one member by its full name; with none every candidate is promoted.
        members: published steps, the principal one first.
        evidence: the new reports by step name.
        champion: reports of the champion by step name, None where the family has no champion.
        champion_members: name of a member in the champion's report where it differs (`merged` to `champion`).
        shared: members that are the champion's own, and so no worse than it.

    Raises:
        RegistryError: a gate names a step, member or metric that does not exist.
    """
    outcomes = []
    for gate in gates:
        if gate.step not in evidence:
            raise RegistryError(f"gate `{gate.metric}`: no report step `{gate.step}`{nearest(gate.step, evidence)}")
        member = members[0] if gate.member is None else gate.member
        if member not in members:
            raise RegistryError(f"gate `{gate.metric}`: no member `{member}`{nearest(member, members)}")
        theirs = None if champion is None else champion.get(gate.step, Evidence(metrics={}))
        meets = (champion_members or {}).get(member, member)
        if gate.against and member in shared:
            outcomes.append(_shared(gate, member, evidence[gate.step]))
            continue
        if theirs is evidence[gate.step] and meets == member and gate.against:
            raise RegistryError(f"gate `{gate.metric}`: `{member}` meets no member of the champion, only itself")
        outcomes.append(judge(gate, member, evidence[gate.step], theirs, meets))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        sentence = f"Not promoted: {failed[0].sentence}" + (f" ({len(failed)} gates fail)" if len(failed) > 1 else "")
    elif outcomes:
        sentence = f"Promoted: {_count(len(outcomes))} held. {outcomes[0].sentence}"
    else:
        sentence = "Promoted: the recipe declares no gates."
    terms = terms_of(gates, members, {step: each.digest for step, each in evidence.items()})
    return GateDecision(promote=not failed, outcomes=tuple(outcomes), sentence=sentence, terms=terms)


def judge(
    gate: Gate, member: str, evidence: Evidence, champion: Evidence | None = None, champion_name: str = ""
) -> GateOutcome:
    """Judge one gate for one member.

    Args:
        gate: the condition.
        member: the candidate's name in the report.
        evidence: the report.
        champion: the champion's report; None where there is no champion yet.
        champion_name: the champion's name in its report, the member's own by default.

    Raises:
        RegistryError: the report does not speak of the member, or not of the metric.
    """
    bounded = _bounds(gate, member, evidence)
    if gate.against is None or (bounded and not bounded.passed):
        assert bounded is not None  # a gate has a bound where it has no champion
        return bounded
    if champion is None:
        return GateOutcome(
            gate=gate,
            member=member,
            passed=True,
            value=evidence.metrics.get(f"{member}/{gate.name}"),
            sentence=f"`{member}` has no champion to be compared with in {gate.metric}: it is the first.",
        )
    return _compare(gate, member, evidence, champion, champion_name or member)


def _bounds(gate: Gate, member: str, evidence: Evidence) -> GateOutcome | None:
    if gate.at_most is None and gate.at_least is None:
        return None
    name = f"{member}/{gate.name}"
    value = evidence.metrics.get(name)
    if value is None:
        raise RegistryError(f"gate `{gate.metric}`: the report has no `{name}`{nearest(name, evidence.metrics)}")
    over = gate.at_most is not None and not value <= gate.at_most
    under = gate.at_least is not None and not value >= gate.at_least
    if over or under:
        wanted = f"at most {gate.at_most:g}" if over else f"at least {gate.at_least:g}"
        sentence = f"{gate.metric} of `{member}` is {value:.4g}, it must be {wanted}."
    else:
        sentence = f"{gate.metric} of `{member}` is {value:.4g}, within its bound."
    return GateOutcome(gate=gate, member=member, passed=not (over or under), value=value, sentence=sentence)


def _shared(gate: Gate, member: str, evidence: Evidence) -> GateOutcome:
    """Judge a member that the champion has, too: only a bound can fail."""
    bounded = _bounds(gate, member, evidence)
    if bounded and not bounded.passed:
        return bounded
    value = evidence.metrics.get(f"{member}/{gate.name}")
    sentence = f"`{member}` is the champion's own: equal in {gate.metric}."
    return GateOutcome(gate=gate, member=member, passed=True, value=value, champion=value, sentence=sentence)


def _compare(gate: Gate, member: str, evidence: Evidence, champion: Evidence, champion_name: str) -> GateOutcome:
    """Rule out, or not, that the candidate is worse than the champion by more than the margin."""
    if gate.name not in STATISTICS:
        near = nearest(gate.name, STATISTICS)
        raise RegistryError(f"gate `{gate.metric}`: no sample-by-sample test of `{gate.name}`{near}")
    statistic = STATISTICS[gate.name]
    if member not in evidence.rows:
        raise RegistryError(
            f"gate `{gate.metric}`: the report has no rows of `{member}`{nearest(member, evidence.rows)}"
        )
    pairs = _pairs(evidence.rows[member], champion.rows.get(champion_name, ()), statistic.field)
    broken = sum(not _finite(ours[statistic.field]) for ours, _ in pairs)
    refused = partial(GateOutcome, gate=gate, member=member, passed=False, value=None, samples=len(pairs))
    if broken:
        return refused(sentence=f"{gate.metric} of `{member}` has no value on {broken} of {len(pairs)} samples.")
    if len(pairs) < FEWEST_SAMPLES:
        return refused(
            sentence=f"{gate.metric} of `{member}` cannot be compared: {len(pairs)} samples in common with the "
            f"champion, at least {FEWEST_SAMPLES} are needed."
        )
    value, reference, low, high = _bootstrapped(pairs, statistic, gate.confidence)
    if not all(map(math.isfinite, (value, reference, low, high))):
        known = math.isfinite(value)
        return GateOutcome(
            gate=gate,
            member=member,
            passed=known and not math.isfinite(reference),
            value=value if known else None,
            samples=len(pairs),
            sentence=f"{gate.metric} of `{member}` is {value:.4g} against the champion's {reference:.4g}: "
            + ("the champion has no finite value." if known else "it is beyond what can be computed."),
        )
    loss = -low if statistic.higher_is_better else high
    passed = loss <= gate.no_worse_by + 1e-12
    return GateOutcome(
        gate=gate,
        member=member,
        passed=passed,
        value=value,
        champion=reference,
        difference=value - reference,
        interval=(low, high),
        samples=len(pairs),
        sentence=f"{gate.metric} of `{member}` is {value:.4g} against the champion's {reference:.4g} on {len(pairs)} "
        f"samples: {'not' if passed else 'perhaps'} worse by more than {gate.no_worse_by:g} "
        f"(difference {value - reference:+.4g}, between {low:+.4g} and {high:+.4g}).",
    )


def _pairs(ours: Sequence[Row], theirs: Sequence[Row], field: str) -> list[tuple[Row, Row]]:
    """Return candidate and champion rows of the samples on which the champion has a value.

    A candidate's null says that the sample was not asked for, as only some rows are answered; NaN is a value.
    """
    by_sample = {row["sample"]: row for row in theirs if _finite(row[field])}
    return [(row, by_sample[row["sample"]]) for row in ours if row["sample"] in by_sample and row[field] is not None]


def _bootstrapped(
    pairs: Sequence[tuple[Row, Row]], statistic: Statistic, confidence: float
) -> tuple[float, float, float, float]:
    import numpy as np

    values = np.array([[row[statistic.field] for row in pair] for pair in pairs], dtype=np.float64)
    weights = np.ones_like(values)
    if statistic.weight:
        weights = np.array([[row[statistic.weight] for row in pair] for pair in pairs], dtype=np.float64)
    return paired_bootstrap(values, weights, confidence, exponential=statistic.exponential)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _count(gates: int) -> str:
    return "the one gate" if gates == 1 else f"all {gates} gates"
