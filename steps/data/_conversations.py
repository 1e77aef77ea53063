"""Rows of any known layout as conversations: messages with roles, ending in the assistant's turn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from steps.artifacts.manifest import canonical_json
from steps.data._hashing import hexdigest
from steps.data._unread import message_objects, unread
from steps.frame.errors import UserError, did_you_mean
from steps.sources.rows import SourceRow

Role = Literal["system", "user", "assistant"]
Columns = Mapping[Literal["messages", "system", "user", "assistant"], str]
"""Column that holds all messages, or the text of one role."""

_ROLES = ("system", "user", "assistant")
# Layouts that are recognised by their columns (user, assistant), in this order.
_MASKS = ("learn", "weight", "train", "loss")
"""Keys by which a message says whether it is learned: ours, OpenAI's (and Mistral's), Axolotl's, ms-swift's."""
_LAYOUTS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))


@dataclass(frozen=True)
class Conversation:
    """One row as every later step sees it."""

    messages: tuple[tuple[str, str], ...]
    """Role and content; the last is the assistant's."""
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
        return sum(len(content.split()) for _, content in self.messages)

    def words_of(self, *, assistant: bool) -> list[str]:
        """Return the words of the assistant or of all others, lower case: what near duplicates are compared by."""
        return [
            word
            for role, content in self.messages
            if (role == "assistant") is assistant
            for word in content.casefold().split()
        ]

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them."""
        return [
            {"role": role, "content": content, **({"learn": False} if index in self.unlearned else {})}
            for index, (role, content) in enumerate(self.messages)
        ]

    def as_row(self) -> dict[str, Any]:
        """Return the row of a Dataset."""
        row = {"id": self.id, "messages": self.as_messages(), "source": self.source}
        return row if self.task is None else {**row, "task": self.task}


def conversation_id(messages: Sequence[tuple[str, str]]) -> str:
    """Return the id of a conversation, given as role and content of each message."""
    return hexdigest(canonical_json(messages))[:16]


def row_id(row: Mapping[str, Any]) -> str:
    """Return the id that a row of a Dataset has by its messages."""
    return conversation_id([(message["role"], message["content"]) for message in row["messages"]])


def opening_of(messages: Iterable[tuple[str, str]]) -> str:
    """Return the digest of what the user says before the assistant's first turn.

    Letters' case and white space do not count: as for duplicates, what differs in these alone is the same. What a
    system message says is `system_of`.
    """
    return hexdigest(canonical_json([each for each in _before_the_answer(messages) if each[0] != "system"]))[:16]


def system_of(messages: Iterable[tuple[str, str]]) -> str:
    """Return what system messages say before the assistant's first turn, with case and white space as in openings."""
    return " ".join(content for role, content in _before_the_answer(messages) if role == "system")


def _before_the_answer(messages: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    before = takewhile(lambda message: message[0] != "assistant", messages)
    return [(role, " ".join(content.casefold().split())) for role, content in before]


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
    messages = _messages(row, columns)
    last = max((index for index, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise UserError(f"{row.where}: the row has no assistant turn; there is nothing in it to learn")
    messages = messages[: last + 1]
    roles = [role for role, _ in messages]
    if "user" not in roles[: roles.index("assistant")]:
        raise UserError(
            f"{row.where}: the assistant speaks before any user; a conversation begins with the user's turn"
        )
    unlearned = _unlearned(row, columns)
    unused = _unread(row, columns, group)
    added = system is not None and roles[0] != "system"
    if system is not None and added:
        messages = [("system", system), *messages]
        unlearned = frozenset(index + 1 for index in unlearned)
    task = row.values.get("task")
    if group is not None and group not in row.values:
        raise _no_column(group, row)
    # A row without a value belongs with no other, not with all that have none.
    together = None if group is None or row.values[group] in (None, "") else str(row.values[group])
    own_task = task if isinstance(task, Mapping) else None
    return Conversation(tuple(messages), source, row.where, own_task, together, unlearned, added, unused, row.is_mended)


def _messages(row: SourceRow, columns: Columns) -> list[tuple[str, str]]:
    values = row.values
    column = columns.get("messages", "messages")
    if not columns or "messages" in columns:
        if column in values:
            return message_list(values[column], column, row.where)
        if columns:
            raise _no_column(column, row)
        columns = _recognised(row)
    # A role that only some rows have (a system prompt, an extra input) may be empty; the two speakers may not.
    found = []
    for role in _ROLES:
        name = columns.get(role)
        if name is None:
            continue
        if name not in values:
            raise _no_column(name, row)
        if role != "system" or values[name]:
            content = content_of(values[name], f"column `{name}`", role, row.where)
            extra = values.get("input") if (role, name) == ("user", "instruction") else None
            found.append((role, f"{content}\n\n{extra}" if extra else content))
    return found


def _unlearned(row: SourceRow, columns: Columns) -> frozenset[int]:
    """Return the places of messages that say, by whichever key of common formats, that they are not to be learned."""
    found = set()
    for index, message in enumerate(message_objects(row.values.get(_list_column(row, columns)))):
        said = {key: message[key] for key in _MASKS if message.get(key) is not None}
        for key, value in said.items():
            if value not in (0, 1):
                raise UserError(
                    f"{row.where}: message {index + 1} has {key}: {value!r}; it must be true or false (or 1 or 0)"
                )
        if len(set(map(bool, said.values()))) > 1:
            both = " and ".join(f"{key}: {value!r}" for key, value in said.items())
            raise UserError(f"{row.where}: message {index + 1} has {both}, which say the opposite; keep one of them")
        if said and not all(said.values()):
            found.add(index)
    return frozenset(found)


def _unread(row: SourceRow, columns: Columns, group: str | None) -> frozenset[str]:
    column = _list_column(row, columns)
    used = {column} if column else {*(columns or _recognised(row)).values()}
    if "instruction" in used and not columns:
        used.add("input")
    if isinstance(row.values.get("task"), Mapping):
        used.add("task")
    return unread(row, used | {group or ""}, [column] if column else [], ("role", "content", *_MASKS))


def _list_column(row: SourceRow, columns: Columns) -> str:
    """Return the column that holds all messages; nothing where each speaker has one."""
    column = columns.get("messages", "messages")
    return column if (not columns or "messages" in columns) and column in row.values else ""


def _recognised(row: SourceRow) -> Columns:
    for user, assistant in _LAYOUTS:
        if user in row.values and assistant in row.values:
            return {"user": user, "assistant": assistant, **({"system": "system"} if "system" in row.values else {})}
    have = ", ".join(f"`{name}`" for name in row.values)
    raise UserError(
        f"{row.where}: no known layout in the columns {have or '(none)'}; name them, for example "
        "columns: {user: question, assistant: answer}"
    )


def message_list(value: Any, column: str, where: str) -> list[tuple[str, str]]:
    """Read a cell that holds messages as role and content of each.

    Raises:
        UserError: it is no list of messages, or a role is unknown, or a content no text or empty.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UserError(f"{where}: `{column}` must be a list of objects with `role` and `content`")
    found = []
    for number, message in enumerate(value, start=1):
        role = message.get("role")
        if role not in _ROLES:
            raise UserError(f"{where}: message {number} has the role `{role}`{did_you_mean(str(role), _ROLES)}")
        found.append((role, content_of(message.get("content"), f"message {number}", role, where)))
    return found


def content_of(value: Any, place: str, role: str, where: str) -> str:
    """Return the text of a turn; only a system message may be empty.

    Raises:
        UserError: it is no text, or empty; `place` says where in the row it stands.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: {place} must be text, not {type(value).__name__}")
    if role != "system" and not value.strip():
        raise UserError(f"{where}: {place}, the {role} turn, is empty")
    return value


def _no_column(name: str, row: SourceRow) -> UserError:
    return UserError(f"{row.where}: there is no column `{name}`{did_you_mean(name, map(str, row.values))}")
