"""The last verdict on every native runtime, for each kind of machine that uses this environment.

They lie beside the packages that they are about, so every home and every run reads the same: a file each, named for the
machine, the runtime and the libraries that were called. Where one of these was replaced, or another processor runs
it, there is no such file, and the runtime is unproven.
"""

import os
import sys
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from steps.runtime.gpus import gpus_identity
from steps.runtime.processor import this_processor
from steps.runtime.proof import Proof, Verdict, all_proofs, prove

_ALWAYS = "torch"
"""The package without which nothing works: it is never hidden."""


def folder() -> Path:
    """Return where verdicts lie: in the environment, or in the user's cache where that cannot be written."""
    beside = Path(sys.prefix) / "share" / "posttrain"
    if os.access(beside if beside.exists() else sys.prefix, os.W_OK):
        return beside / "doctor"
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "posttrain" / "doctor" / sha256(sys.prefix.encode()).hexdigest()[:16]


def machine() -> str:
    """Return the identity of this kind of machine: its processor and its GPUs."""
    return sha256(f"{this_processor().identity} {gpus_identity()}".encode()).hexdigest()[:16]


def last_verdict(runtime: str) -> Verdict | None:
    """Return what was last found of a runtime on this machine; None where it is unproven, or was replaced since."""
    path = _path(all_proofs()[runtime])
    return _of_this_process.get(path) or _read(path)


def is_broken(runtime: str) -> bool:
    """Whether a runtime was found broken on this machine."""
    verdict = last_verdict(runtime)
    return verdict is not None and verdict.status == "broken"


def prove_and_keep(runtimes: Iterable[str]) -> list[Verdict]:
    """Prove runtimes and keep the verdicts for this machine: what measures speed alone, of the others two at once."""
    chosen = [all_proofs()[name] for name in runtimes]
    measuring = [_prove_and_keep(proof) for proof in chosen if proof.measures]
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(_prove_and_keep, (proof for proof in chosen if not proof.measures)))
    found = {verdict.runtime: verdict for verdict in (*measuring, *others)}
    return [found[proof.runtime] for proof in chosen]


def hide_broken(but: str = "") -> None:
    """Keep this process from importing packages whose runtime is broken here, one runtime's own excepted.

    peft imports bitsandbytes, if it is there, and dies with it, whatever is trained; told that it is not there, it does
    without. Call it before anything heavy is imported.
    """
    for proof in all_proofs().values():
        if proof.runtime != but and proof.module != _ALWAYS and is_broken(proof.runtime):
            sys.modules.setdefault(proof.module, None)  # pyright: ignore[reportArgumentType]


def _prove_and_keep(proof: Proof) -> Verdict:
    verdict = prove(proof)
    if others := [other for other in all_proofs().values() if other.module == verdict.library != proof.module]:
        # It died of what it imports: that is broken, and this may do without.
        for other in others:
            _keep(other, prove(other))
        verdict = prove(proof)
    return _keep(proof, verdict)


def _keep(proof: Proof, verdict: Verdict) -> Verdict:
    """Keep a verdict, and what it chose as it was chosen first: a choice that wavers would change the keys of steps."""
    path = _path(proof)
    if "fast_dtype" in verdict.facts:
        values = [f"{name}={os.environ[name]}" for name in proof.variables if name in os.environ]
        told = sha256("\n".join([verdict.version, *values]).encode()).hexdigest()[:16]
        choice = path.with_name(f"{proof.name}-fast-dtype-{told}.txt")
        with suppress(OSError):
            verdict = verdict.model_copy(update={"facts": {**verdict.facts, "fast_dtype": choice.read_text().strip()}})
        _write(choice, str(verdict.facts["fast_dtype"]))
    _of_this_process[path] = verdict
    if verdict.lasting:
        _write(path, verdict.model_dump_json(indent=1))
    return verdict


def _path(proof: Proof) -> Path:
    return folder() / machine() / f"{proof.name}-{proof.identity()}.json"


def _read(path: Path) -> Verdict | None:
    """Return a verdict; one that cannot be read counts as none."""
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, content: str) -> None:
    """Write whole or not at all; where nothing can be written, the next process proves anew."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content)
        partial.replace(path)


_of_this_process: dict[Path, Verdict] = {}
"""Verdicts found in this process, also those that are not kept."""
