"""What a step leaves out of the rows that it was given, said where a person sees it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from steps.data._conversations import Conversation
from steps.data._documents import Document
from steps.data._preference_rows import Preference
from steps.frame import Job

_MANY = 0.1
"""Part of the rows from which examples are named."""
_EXAMPLES = 3
_COLUMNS = 8
"""Names of columns that a sentence lists at most."""


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


def note_as_read(job: Job, rows: Sequence[Conversation | Document | Preference]) -> None:
    """Note what was read otherwise than it is written: halves of characters, and columns and keys that nobody reads."""
    mended = [row.where for row in rows if row.is_mended]
    if mended:
        some = f"{', '.join(mended[:_EXAMPLES])}{', ...' if len(mended) > _EXAMPLES else ''}"
        job.note(f"{len(mended)} rows held half a surrogate pair, which is no character; it became U+FFFD: {some}")
    counts = Counter(name for row in rows for name in row.unread)
    if counts:
        told = ", ".join(f"`{name}` ({count} rows)" for name, count in sorted(counts.items())[:_COLUMNS])
        more = f" and {len(counts) - _COLUMNS} more" if len(counts) > _COLUMNS else ""
        job.note(f"not used: {told}{more}")


def _told(reason: str, places: Sequence[str], rows: int) -> str:
    if len(places) <= _MANY * rows:
        return f"{len(places)} {reason}"
    return f"{len(places)} {reason}, such as {', '.join(places[:_EXAMPLES])}"
