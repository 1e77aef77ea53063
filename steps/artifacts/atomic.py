"""Files that are there whole or not at all, and files of lines that a kill cannot spoil."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cut_half_line(file: Path) -> None:
    """Cut off what a kill left half written at the end of a file of lines, before more is appended."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        text = stream.read()
        if not text.endswith(b"\n"):
            stream.truncate(text.rfind(b"\n") + 1)


def read_lines(file: Path) -> list[Any]:
    """Return what the lines of a file of JSON lines hold; none where there is no file, and lines that are cut left out.

    What is read is a state that can be made again: a damaged line costs its content, not the run.
    """
    found = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
