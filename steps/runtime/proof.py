"""How a native runtime is proven: a real call in a child process, so that what dies takes nobody with it.

A proof is one module `steps/runtime/proofs/NAME.py` with a `Proof` called PROOF and a function `prove()`, which calls
the runtime and returns figures or words about it. Heavy imports stand inside the function. Nothing else is edited.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from steps.runtime import proofs
from steps.runtime.death import fatal_library, how_it_ended

Facts = Mapping[str, float | str]
Status = Literal["works", "broken", "absent"]

_PATIENCE = 300.0
"""Seconds after which a proof counts as failed; the slowest takes some ten."""
ABSENT_CODE = 69
"""Exit code of a child whose runtime says that this machine lacks what it needs."""


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
    """What to do where it is broken, besides `make setup`."""
    optional: bool = False
    """Whether posttrain does without it unless a recipe asks for it."""
    measures: bool = False
    """Whether it measures a speed, so that nothing may run beside it."""
    variables: tuple[str, ...] = ()
    """Environment variables that change which libraries are opened; a folder as value stands for its files."""
    name: str = ""
    """Of its module, which `all_proofs` fills in."""
    fallbacks: Callable[[], Sequence[Mapping[str, str]]] = lambda: ()
    """Environments to try next where it dies, the best first; what works is kept by `settle`."""
    settle: Callable[[Sequence[Mapping[str, str]]], None] = lambda died: None
    """Remember in which environments it died, so that steps do not try them."""

    @property
    def version(self) -> str:
        """Installed version; empty where it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def identity(self) -> str:
        """Digest of which native libraries are installed, by name, size and time; tells that one was replaced."""
        values = [os.environ.get(name, "") for name in self.variables]
        found = [path for root in _folders(self.module) for pattern in self.libraries for path in root.glob(pattern)]
        found += [path for value in values if value and Path(value).is_dir() for path in Path(value).glob("*.so")]
        told = [self.version, *values]
        for path in sorted(found):
            stat = path.stat()
            told.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return sha256("\n".join(told).encode()).hexdigest()[:16]


class Verdict(BaseModel):
    """What became of a proof on one machine."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    runtime: str
    distribution: str
    status: Status
    version: str
    identity: str
    """Of the libraries that were called, see `Proof.identity`."""
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


@cache
def all_proofs() -> Mapping[str, Proof]:
    """Return every proof by its runtime's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(proofs.__path__))
    found = [replace(importlib.import_module(f"{proofs.__name__}.{name}").PROOF, name=name) for name in names]
    return {proof.runtime: proof for proof in found}


def prove(proof: Proof) -> Verdict:
    """Prove a runtime in a child process; where it dies, in the environments that it names as fallbacks."""
    began = time.monotonic()
    known = {"runtime": proof.runtime, "distribution": proof.distribution, "optional": proof.optional}
    if not proof.version:
        wanted = f"{proof.distribution} is not installed"
        advice = f"pip install {proof.distribution}" if proof.optional else "make setup"
        return Verdict(**known, status="absent", version="", identity="", reason=wanted, advice=advice)
    reason, library, facts, died = "", "", {}, []
    status: Status = "broken"
    for surroundings in ({}, *proof.fallbacks()):
        outcome, told = _call(proof, surroundings)
        if outcome != "broken":
            status, facts = outcome, told
            break
        died.append(surroundings)
        reason, library = reason or str(told["reason"]), library or str(told["library"])
    if status == "works":
        proof.settle(died)
    if status == "absent":
        reason = str(facts["reason"])
    return Verdict(
        **known,
        status=status,
        version=proof.version,
        identity=proof.identity(),
        facts={} if status == "absent" else facts,
        library=library if status == "broken" else "",
        reason=reason,
        advice=proof.advice if status == "broken" else "",
        seconds=round(time.monotonic() - began, 2),
    )


def _call(proof: Proof, surroundings: Mapping[str, str]) -> tuple[Status, dict[str, Any]]:
    """Call a proof once; return how it ended, with its facts or the reason."""
    with tempfile.TemporaryDirectory(prefix="posttrain-proof-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        command = [sys.executable, "-X", "faulthandler", "-m", "steps.runtime", proof.name, str(answer)]
        with log.open("wb") as stream:
            try:
                options = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "timeout": _PATIENCE}
                code = subprocess.run(command, env={**os.environ, **surroundings}, **options).returncode
            except subprocess.TimeoutExpired:
                return "broken", {"reason": f"it did not answer within {_PATIENCE:.0f} s", "library": ""}
        text = log.read_text(encoding="utf-8", errors="replace")
        if code in (0, ABSENT_CODE) and answer.exists():
            return "works" if code == 0 else "absent", json.loads(answer.read_text())
        library = fatal_library(text) if code < 0 else ""
        said = next((line for line in reversed(text.splitlines()) if line.strip()), "") if code > 0 else ""
        where = f" in {library}" if library else ""
        reason = f"it {how_it_ended(code)}{where}" + (f": {said.strip()}" if said else "")
        return "broken", {"reason": reason, "library": library}


def _folders(module: str) -> list[Path]:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (found.submodule_search_locations or [])] if found else []
