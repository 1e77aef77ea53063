"""What a row says that nobody reads: named, never dropped in silence; and refused where answers rest on it."""

from collections.abc import Iterable, Mapping
from typing import Any

from steps.frame.errors import UserError
from steps.sources.rows import SourceRow

_TOOL_KEYS = {"tool_calls", "function_call", "tool_call_id"}
"""Keys of messages that are about tools; `tools` is the column that describes them."""


def unread(row: SourceRow, used: Iterable[str], lists: Iterable[str], keys: Iterable[str]) -> frozenset[str]:
    """Return the columns that are not used, and the keys of messages, as `COLUMN.KEY`; empty cells say nothing.

    A row's `id` is left out: it is made anew of its messages.

    Args:
        row: as its source has it.
        used: columns that are read.
        lists: those of them that may hold messages.
        keys: what is read of a message.

    Raises:
        UserError: it is about tools, without which its answers mean something else.
    """
    outside = {name for name, value in row.values.items() if not _is_empty(value)} - {*used, "id"}
    inside = {
        (column, name)
        for column in lists
        for message in message_objects(row.values.get(column))
        for name, value in message.items()
        if name not in keys and not _is_empty(value)
    }
    tools = sorted(_TOOL_KEYS & {name for _, name in inside})
    if "tools" in outside and _is_structured(row.values["tools"]):
        tools.append("tools")
    if tools:
        raise UserError(
            f"{row.where}: it has `{tools[0]}`, and no step renders tools yet: its answers would be learned without "
            "what they answer to; leave such rows out, or take the key out where it means nothing"
        )
    return frozenset({*outside, *(f"{column}.{name}" for column, name in inside)})


def message_objects(value: Any) -> list[Mapping[str, Any]]:
    """Return the objects of a list, as messages are; none where there is no list."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _is_empty(value: Any) -> bool:
    """Whether a cell says nothing: formats with a fixed set of columns fill what a row has not."""
    return value in (None, "", "[]", "{}") or (isinstance(value, list | Mapping) and not value)


def _is_structured(value: Any) -> bool:
    """Whether a cell describes tools: objects, or JSON as some formats write them; other text means something else."""
    return isinstance(value, list | Mapping) or str(value).lstrip()[:1] in ("[", "{")
