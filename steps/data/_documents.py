"""Rows without conversations: documents of plain text, and texts that go on from others (prompt and completion)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steps.artifacts import Documents, DocumentsFacts, Draft
from steps.artifacts.manifest import canonical_json
from steps.data._conversations import opening_of
from steps.data._hashing import different_ids, hexdigest
from steps.data._unread import unread
from steps.frame.errors import UserError, did_you_mean
from steps.sources.rows import SourceRow

if TYPE_CHECKING:
    from steps.frame import Job

Layout = Literal["text", "completion"]

_TEXTS = ("text", "content", "document")
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("input", "output"))


@dataclass(frozen=True)
class Document:
    """One row: what is learned, and what stands before it."""

    text: str
    """What is learned."""
    prompt: str
    """What it goes on from; empty for a document."""
    source: str
    where: str
    group: str | None = None
    """As `Conversation.group`."""
    unread: frozenset[str] = frozenset()
    """As `Conversation.unread`."""
    is_mended: bool = False
    """See `SourceRow.is_mended`."""
    task: None = None
    """It has none."""
    system: str = ""
    """Nobody is told anything."""

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 over both texts."""
        return hexdigest(canonical_json([self.prompt, self.text]))[:16]

    @property
    def opening(self) -> str:
        """Digest of what is asked: the prompt, or the document itself; letters' case and white space do not count."""
        # A prompt is the question that it is in a conversation, on the same side in every data set.
        return opening_of([("user", self.prompt or self.text)])

    @property
    def said(self) -> tuple[object, ...]:
        """What it says to the letter."""
        return (self.prompt, self.text)

    @property
    def words(self) -> int:
        """Number of words in both texts."""
        return len(self.prompt.split()) + len(self.text.split())

    def words_of(self, *, assistant: bool) -> list[str]:
        """Return the words of what is learned, or of what stands before it, lower case."""
        return (self.text if assistant else self.prompt).casefold().split()

    def as_row(self) -> dict[str, Any]:
        """Return the row of `Documents`."""
        return {"id": self.id, "prompt": self.prompt, "text": self.text, "source": self.source}


def document(
    row: SourceRow, source: str, layout: Layout, columns: dict[str, str], group: str | None = None
) -> Document | None:
    """Read a row as a document (`text`), or as a prompt with its completion; None where a text is empty.

    Args:
        row: as its source has it.
        source: the source's URI.
        layout: which of the two.
        columns: where the texts stand, unless the columns have known names: `text`; `prompt` and `completion`.
        group: column that says which rows belong together.

    Raises:
        UserError: there is no such column, or a text is none.
    """
    if layout == "text":
        prompt_column, column = None, _column(row, columns.get("text"), _TEXTS)
    else:
        known = next((pair for pair in _PAIRS if all(name in row.values for name in pair)), _PAIRS[0])
        prompt_column, column = (
            _column(row, columns.get(part), (name,)) for part, name in zip(("prompt", "completion"), known, strict=True)
        )
    text = _text(row, column)
    prompt = _text(row, prompt_column) if prompt_column else ""
    if group is not None and group not in row.values:
        raise UserError(f"{row.where}: there is no column `{group}`{did_you_mean(group, map(str, row.values))}")
    together = None if group is None or row.values[group] in (None, "") else str(row.values[group])
    if not text.strip() or (prompt_column and not prompt.strip()):
        return None
    extra = row.values.get("input")
    if prompt_column == "instruction" and isinstance(extra, str) and extra.strip():
        prompt, unused_input = f"{prompt}\n\n{extra}\n\n", {"input"}
    else:
        unused_input = set[str]()
    unused = unread(row, unused_input | {column, prompt_column or "", group or ""}, (), lambda *_: True)
    return Document(text, prompt, source, row.where, together, unused, row.is_mended)


def documents_draft(
    job: "Job", name: str, rows: Sequence[Document], layout: Layout, statistics: dict[str, float]
) -> Draft:
    """Write rows and say that they are an artifact."""
    from steps.lm.rows import write_jsonl

    out: Path = job.output(name)
    ids = different_ids((row.id,) for row in rows)
    write_jsonl(out / "rows.jsonl", (row.as_row() | {"id": own} for row, own in zip(rows, ids, strict=True)))
    return Documents.draft(out, DocumentsFacts(rows=len(rows), layout=layout, statistics=statistics))


def _column(row: SourceRow, named: str | None, known: Sequence[str]) -> str:
    found = named or next((name for name in known if name in row.values), known[0])
    if found not in row.values:
        raise UserError(
            f"{row.where}: there is no column `{found}`{did_you_mean(found, map(str, row.values))}; name the one that "
            "is meant in `columns`"
        )
    return found


def _text(row: SourceRow, column: str) -> str:
    value = "" if row.values[column] is None else row.values[column]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: column `{column}` must be text, not {type(value).__name__}")
    return value
