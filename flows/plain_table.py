"""Tables that show text as it is: in a plain string rich takes brackets for markup, and `sft[last]` becomes `sft`."""

from typing import Any

from rich.table import Table
from rich.text import Text


class PlainTable(Table):
    """A table without lines whose plain cells and title are text from outside, not markup."""

    def __init__(self, *columns: str, title: str | None = None, **options: Any) -> None:
        shown = Text(title, style="table.title") if title is not None else None
        super().__init__(*columns, title=shown, box=None, padding=(0, 2, 0, 0), **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; strings are shown letter for letter."""
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **options)
