"""What came out, in a sentence: the first thing a reader of the report wants to know."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flows.report.comparison import Candidate, Comparison
from flows.report.run import RunReport
from flows.report.units import duration, factor, fixed, percent, size

WRONG = ("failed", "refused")


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
    told = next((sentence for each in comparisons if (sentence := _against_base(each) or _plain(each))), "")
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
    main = next((each for each in comparisons if each.base), next(iter(comparisons), None))
    if main:
        for name in ("answer_score", "perplexity"):
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


def _against_base(comparison: Comparison) -> str:
    """Say how the reference, the tuned model, stands against the base; nothing where there is none."""
    base, tuned = comparison.base, comparison.reference
    if base is None:
        return ""
    shared = [name for name in ("answer_score", "perplexity") if name in base.figures and name in tuned.figures]
    if not shared:
        return ""
    # The verdicts are the base's against the tuned model: better there is worse here.
    verdicts = {base.figures[name].verdict for name in shared}
    if verdicts <= {"worse", ""} or verdicts == {"worse", "even"}:
        claim = "beats base" if "worse" in verdicts or _all_ahead(base, tuned, shared) else "and base"
    elif verdicts <= {"better", "even", ""}:
        claim = "is worse than base" if "better" in verdicts else "is not clearly different from base"
    else:
        claim = "is better than base in one respect and worse in another"
    return f"Tuned {claim}: " + ", ".join(_pair(base, tuned, name) for name in shared)


def _all_ahead(base: Candidate, tuned: Candidate, names: Sequence[str]) -> bool:
    pairs = [(base.figures[name], tuned.figures[name]) for name in names]
    return all(own.metric.better * (own.value - before.value) > 0 for before, own in pairs)


def _pair(base: Candidate, tuned: Candidate, name: str) -> str:
    label = tuned.figures[name].metric.label.lower()
    return f"{label} {_short(tuned, name)} against {_short(base, name)}"


def _plain(comparison: Comparison) -> str:
    figures = comparison.reference.figures
    told = [f"{figures[name].metric.label.lower()} {_short(comparison.reference, name)}" for name in _TOLD if name in figures]
    return f"{comparison.reference.name}: {', '.join(told)}" if told else ""


_TOLD = ("answer_score", "perplexity")


def _short(candidate: Candidate, name: str) -> str:
    value = candidate.figures[name].value
    return fixed(value, 2) if name == "answer_score" else fixed(value, 1 if value < 100 else 0)


def _members(comparison: Comparison) -> str:
    """Say what the smallest member keeps of the reference."""
    reference, needed = comparison.reference.figures, ("size_bytes", "answer_score")
    members = [each for each in comparison.candidates if each.role == "member" and all(name in each.figures for name in needed)]
    if not members or not all(name in reference for name in needed) or not reference["answer_score"].value:
        return ""
    smallest = min(members, key=lambda each: each.figures["size_bytes"].value)
    own = {name: smallest.figures[name] for name in needed}
    kept = own["answer_score"].value / reference["answer_score"].value
    small = factor(own["size_bytes"].value / reference["size_bytes"].value - 1)
    agreement = smallest.figures.get("top1_agreement")
    agrees = f" and agrees on {percent(agreement.value)} of next tokens" if agreement else ""
    return (
        f"{smallest.name} keeps {percent(kept)} of the answer score at {small} the size "
        f"({size(own['size_bytes'].value)}){agrees}."
    )
