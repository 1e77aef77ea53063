"""Rows of any known layout as preferences: a prompt and two answers, or one answer that was liked or disliked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steps.artifacts import Draft, Preferences, PreferencesFacts
from steps.artifacts.manifest import canonical_json
from steps.data._conversations import opening_of, system_of
from steps.data._hashing import different_ids, hexdigest
from steps.data._messages import LISTS, Turn, as_message, content_of, is_read, message_list, with_tools
from steps.data._unread import is_empty, is_structured, unread
from steps.frame.errors import UserError, did_you_mean
from steps.sources.rows import SourceRow

Part = Literal["prompt", "chosen", "rejected", "completion", "label"]
PreferenceColumns = Mapping[Part, str]
"""Column that holds each part of a row, where it has another name than the part."""

_PARTS: tuple[Part, ...] = ("prompt", "chosen", "rejected", "completion", "label")
_LABELS = {"true": True, "1": True, "false": False, "0": False}

Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer that was preferred and the one that was not; one of them may be missing."""

    prompt: Turns
    """Ends with the user's turn."""
    chosen: str | None
    rejected: str | None
    source: str
    where: str = ""
    """Where it was read, for messages; empty where it was made."""
    group: None = None
    """It belongs to nothing but its question."""
    system_added: bool = False
    """As `Conversation.system_added`."""
    unread: frozenset[str] = frozenset()
    """As `Conversation.unread`."""
    is_mended: bool = False
    """See `SourceRow.is_mended`."""

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 over prompt and answers: equal rows have equal ids in every data set."""
        return hexdigest(canonical_json([self.prompt, self.chosen, self.rejected]))[:16]

    @property
    def opening(self) -> str:
        """See `opening_of`."""
        return opening_of(self.prompt)

    @property
    def system(self) -> str:
        """See `system_of`; empty where the row has none of its own."""
        return "" if self.system_added else system_of(self.prompt)

    @property
    def said(self) -> tuple[object, ...]:
        """What it says to the letter: what duplicates are compared by."""
        return (self.prompt, self.chosen, self.rejected)

    @property
    def paired(self) -> bool:
        """Whether it has both sides."""
        return self.chosen is not None and self.rejected is not None


def preference(row: SourceRow, source: str, columns: PreferenceColumns, system: str | None) -> Preference:
    """Read a row as a preference.

    The layouts: `prompt`, `chosen` and `rejected`; `chosen` and `rejected` as whole conversations with the same
    beginning; `prompt`, `completion` and a `label` that says whether it was liked. Each is a text or a list of
    messages. `system` is put first where the row has no system message of its own.

    Raises:
        UserError: the layout is unknown, the sides are equal or answer different prompts, or there is no prompt.
    """
    cells = _cells(row, columns)
    answers = {side: _answer(value, side, row.where) for side, value in _sides(cells, row.where).items()}
    prompt = _prompt(cells.get("prompt"), [begin for begin, _ in answers.values()], row.where)
    if prompt[-1][0] not in ("user", "tool"):
        raise UserError(f"{row.where}: the prompt ends with the {prompt[-1][0]}'s turn; it must end with the user's")
    added = system is not None and prompt[0][0] != "system"
    if system is not None and added:
        prompt = (("system", system), *prompt)
    if not is_empty(tools := row.values.get("tools")) and is_structured(tools):
        prompt = tuple(with_tools(prompt, tools, row.where))
    texts = {side: text for side, (_, text) in answers.items()}
    chosen, rejected = texts.get("chosen"), texts.get("rejected")
    if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
        raise UserError(f"{row.where}: `chosen` and `rejected` are the same answer; a preference needs two")
    used = {columns.get(part, part) for part in cells} | ({*LISTS} if "prompt" not in row.values else set())
    if is_structured(row.values.get("tools")):
        used.add("tools")
    unknown = unread(row, used, used - {"tools"}, is_read)
    return Preference(
        prompt, chosen, rejected, source, row.where, system_added=added, unread=unknown, is_mended=row.is_mended
    )


def preferences_draft(out: Path, rows: Sequence[Preference], statistics: Mapping[str, float]) -> Draft:
    """Write rows, in the order of their ids, and say that they are an artifact."""
    from steps.lm.rows import write_jsonl

    rows = sorted(rows, key=lambda row: row.id)
    ids = different_ids((row.id,) for row in rows)
    write_jsonl(out / "rows.jsonl", map(_as_row, rows, ids))
    whole = all(row.paired for row in rows)
    return Preferences.draft(out, PreferencesFacts(rows=len(rows), paired=whole, statistics=statistics))


def preference_statistics(rows: Iterable[Preference]) -> dict[str, float]:
    """Return the numbers of pairs and of rated answers, and where there are pairs their lengths in words.

    `chosen_longer` is the share of pairs whose chosen answer has more words: far from a half, a model that learns
    from them may learn length (https://arxiv.org/abs/2310.03716).
    """
    rows = list(rows)
    pairs = [row for row in rows if row.paired]
    lone = [row for row in rows if not row.paired]
    liked = sum(row.chosen is not None for row in lone)
    counts = {"pairs": len(pairs), "liked": liked, "disliked": len(lone) - liked}
    if not pairs:
        return {name: float(count) for name, count in counts.items()}
    chosen = [len((row.chosen or "").split()) for row in pairs]
    rejected = [len((row.rejected or "").split()) for row in pairs]
    longer = sum(ours > theirs for ours, theirs in zip(chosen, rejected, strict=True))
    return {
        **counts,
        "chosen_words": sum(chosen) / len(pairs),
        "rejected_words": sum(rejected) / len(pairs),
        "chosen_longer": longer / len(pairs),
    }


def _as_row(row: Preference, own_id: str) -> dict[str, Any]:
    return {
        "id": own_id,
        "prompt": [as_message(turn) for turn in row.prompt],
        "chosen": row.chosen,
        "rejected": row.rejected,
        "source": row.source,
    }


def _cells(row: SourceRow, columns: PreferenceColumns) -> dict[Part, Any]:
    """Return the parts that the row has."""
    for name in columns.values():
        if name not in row.values:
            raise UserError(f"{row.where}: there is no column `{name}`{did_you_mean(name, map(str, row.values))}")
    values: dict[Part, Any] = {part: row.values.get(columns.get(part, part)) for part in _PARTS}
    if values["prompt"] is None:
        values["prompt"] = next((row.values[name] for name in LISTS if name in row.values), None)
    return {part: value for part, value in values.items() if value is not None}


def _sides(cells: Mapping[Part, Any], where: str) -> dict[str, Any]:
    if "chosen" in cells or "rejected" in cells:
        return {side: cells[side] for side in ("chosen", "rejected") if side in cells}
    if "completion" in cells and "label" in cells:
        return {"chosen" if _is_liked(cells["label"], where) else "rejected": cells["completion"]}
    have = ", ".join(f"`{part}`" for part in cells)
    raise UserError(
        f"{where}: no known layout in {have or 'its columns'}; a preference has `prompt`, `chosen` and `rejected`, or "
        "`prompt`, `completion` and `label`; for other names write columns: {chosen: better, rejected: worse}"
    )


def _is_liked(label: object, where: str) -> bool:
    liked = _LABELS.get(str(label).strip().lower())
    if liked is None:
        raise UserError(f"{where}: `label` is {label!r}; it must be true (liked) or false")
    return liked


def _answer(value: Any, side: str, where: str) -> tuple[Turns, str]:
    """Return the turns before the answer, none where the cell holds the answer alone, and the answer's text."""
    if isinstance(value, str):
        return (), content_of(value, f"`{side}`", "assistant", where)
    value = [value] if isinstance(value, Mapping) else value
    *before, (role, text, *calls) = _turns(value, side, where)
    if role != "assistant":
        raise UserError(f"{where}: `{side}` ends with the {role}'s turn; it must end with the assistant's")
    if calls:
        raise UserError(f"{where}: `{side}` ends with a tool call, and no method here prefers calls")
    return tuple(before), text


def _prompt(value: Any, beginnings: Sequence[Turns], where: str) -> Turns:
    """Return the prompt; a conversation's own beginning counts more than the column, which may repeat its last turn."""
    if len(set(beginnings)) > 1:
        raise UserError(
            f"{where}: `chosen` and `rejected` differ before their last answer; both must answer one prompt"
        )
    if beginnings[0]:
        return beginnings[0]
    if value is None:
        raise UserError(
            f"{where}: there is no prompt; give a `prompt` or whole conversations in `chosen` and `rejected`"
        )
    if isinstance(value, str):
        return (("user", content_of(value, "`prompt`", "user", where)),)
    return tuple(_turns(value, "prompt", where))


def _turns(value: Any, column: str, where: str) -> list[Turn]:
    if turns := message_list(value, column, where):
        return turns
    raise UserError(f"{where}: `{column}` is an empty list; it must hold messages with `role` and `content`")
