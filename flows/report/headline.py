"""What came out, in a sentence: the first thing a reader of the report wants to know."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.report.comparison import Candidate, Comparison, Figure
from flows.report.run import RunReport
from flows.units import duration, fixed, percent

WRONG = ("failed", "refused")
TOLD = ("answer_score", "perplexity")
"""Metrics of the sentence on a comparison of likeness; one of solved tasks tells the accuracy."""


@dataclass(frozen=True)
class Headline:
    """The outcome of a run."""

    outcome: str
    """The one sentence."""
    more: Sequence[str]
    """What else matters, a sentence each."""
    good: bool
    """No step went wrong."""


@dataclass(frozen=True)
class Tile:
    """A figure worth large type."""

    label: str
    value: str
    note: str


def headline(run: RunReport, comparisons: Sequence[Comparison]) -> Headline:
    """Return the outcome: what went wrong first, then what the comparison says."""
    chosen = _chosen(run)
    sayings = (_solved(each, chosen) or _against_base(each) or _plain(each) for each in comparisons)
    told = next((sentence for sentence in sayings if sentence), "")
    sentences = [sentence for sentence in (told, *(_members(each) for each in comparisons)) if sentence]
    wrong = [step.name for step in run.steps if step.status in WRONG]
    if wrong:
        many = "One step" if len(wrong) == 1 else f"{len(wrong)} steps"
        return Headline(f"{many} of {len(run.steps)} failed: {', '.join(wrong)}", sentences, False)
    if sentences:
        return Headline(sentences[0], sentences[1:], True)
    return Headline(f"All {len(run.steps)} steps are done in {duration(run.seconds)}", [], True)


def tiles(run: RunReport, comparisons: Sequence[Comparison]) -> list[Tile]:
    """Return the figures for the top of the page."""
    found = []
    chosen = _chosen(run)
    for each in comparisons:
        if last := _last(each, chosen):
            first = each.reference
            note = last.name if last is first else f"{last.name}, {first.name} {first.figures['accuracy'].text}"
            found.append(Tile("Accuracy", last.figures["accuracy"].text, note))
    likeness = [each for each in comparisons if _last(each, chosen) is None]
    main = next((each for each in likeness if each.base), next(iter(likeness), None))
    if main:
        for name in TOLD:
            if figure := main.reference.figures.get(name):
                before = main.base.figures.get(name) if main.base else None
                note = f"base {before.text}" if before else main.reference.name
                found.append(Tile(figure.metric.label, figure.text, note))
        members = [each for each in main.candidates if each.role == "member" and "size_bytes" in each.figures]
        if smallest := min(members, key=lambda each: each.figures["size_bytes"].value, default=None):
            found.append(Tile("Smallest member", smallest.figures["size_bytes"].text, smallest.name))
    count = Counter(step.status for step in run.steps)
    note = ", ".join(f"{number} {status}" for status, number in sorted(count.items()))
    found.append(Tile("Run time", duration(run.seconds), note))
    return found


def _chosen(run: RunReport) -> Mapping[str, str]:
    """Return the names that steps of the run chose, each with the step that did."""
    return {step.chosen: step.name for step in run.steps if step.chosen}


def _last(comparison: Comparison, chosen: Mapping[str, str]) -> Candidate | None:
    """Return the candidate of a comparison of solved tasks that a step chose, else the last, the end of the chain.

    Nothing where it is not about tasks. The family's champion, which a gate adds after the recipe's own, is not what
    the recipe made.
    """
    listed = [each for each in comparison.candidates if "accuracy" in each.figures and each.name != "champion"]
    return next((each for each in listed if each.name in chosen), listed[-1] if listed else None)


def _solved(comparison: Comparison, chosen: Mapping[str, str]) -> str:
    """Say how many tasks that candidate solves against the first; nothing where the comparison is not about tasks."""
    last, first = _last(comparison, chosen), comparison.reference
    if last is None:
        return ""
    name = f"{last.name}, chosen by {chosen[last.name]}," if last.name in chosen else last.name
    own = last.figures["accuracy"]
    if last is first:
        return f"{name} solves {own.text} of the tasks"
    claims = {"better": "more than", "worse": "fewer than"}
    claim = claims.get(own.verdict, "not clearly other than")
    return f"{name} solves {own.text} of the tasks, {claim} {first.name} with {first.figures['accuracy'].text}"


def _against_base(comparison: Comparison) -> str:
    """Say how the reference, the tuned model, stands against the base; nothing where there is none."""
    base, tuned = comparison.base, comparison.reference
    shared = [name for name in TOLD if base and name in base.figures and name in tuned.figures]
    if base is None or not shared:
        return ""
    senses = {name: _sense(base.figures[name], tuned.figures[name]) for name in shared}
    claims = {(True, False): "beats base", (False, True): "falls behind base", (True, True): "beats base in part only"}
    claim = claims.get((1 in senses.values(), -1 in senses.values()), "is not clearly different from base")
    # A claim rests on the metrics that differ; one that does not would read as if it did.
    told = [name for name in shared if senses[name]] or shared
    pairs = [f"{_label(tuned, name)} {_short(tuned, name)} against {_short(base, name)}" for name in told]
    return f"Tuned {claim}: {', '.join(pairs)}"


def _sense(before: Figure, after: Figure) -> int:
    """Return 1 where `after` is better, -1 where worse, 0 where the samples cannot tell.

    The verdict of `before` is on its own difference to `after`; without one the values decide.
    """
    if before.verdict:
        return {"worse": 1, "better": -1}.get(before.verdict, 0)
    ahead = after.metric.better * (after.value - before.value)
    return (ahead > 0) - (ahead < 0)


def _plain(comparison: Comparison) -> str:
    own = comparison.reference
    told = [f"{_label(own, name)} {_short(own, name)}" for name in TOLD if name in own.figures]
    return f"{own.name}: {', '.join(told)}" if told else ""


def _label(candidate: Candidate, name: str) -> str:
    return candidate.figures[name].metric.label.lower()


def _short(candidate: Candidate, name: str) -> str:
    value = candidate.figures[name].value
    return fixed(value, 2) if name == "answer_score" else fixed(value, 1 if value < 100 else 0)


def _members(comparison: Comparison) -> str:
    """Say what the smallest member keeps of the reference."""
    reference, needed = comparison.reference.figures, ("size_bytes", "answer_score")
    members = [
        each for each in comparison.candidates if each.role == "member" and all(name in each.figures for name in needed)
    ]
    if not members or not all(name in reference for name in needed) or not reference["answer_score"].value:
        return ""
    smallest = min(members, key=lambda each: each.figures["size_bytes"].value)
    own = {name: smallest.figures[name] for name in needed}
    kept = own["answer_score"].value / reference["answer_score"].value
    share = own["size_bytes"].value / reference["size_bytes"].value
    agreement = smallest.figures.get("top1_agreement")
    agrees = f" and agrees with {comparison.reference.name} on {agreement.text} of next tokens" if agreement else ""
    return f"{smallest.name} keeps {percent(kept)} of the answer score at {percent(share)} of the size{agrees}."
