"""What a row says that nobody reads: named, never dropped in silence."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from steps.sources.rows import SourceRow


def unread(
    row: SourceRow,
    used: Iterable[str],
    lists: Iterable[str],
    is_read: Callable[[Mapping[str, Any], str], bool],
) -> frozenset[str]:
    """Return the columns that are not used, and the keys of messages, as `COLUMN.KEY`; empty cells say nothing.

    A row's `id` is left out: it is made anew of its messages.

    Args:
        row: as its source has it.
        used: columns that are read.
        lists: those of them that may hold messages.
        is_read: whether a key of a message is read.
    """
    outside = {name for name, value in row.values.items() if not is_empty(value)} - {*used, "id"}
    inside = {
        (column, name)
        for column in lists
        for at, message in enumerate(message_objects(row.values.get(column)))
        for name, value in message.items()
        # On the first one our own rows have the tools of all.
        if not (is_read(message, name) or (name == "tools" and at == 0)) and not is_empty(value)
    }
    return frozenset({*outside, *(f"{column}.{name}" for column, name in inside)})


def message_objects(value: Any) -> list[Mapping[str, Any]]:
    """Return the objects of a list, as messages are; none where there is no list."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: formats with a fixed set of columns fill what a row has not."""
    return value in (None, "", "[]", "{}") or (isinstance(value, list | Mapping) and not value)


def is_structured(value: Any) -> bool:
    """Whether a cell describes tools: objects, or JSON as some formats write them; other text means something else."""
    return isinstance(value, list | Mapping) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
