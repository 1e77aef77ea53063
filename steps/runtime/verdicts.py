"""The last verdict on every native runtime, for each kind of machine that uses this environment.

They lie beside the packages that they are about, so every home and every run reads the same: a file each, named for the
machine, the runtime, the libraries that were called and the code that called them. Where one of these was replaced, or
another processor runs it, there is no such file, and the runtime is unproven.
"""

import os
import sys
import tempfile
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from steps.runtime.children import children
from steps.runtime.gpus import device_files, gpus_identity
from steps.runtime.processor import this_processor
from steps.runtime.proof import Proof, Verdict, all_proofs, prove

BROKEN = "POSTTRAIN_BROKEN"
"""Environment variable in which a run tells its processes which runtimes it found broken, separated by commas."""
_PRECISIONS = ("bfloat16", "float32")
_LOOK_SECONDS = 0.5
_ALWAYS = "torch"
"""The package without which nothing works: it is never hidden."""


def folder() -> Path:
    """Return where verdicts lie: in the environment, or in the user's cache where that cannot be written."""
    beside = Path(sys.prefix) / "share" / "posttrain"
    if os.access(beside if beside.exists() else sys.prefix, os.W_OK):
        return beside / "doctor"
    try:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # A user without a home, as containers run things.
        cache_home = Path(tempfile.gettempdir())
    return cache_home / "posttrain" / "doctor" / sha256(sys.prefix.encode()).hexdigest()[:16]


def machine() -> str:
    """Return the identity of this kind of machine: its processor and its GPUs."""
    return sha256(f"{this_processor().identity} {gpus_identity()} {device_files()}".encode()).hexdigest()[:16]


def last_verdict(runtime: str) -> Verdict | None:
    """Return what was last found of a runtime on this machine; None where it is unproven, or was replaced since."""
    path = _path(all_proofs()[runtime])
    return _of_this_process.get(path) or _read(path)


def is_broken(runtime: str) -> bool:
    """Whether a runtime was found broken on this machine, or by the run that this process belongs to."""
    verdict = last_verdict(runtime)
    return runtime in _told_broken() or (verdict is not None and verdict.status == "broken")


def broken_here() -> str:
    """Return the names of the broken runtimes as processes of a run tell each other, in the variable `BROKEN`.

    What was found is not always kept, and a child to which other GPUs are granted would look for another verdict.
    """
    return ",".join(name for name in all_proofs() if is_broken(name))


def _told_broken() -> list[str]:
    return os.environ.get(BROKEN, "").split(",")


def prove_and_keep(runtimes: Iterable[str]) -> list[Verdict]:
    """Prove runtimes and keep the verdicts for this machine: what measures speed alone, of the others two at once."""
    chosen = [all_proofs()[name] for name in runtimes]
    with ThreadPoolExecutor(2) as pool, children.together():
        measuring = [_prove_and_keep(proof) for proof in chosen if proof.measures]
        others = [pool.submit(_prove_and_keep, proof) for proof in chosen if not proof.measures]
        # A signal that comes just before a wait without end is seen at its end only: Ctrl-C would be lost.
        while wait(others, _LOOK_SECONDS).not_done:
            pass
    found = {verdict.runtime: verdict for verdict in (*measuring, *(each.result() for each in others))}
    return [found[proof.runtime] for proof in chosen]


def hide_broken(but: str = "") -> None:
    """Keep this process from importing packages whose runtime is broken here, one runtime's own excepted.

    peft imports bitsandbytes, if it is there, and dies with it, whatever is trained; told that it is not there, it does
    without. Call it before anything heavy is imported.
    """
    for proof in all_proofs().values():
        if proof.runtime != but and proof.module != _ALWAYS and (is_broken(proof.runtime) or _is_useless(proof)):
            sys.modules.setdefault(proof.module, None)  # pyright: ignore[reportArgumentType]


def _is_useless(proof: Proof) -> bool:
    """Whether a package is installed on a machine that lacks what it needs: imported by others, it may die of that."""
    verdict = last_verdict(proof.runtime)
    return verdict is not None and verdict.status == "absent" and bool(verdict.version)


def _prove_and_keep(proof: Proof) -> Verdict:
    verdict = prove(proof, {BROKEN: broken_here()})
    if others := [other for other in all_proofs().values() if other.module == verdict.library != proof.module]:
        # It died of what it imports: that is broken, and this may do without.
        for other in others:
            _keep(other, prove(other, {BROKEN: broken_here()}))
        verdict = prove(proof, {BROKEN: broken_here()})
    return _keep(proof, verdict)


def _keep(proof: Proof, verdict: Verdict) -> Verdict:
    """Keep a verdict for the libraries that were called, which may have been replaced meanwhile."""
    path = _path(proof, verdict.identity)
    if "fast_dtype" in verdict.facts:
        measured = str(verdict.facts["fast_dtype"])
        kept = _keep_choice(proof, measured)
        again = {} if kept == measured else {"faster_this_time": measured}
        verdict = verdict.model_copy(update={"facts": {**verdict.facts, "fast_dtype": kept, **again}})
    _of_this_process[path] = verdict
    if verdict.lasting:
        _write(path, verdict.model_dump_json(indent=1))
    return verdict


def kept_choice(runtime: str) -> str:
    """Return the precision that was measured to be the faster one on this machine; empty where none was."""
    try:
        text = _choice_path(all_proofs()[runtime]).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text if text in _PRECISIONS else ""


def _keep_choice(proof: Proof, measured: str) -> str:
    """Keep which precision is the faster one, if no process did before; a choice that wavers would change keys."""
    path = _choice_path(proof)
    if kept_choice(proof.runtime):
        return kept_choice(proof.runtime)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(measured)
        if path.exists():
            # Emptied, or damaged.
            partial.replace(path)
        else:
            # Of two processes at once the first decides.
            with suppress(FileExistsError):
                os.link(partial, path)
        partial.unlink(missing_ok=True)
    return kept_choice(proof.runtime) or measured


def _choice_path(proof: Proof) -> Path:
    values = [f"{name}={os.environ[name]}" for name in proof.variables if name in os.environ]
    told = sha256("\n".join([proof.version, *values]).encode()).hexdigest()[:16]
    return folder() / machine() / f"{proof.name}-fast-dtype-{told}.txt"


def _path(proof: Proof, identity: str = "") -> Path:
    return folder() / machine() / f"{proof.name}-{identity or proof.identity()}.json"


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
