"""Rows on disk: JSON objects, one a line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steps.frame.row_place import placed


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that posttrain itself wrote."""
    with path.open(encoding="utf-8") as stream:
        numbered = enumerate(stream, start=1)
        yield from placed((json.loads(line), f"row {number} of {path.parent.name[:12]}") for number, line in numbered)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows, and return how many; keys stay in their order, in which chat templates show tools and calls."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
