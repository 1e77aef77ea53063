"""How a native runtime is proven: a real call in a child process, so that what dies takes nobody with it.

A proof is one module `steps/runtime/proofs/NAME.py` with a `Proof` called PROOF and a function `prove()`, which calls
the runtime and returns figures or words about it. Heavy imports stand inside the function. Nothing else is edited.
"""

import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

import steps as rooms
from steps.runtime import proofs
from steps.runtime.children import children
from steps.runtime.death import died_by_itself, fatal_library, how_it_ended, last_words

Facts = Mapping[str, float | str]
Status = Literal["works", "broken", "absent"]

_PATIENCE = 300.0
"""Seconds after which a proof counts as failed; the slowest takes some ten."""
_FRAME = ("steps.frame", "steps.__main__")
ABSENT_CODE, PASSING_CODE = 69, 75
"""Exit codes of a child whose runtime says that this machine lacks what it needs, or that it does so for now: memory,
a full disk."""


class Absent(Exception):
    """Raised by a proof where the machine lacks what the runtime is for, say a GPU. Says what."""


@dataclass(frozen=True)
class Proof:
    """What is known of a native runtime before it is called."""

    runtime: str
    """Its name for people, and in the steps that need it: `llama.cpp`."""
    distribution: str
    """The distribution that brings it."""
    module: str
    """The package that is imported."""
    libraries: tuple[str, ...]
    """Patterns, within the package, of the native libraries that it opens."""
    serves: str
    """What needs it, in a few words."""
    advice: str
    """What to do where it is broken."""
    optional: bool = False
    """Whether posttrain does without it unless a recipe asks for it."""
    measures: bool = False
    """Whether it measures a speed, so that nothing may run beside it."""
    variables: tuple[str, ...] = ()
    """Environment variables that change which libraries are opened; a folder as value stands for its files."""
    name: str = ""
    """Of its module, which `all_proofs` fills in."""
    stands_on: tuple[str, ...] = ()
    """Distributions whose version it depends on."""
    beside: tuple[str, ...] = ()
    """Modules of other distributions whose native code it calls: where that dies, this is broken."""
    imported_by: tuple[str, ...] = ()
    """Distributions that import it where it is installed, and die with it."""
    attempts: Callable[[], Sequence[Mapping[str, str]]] = lambda: ({},)
    """Environments to try, the best first: the runtime works if it does in one of them."""
    settle: Callable[[Sequence[Mapping[str, str]]], None] = lambda died: None
    """Remember in which environments it died, so that no process uses them; raises OSError where it cannot."""

    @property
    def version(self) -> str:
        """Installed version; empty where it is not installed."""
        return _version(self.distribution)

    def identity(self) -> str:
        """Digest of the native libraries, by name, size and time, and of the proof's own code.

        It tells that a library was replaced, or that the proof now asks for something else: a verdict holds for both.
        """
        values = {name: os.environ[name] for name in self.variables if name in os.environ}
        found = [path for root in _folders(self.module) for pattern in self.libraries for path in root.glob(pattern)]
        found += [path for name in self.beside for path in _extensions(name)]
        # A value may be longer than any path: `os.path.isdir` says no where `Path.is_dir` raises.
        found += [path for value in values.values() if os.path.isdir(value) for path in Path(value).glob("*.so")]  # noqa: PTH112
        told = [self.version, *map(str, values.items()), *map(_version, self.stands_on), self._code()]
        for path in sorted(found):
            # A library may vanish meanwhile, or be a link to nowhere.
            with suppress(OSError):
                stat = path.stat()
                told.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return sha256("\n".join(told).encode()).hexdigest()[:16]

    def _code(self) -> str:
        """Digest of the proof's module and of all that it imports of `steps`, but the frame that runs steps."""
        # The frame reads verdicts, so it is imported after this module.
        from steps.frame.code import digest_modules

        try:
            return digest_modules(_modules_called(self.name, rooms.__path__[0])) if self.name else ""
        except (OSError, SyntaxError) as error:
            # Whatever imports it will say so.
            return str(error)


class Verdict(BaseModel):
    """What became of a proof on one machine."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    runtime: str
    distribution: str
    status: Status
    version: str
    identity: str
    """Of the libraries that were called and of the code that called them, see `Proof.identity`."""
    facts: Facts = {}
    """What the proof measured or found."""
    library: str = ""
    """The package in whose native code it died."""
    reason: str = ""
    """One sentence on why it is broken or absent."""
    advice: str = ""
    """What to do about it."""
    seconds: float = 0.0
    optional: bool = False
    lasting: bool = True
    """Whether it may be kept: a proof that was ended from outside says nothing of the next."""


@cache
def all_proofs() -> Mapping[str, Proof]:
    """Return every proof by its runtime's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(proofs.__path__))
    found = [replace(importlib.import_module(f"{proofs.__name__}.{name}").PROOF, name=name) for name in names]
    return {proof.runtime: proof for proof in found}


def prove(proof: Proof, environment: Mapping[str, str] | None = None) -> Verdict:
    """Prove a runtime in child processes: in the best of its environments, and where it dies there, in the next.

    Args:
        proof: the runtime's.
        environment: variables for the children, beside those of this process.
    """
    began = time.monotonic()
    known = {"runtime": proof.runtime, "distribution": proof.distribution, "optional": proof.optional}
    if not proof.version:
        wanted = f"{proof.distribution} is not installed"
        advice = f"pip install {proof.distribution}" if proof.optional else "infra/setup.sh"
        return Verdict(**known, status="absent", version="", identity="", reason=wanted, advice=advice)
    identity = proof.identity()
    died, ended = [], _Ended("broken", reason="it cannot be loaded on this machine")
    first: _Ended | None = None
    for surroundings in proof.attempts():
        ended = _call(proof, {**(environment or {}), **surroundings})
        if ended.status != "broken":
            break
        first = first or ended
        died.append(surroundings)
    if ended.status == "works":
        try:
            proof.settle(died)
        except OSError as error:
            if died:
                ended = _Ended("broken", reason=f"its best variant dies, which cannot be noted: {error}")
    told = first if first and ended.status != "absent" else ended
    return Verdict(
        **known,
        status=ended.status,
        version=proof.version,
        identity=identity,
        facts=ended.facts,
        library=told.library,
        reason=told.reason,
        advice=proof.advice if ended.status == "broken" else "",
        seconds=round(time.monotonic() - began, 2),
        lasting=ended.lasting and (first is None or first.lasting),
    )


@dataclass(frozen=True)
class _Ended:
    """How one call of a proof ended."""

    status: Status
    facts: Facts = field(default_factory=dict)
    reason: str = ""
    library: str = ""
    lasting: bool = True


def _call(proof: Proof, surroundings: Mapping[str, str]) -> _Ended:
    """Call a proof once, in a session of its own, so that what interrupts us is not taken for its fault."""
    with tempfile.TemporaryDirectory(prefix="posttrain-proof-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        command = [sys.executable, "-X", "faulthandler", "-m", "steps.runtime", proof.name, str(answer)]
        with log.open("wb") as stream:
            # Not by what lies in the working directory, which may hold a package of the same name as ours.
            child = children.start(command, {**os.environ, **surroundings, "PYTHONSAFEPATH": "1"}, stream)
            try:
                code = child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                return _Ended("broken", reason=f"it did not answer within {_PATIENCE:.0f} s", lasting=False)
            finally:
                children.end(child)
        return _ended(code, log.read_text(encoding="utf-8", errors="replace"), answer)


def _ended(code: int, log: str, answer: Path) -> _Ended:
    """Read how a call ended from its exit code, its log and its answer."""
    if code in (0, ABSENT_CODE) and answer.exists():
        found = json.loads(answer.read_text())
        return _Ended("works", facts=found) if code == 0 else _Ended("absent", reason=str(found["reason"]))
    library = fatal_library(log) if died_by_itself(code) else ""
    said = last_words(log, 1) if code > 0 else []
    reason = f"it {how_it_ended(code)}" + (f" in {library}" if library else "") + "".join(f": {each}" for each in said)
    # Nothing is known of a runtime that was never called, or that somebody else ended.
    lasting = died_by_itself(code) or (code > 0 and code != PASSING_CODE and begun_mark(answer).exists())
    return _Ended("broken", reason=reason, library=library, lasting=lasting)


def begun_mark(answer: Path) -> Path:
    """Return the file that a child makes when it is about to call the runtime, beside its answer."""
    return answer.with_name("begun")


@cache
def _modules_called(name: str, _root: str) -> Mapping[str, Path]:
    """Return the modules of `steps` that a proof runs, by name; a process asks dozens of times."""
    from steps.frame.code import file_of, modules_behind

    def find(module: str) -> Path | None:
        return None if module in _FRAME or module.startswith(f"{_FRAME[0]}.") else file_of(module)

    return modules_behind(f"{proofs.__name__}.{name}", find)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extensions(module: str) -> list[Path]:
    """Return the native libraries of a module: itself, where it is one, or those in its package."""
    found = PathFinder.find_spec(module)
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    own = [Path(found.origin)] if found and found.origin and found.origin.endswith(".so") else []
    return own + [path for place in places for path in place.rglob("*.so")]


def _folders(module: str) -> list[Path]:
    # Not by what is loaded: a package that is hidden from this process, or was loaded from elsewhere, counts as well.
    found = PathFinder.find_spec(module)
    return [Path(place) for place in (found.submodule_search_locations or [])] if found else []
