"""Rows of any known layout as conversations: messages with roles, ending in the assistant's turn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from steps.artifacts.manifest import canonical_json
from steps.data._hashing import hexdigest
from steps.data._messages import (
    LISTS,
    MASKS,
    Turn,
    as_message,
    content_of,
    is_read,
    message_list,
    said,
    turn_of,
    with_tools,
    words_in,
)
from steps.data._unread import is_empty, is_structured, message_objects, unread
from steps.frame.errors import UserError, did_you_mean
from steps.sources.rows import SourceRow

Columns = Mapping[Literal["messages", "system", "user", "assistant"], str]
"""Column that holds all messages, or the text of one role."""

_ROLES = ("system", "user", "assistant")
# Layouts that are recognised by their columns (user, assistant), in this order.
_LAYOUTS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))


@dataclass(frozen=True)
class Conversation:
    """One row as every later step sees it."""

    messages: tuple[Turn, ...]
    """The last is the assistant's."""
    source: str
    where: str
    task: Mapping[str, Any] | None = field(default=None, compare=False)
    """What the task's own verifier needs, from an object in a column `task`."""
    group: str | None = field(default=None, compare=False)
    """What the row says of what it belongs together with, where a column is named for that."""
    unlearned: frozenset[int] = field(default=frozenset(), compare=False)
    """Places of messages that say `learn: false` (or `weight: 0`, ...): fine-tuning leaves them out of its loss."""
    system_added: bool = field(default=False, compare=False)
    """Whether its system message is not the row's own but the one for rows that have none."""
    unread: frozenset[str] = field(default=frozenset(), compare=False)
    """What its source says that nobody reads: columns, and keys of messages as `COLUMN.KEY`."""
    is_mended: bool = field(default=False, compare=False)
    """See `SourceRow.is_mended`."""

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 over the messages: the same text has the same id in every data set."""
        return conversation_id(self.messages)

    @property
    def opening(self) -> str:
        """See `opening_of`."""
        return opening_of(self.messages)

    @property
    def system(self) -> str:
        """See `system_of`; empty where the row has none of its own."""
        return "" if self.system_added else system_of(self.messages)

    @property
    def said(self) -> tuple[object, ...]:
        """What it says to the letter, and which of its turns are learned: what exact duplicates are compared by."""
        return (self.messages, self.unlearned)

    @property
    def words(self) -> int:
        """Number of words in all messages."""
        return sum(len(turn[1].split()) for turn in self.messages)

    def words_of(self, *, assistant: bool) -> list[str]:
        """Return the words of the assistant or of all others, lower case: what near duplicates are compared by."""
        return [word for turn in self.messages if (turn[0] == "assistant") is assistant for word in words_in(turn)]

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them."""
        return [
            {**as_message(turn), **({"learn": False} if index in self.unlearned else {})}
            for index, turn in enumerate(self.messages)
        ]

    def as_row(self) -> dict[str, Any]:
        """Return the row of a Dataset."""
        row = {"id": self.id, "messages": self.as_messages(), "source": self.source}
        return row if self.task is None else {**row, "task": self.task}


def conversation_id(messages: Sequence[Turn]) -> str:
    """Return the id of a conversation."""
    return hexdigest(canonical_json(messages))[:16]


def row_id(row: Mapping[str, Any]) -> str:
    """Return the id that a row of a Dataset has by its messages."""
    return conversation_id([turn_of(message) for message in row["messages"]])


def opening_of(messages: Iterable[Turn]) -> str:
    """Return the digest of what the user says before the assistant's first turn.

    Letters' case and white space do not count: as for duplicates, what differs in these alone is the same. What a
    system message says is `system_of`.
    """
    asked = [turn[:2] for turn in _before_the_answer(messages) if turn[0] != "system"]
    return hexdigest(canonical_json(asked))[:16]


def system_of(messages: Iterable[Turn]) -> str:
    """Return what system messages say before the assistant's first turn, with case and white space as in openings."""
    return " ".join(turn[1] for turn in _before_the_answer(messages) if turn[0] == "system")


def _before_the_answer(messages: Iterable[Turn]) -> list[Turn]:
    return said(takewhile(lambda turn: turn[0] != "assistant", messages))


def conversation(
    row: SourceRow, source: str, columns: Columns, system: str | None, group: str | None = None
) -> Conversation:
    """Read a row as a conversation.

    What follows the last assistant's turn is left out: there is nothing to learn from it. `system` is put first where
    the row has no system message of its own.

    Args:
        row: as its source has it.
        source: the source's URI.
        columns: where the messages stand, unless the layout is a known one.
        system: system message for rows that have none.
        group: column that says which rows belong together.

    Raises:
        UserError: the layout is unknown, the conversation has no user's or no assistant's turn, or no such column.
    """
    layout = _layout(row, columns)
    turns = _turns(row, layout)
    told = _own_system(row, layout, turns)
    turns = [*told, *turns]
    last = max((index for index, turn in enumerate(turns) if turn[0] == "assistant"), default=None)
    if last is None:
        raise UserError(f"{row.where}: the row has no assistant turn; there is nothing in it to learn")
    turns = turns[: last + 1]
    roles = [turn[0] for turn in turns]
    if "user" not in roles[: roles.index("assistant")]:
        raise UserError(
            f"{row.where}: the assistant speaks before any user; a conversation begins with the user's turn"
        )
    unlearned = frozenset(index + len(told) for index in _unlearned(row, layout))
    unused = _unread(row, layout, group, has_told=bool(told))
    added = system is not None and roles[0] != "system"
    if system is not None and added:
        turns = [("system", system), *turns]
        unlearned = frozenset(index + 1 for index in unlearned)
    if not is_empty(tools := _tools(row, layout)) and is_structured(tools):
        turns = with_tools(turns, tools, row.where)
    task = row.values.get("task")
    if group is not None and group not in row.values:
        raise _no_column(group, row)
    # A row without a value belongs with no other, not with all that have none.
    together = None if group is None or row.values[group] in (None, "") else str(row.values[group])
    own_task = _checked_task(task, row.where) if isinstance(task, Mapping) else None
    return Conversation(tuple(turns), source, row.where, own_task, together, unlearned, added, unused, row.is_mended)


def _own_system(row: SourceRow, layout: "_Layout", turns: Sequence[Turn]) -> list[Turn]:
    """Return the system message of a column of its own, where the messages have none."""
    own = row.values.get("system")
    if not (layout.lists and isinstance(own, str) and own.strip()) or (turns and turns[0][0] == "system"):
        return []
    return [("system", own)]


def _tools(row: SourceRow, layout: "_Layout") -> Any:
    """Return what tools there are: a column says so, or the first message, as our own rows have it."""
    first = next(iter(message_objects(row.values.get(layout.lists[0]))), {}) if layout.lists else {}
    return first.get("tools") if is_empty(row.values.get("tools")) else row.values["tools"]


def _checked_task(task: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return what a verifier needs, as it can be written down.

    Raises:
        UserError: it cannot: it holds bytes, or what is no number.
    """
    try:
        canonical_json(task)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: `task` cannot be written as JSON ({error})") from None
    return task


@dataclass(frozen=True)
class _Layout:
    """Where a row has what."""

    lists: tuple[str, ...] = ()
    """Columns of messages, the later going on from the earlier."""
    texts: Columns = field(default_factory=dict)
    """Column of each speaker's text."""


def _layout(row: SourceRow, columns: Columns) -> _Layout:
    """Find where the messages stand.

    Raises:
        UserError: there is no such column, or no known layout.
    """
    if "messages" in columns:
        if columns["messages"] not in row.values:
            raise _no_column(columns["messages"], row)
        return _Layout((columns["messages"],))
    if columns:
        return _Layout(texts=columns)
    # Of other names than `messages` a column may mean something else, the number of a conversation for one.
    if "messages" in row.values:
        return _Layout(("messages",))
    if found := next((name for name in LISTS if message_objects(row.values.get(name))), None):
        return _Layout((found,))
    texts = _recognised(row)
    # As TRL has them: messages that ask, and messages that answer.
    both = (texts["user"], texts["assistant"])
    return _Layout(both) if all(isinstance(row.values[name], list) for name in both) else _Layout(texts=texts)


def _turns(row: SourceRow, layout: _Layout) -> list[Turn]:
    values = row.values
    if layout.lists:
        return [turn for column in layout.lists for turn in message_list(values[column], column, row.where)]
    # A role that only some rows have (a system prompt, an extra input) may be empty; the two speakers may not.
    found: list[Turn] = []
    for role in _ROLES:
        name = layout.texts.get(role)
        if name is None:
            continue
        if name not in values:
            raise _no_column(name, row)
        if role != "system" or values[name]:
            content = content_of(values[name], f"column `{name}`", role, row.where)
            extra = values.get("input") if (role, name) == ("user", "instruction") else None
            if role == "user" and name == "instruction":
                found += _history(values.get("history"), row.where)
            found.append((role, f"{content}\n\n{extra}" if extra else content))
    return found


def _history(value: Any, where: str) -> list[Turn]:
    """Return the turns before an instruction, as Alpaca's rows may have them: pairs of question and answer.

    Anything else under that name is something else, and not read.
    """
    if isinstance(value, list) and value and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        said_by = [(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]
        return [(role, content_of(text, "`history`", role, where)) for role, text in said_by]
    return message_list(value, "history", where) if message_objects(value) else []


def _unlearned(row: SourceRow, layout: _Layout) -> frozenset[int]:
    """Return the places of messages that say, by whichever key of common formats, that they are not to be learned.

    Where one column asks and another answers, only what answers is learned.
    """
    lists = [message_objects(row.values.get(column)) for column in layout.lists]
    asked = len(lists[0]) if len(lists) > 1 else 0
    found = {*range(asked)}
    for index, message in enumerate(each for part in lists for each in part):
        said_of = {key: message[key] for key in MASKS if message.get(key) is not None}
        for key, value in said_of.items():
            if value not in (0, 1):
                raise UserError(
                    f"{row.where}: message {index + 1} has {key}: {value!r}; it must be true or false (or 1 or 0)"
                )
        if len(set(map(bool, said_of.values()))) > 1:
            both = " and ".join(f"{key}: {value!r}" for key, value in said_of.items())
            raise UserError(f"{row.where}: message {index + 1} has {both}, which say the opposite; keep one of them")
        if said_of and not all(said_of.values()):
            found.add(index)
    return frozenset(found)


def _unread(row: SourceRow, layout: _Layout, group: str | None, *, has_told: bool) -> frozenset[str]:
    used = {*layout.lists, *layout.texts.values()}
    if layout.texts.get("user") == "instruction":
        used |= {"input"} | ({"history"} if _history(row.values.get("history"), row.where) else set())
    first = next(iter(message_objects(row.values.get(layout.lists[0]))), {}) if layout.lists else {}
    if has_told or (layout.lists and first.get("content", first.get("value")) == row.values.get("system")):
        used.add("system")
    if isinstance(row.values.get("task"), Mapping):
        used.add("task")
    if is_structured(row.values.get("tools")):
        used.add("tools")
    return unread(row, used | {group or ""}, layout.lists, is_read)


def _recognised(row: SourceRow) -> Columns:
    for user, assistant in _LAYOUTS:
        if user in row.values and assistant in row.values:
            return {"user": user, "assistant": assistant, **({"system": "system"} if "system" in row.values else {})}
    have = ", ".join(f"`{name}`" for name in row.values)
    raise UserError(
        f"{row.where}: no known layout in the columns {have or '(none)'}; name them, for example "
        "columns: {user: question, assistant: answer}"
    )


def _no_column(name: str, row: SourceRow) -> UserError:
    return UserError(f"{row.where}: there is no column `{name}`{did_you_mean(name, map(str, row.values))}")
