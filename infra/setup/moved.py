"""Scripts of an environment that was moved or copied: each names the place where it was installed."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

_PYTHON = rb"(/[^\n\"]*/\.venv)/bin/(python[\d.]*)"
_START = re.compile(
    rb"#!" + _PYTHON + rb"([^\n\"]*)\n"
    rb"|#!/bin/sh\n'''exec' \"?" + _PYTHON + rb"\"?([^\n]*) \"\$0\" \"\$@\"\n' '''\n"
)
"""How a script begins that runs by an environment's Python: as pip writes it for a plain path, and for any other."""
_WAYS = ((1, 2, 3), (4, 5, 6))
"""The groups of either: the environment, its Python's name, options."""
_ACTIVATED = re.compile(
    rb"^(\s*(?:export |setenv |set -gx )?VIRTUAL_ENV[= ])['\"]?(/.*/\.venv)['\"]?[ \t]*$", re.MULTILINE
)
"""The line of a script that activates the environment, in the words of each shell."""
_LONGEST = 127
"""Bytes of a first line that every kernel reads."""


def renew_place(environment: Path) -> int:
    """Have the scripts in an environment run by its own Python wherever they ran before; return how many did not.

    Raises:
        OSError: a script cannot be written.
    """
    changed = 0
    for path in _scripts(environment):
        with path.open("rb") as stream:
            # Of a library or program that was compiled, no more than this.
            if stream.read(2) != b"#!" and not path.name.startswith("activate"):
                continue
        before = path.read_bytes()
        after = _renewed(before, environment)
        if after != before:
            _replace(path, after)
            changed += 1
    return changed


def _scripts(environment: Path) -> Iterator[Path]:
    for folder in (environment / "bin", environment / "share" / "posttrain" / "deepspeed" / "bin"):
        yield from (path for path in sorted(folder.glob("*")) if path.is_file() and not path.is_symlink())


def _renewed(text: bytes, environment: Path) -> bytes:
    here = os.fsencode(environment)
    if start := _START.match(text):
        place, name, options = next(start.group(*each) for each in _WAYS if start[each[0]])
        return text if place == here else _start(here + b"/bin/" + name, options) + text[start.end() :]
    quoted = os.fsencode(shlex.quote(str(environment)))
    return _ACTIVATED.sub(lambda line: line[0] if line[2] == here else line[1] + quoted, text)


def _start(python: bytes, options: bytes) -> bytes:
    """Return a script's start, which a kernel cannot read where the path is long or has spaces, but a shell can."""
    if b" " not in python and len(python) + len(options) + 3 <= _LONGEST:
        return b"#!" + python + options + b"\n"
    return b"#!/bin/sh\n'''exec' \"" + python + b'"' + options + b" \"$0\" \"$@\"\n' '''\n"


def _replace(path: Path, text: bytes) -> None:
    """Write a file in one rename, its mode kept; another name of it keeps the old text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text)
    shutil.copymode(path, partial)
    partial.replace(path)
