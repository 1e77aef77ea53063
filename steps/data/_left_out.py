"""What a step leaves out of the rows that it was given, said where a person sees it."""

from collections.abc import Mapping, Sequence

from steps.frame import Job

_MANY = 0.1
"""Part of the rows from which examples are named."""
_EXAMPLES = 3


def note_left_out(job: Job, rows: int, left_out: Mapping[str, Sequence[str]]) -> None:
    """Note how many rows were left out and why; examples where one reason cost more than a tenth of them.

    Args:
        job: the running step.
        rows: how many there were.
        left_out: by reason, where each row that was left out stands.
    """
    reasons = {reason: places for reason, places in left_out.items() if places}
    if not reasons:
        return
    told = "; ".join(_told(reason, places, rows) for reason, places in reasons.items())
    job.note(f"{sum(map(len, reasons.values()))} of {rows} rows were left out: {told}")


def _told(reason: str, places: Sequence[str], rows: int) -> str:
    if len(places) <= _MANY * rows:
        return f"{len(places)} {reason}"
    return f"{len(places)} {reason}, such as {', '.join(places[:_EXAMPLES])}"
