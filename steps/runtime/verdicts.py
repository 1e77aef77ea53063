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
    return _read(_path(all_proofs()[runtime]))


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
        verdict = last_verdict(proof.runtime) if proof.runtime != but else None
        if verdict and verdict.status == "broken" and proof.module != _ALWAYS:
            sys.modules.setdefault(proof.module, None)  # pyright: ignore[reportArgumentType]


def _prove_and_keep(proof: Proof) -> Verdict:
    earlier, verdict = last_verdict(proof.runtime), prove(proof)
    if others := [other for other in all_proofs().values() if other.module == verdict.library != proof.module]:
        # It died of what it imports: that is broken, and this may do without.
        for other in others:
            _prove_and_keep(other)
        verdict = prove(proof)
    if earlier and verdict.facts and "fast_dtype" in earlier.facts:
        # Measured once: a choice that wavers would change the keys of steps.
        facts = {**verdict.facts, "fast_dtype": earlier.facts["fast_dtype"]}
        verdict = verdict.model_copy(update={"facts": facts})
    _write(_path(proof), verdict)
    return verdict


def _path(proof: Proof) -> Path:
    return folder() / machine() / f"{proof.name}-{proof.identity()}.json"


def _read(path: Path) -> Verdict | None:
    """Return a verdict; one that cannot be read counts as none."""
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, verdict: Verdict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(verdict.model_dump_json(indent=1))
    partial.replace(path)
