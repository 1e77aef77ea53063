"""Pull: a member of a family, fetched, verified and put where the user wants it."""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from registry.errors import Damaged, RegistryError
from registry.family import resolve
from registry.home import Home
from registry.index import Index
from registry.location import LocalLocation, Location, bring, read_manifest
from registry.members import Member
from registry.tracking import Tracking
from steps.artifacts import MANIFEST_NAME, Manifest, digest_tree


class PullResult(BaseModel):
    """What was pulled and where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str
    """Its name by convention, e.g. `smollm2-stdlib-GGUF:Q4_K_M`."""
    version: int
    digest: str
    path: Path
    files: tuple[str, ...]
    size: int
    """Bytes of the files."""
    resumed: int = 0
    """Bytes that an interrupted pull had left."""
    already_there: bool = False

    def as_plain(self) -> dict[str, Any]:
        """Return JSON values, for `--json`."""
        return self.model_dump(mode="json")


def parse_reference(text: str) -> tuple[str, str]:
    """Split `FAMILY`, `FAMILY@champion` or `FAMILY@3` into family and reference; `champion` by default.

    Raises:
        RegistryError: it is neither.
    """
    family, at, reference = text.partition("@")
    if not family or (at and not reference):
        raise RegistryError(f"`{text}` names no model; write FAMILY, FAMILY@champion or FAMILY@VERSION")
    return family, reference or "champion"


def pull(home: Home, reference: str, format: str | None, to: Path) -> PullResult:
    """Put a member's files and its manifest into a directory, each byte verified.

    The files are the directory's own, not links into the store: who edits them damages nothing. They are gathered in
    a hidden directory beside `to`, which the next call goes on with if this one is cut off, and appear in one rename.

    Args:
        home: whose registry is asked.
        reference: `FAMILY`, `FAMILY@ALIAS` or `FAMILY@VERSION`.
        format: `hf`, `adapter`, `gguf:Q4_K_M`, `gptq-int4`, ...; None for the principal member.
        to: directory to make. An empty one is taken; one that holds exactly this is left as it is.

    Raises:
        RegistryError: there is no such model, `to` holds something else, or the model is damaged where it is kept.
        OSError: the disk is full or the place cannot be written; `to` is as before.
    """
    member = resolve(home, *parse_reference(reference), format)
    to = to.expanduser().absolute()
    location = _source(home, member)
    manifest = read_manifest(location, member.digest)
    files = _wanted(member, manifest)
    size = sum(manifest.files[name].size for name in files)
    result = PullResult(
        member=member.name, version=member.version, digest=member.digest, path=to, files=files, size=size
    )
    if _occupied(to):
        _expect(to, member, manifest, files)
        return result.model_copy(update={"already_there": True})
    staging = to.with_name(f".{to.name}.pulling-{member.digest[:16]}")
    staging.mkdir(parents=True, exist_ok=True)
    _drop_strangers(staging, files)
    try:
        resumed = bring(location, manifest, list(files), staging, own=True)
    except Damaged as error:
        Index(home.index).note_damage(member.digest, member.model_id, str(error))
        raise
    (staging / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    _settle(staging)
    staging.rename(to)
    return result.model_copy(update={"resumed": resumed})


def _source(home: Home, member: Member) -> Location:
    """Return where to take the files from: the local store if it holds them sound, else MLflow."""
    store = home.store
    if store.has(member.digest) and store.fault(member.digest) is None:
        return LocalLocation(store.path(member.digest))
    return Tracking(home).of_model(member.model_id, member.digest)


def _wanted(member: Member, manifest: Manifest) -> tuple[str, ...]:
    """Return the files to hand out: of a GGUF the one file that runtimes load, else all."""
    if member.format == "gguf":
        return tuple(sorted(name for name in manifest.files if name.endswith(".gguf")))
    return tuple(sorted(manifest.files))


def _occupied(to: Path) -> bool:
    if to.exists() and not to.is_dir():
        raise RegistryError(f"{to} is a file; give a directory")
    return to.is_dir() and any(to.iterdir())


def _expect(to: Path, member: Member, manifest: Manifest, files: tuple[str, ...]) -> None:
    """Refuse a directory that holds anything but the member."""
    advice = "give another directory, or remove this one"
    try:
        held = Manifest.read(to)
    except (OSError, ValueError):
        raise RegistryError(f"{to} is not empty; {advice}") from None
    if held.digest != member.digest:
        raise RegistryError(f"{to} holds another artifact ({held.step}, {held.digest[:12]}); {advice}")
    found = digest_tree(to, exclude=frozenset({MANIFEST_NAME})).files
    for name in sorted({*found, *files}):
        if name not in found or name not in files or found[name] != manifest.files[name]:
            raise RegistryError(f"{to} holds {member.name}, but `{name}` was changed; {advice}")


def _drop_strangers(staging: Path, files: tuple[str, ...]) -> None:
    for path in [path for path in staging.rglob("*") if path.is_file() or path.is_symlink()]:
        if path.is_symlink() or path.relative_to(staging).as_posix() not in files:
            path.unlink()


def _settle(folder: Path) -> None:
    """Bring the files to disk, so that the rename cannot come before them in a power cut."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
