"""The store: published artifacts by digest, each complete or absent."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from steps.artifacts.kinds import Artifact, kind_named
from steps.artifacts.manifest import MANIFEST_NAME, Manifest
from steps.artifacts.tree import digest_tree


class CorruptArtifact(Exception):
    """An artifact's files are not what its manifest says."""


class Store:
    """Directories named by artifact digest under one root.

    A directory appears by one rename, so a reader sees all of an artifact or none; its files are read-only. Every
    process of one machine may share a store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Return where the artifact of this digest lies, or would lie."""
        return self.root / digest

    def has(self, digest: str) -> bool:
        """Whether a directory of that digest is there (its files unchecked)."""
        return (self.path(digest) / MANIFEST_NAME).is_file()

    def open(self, digest: str) -> Artifact[Any]:
        """Return the artifact without checking its files.

        Raises:
            FileNotFoundError: the store does not hold it.
        """
        path = self.path(digest)
        manifest = Manifest.read(path)
        return kind_named(manifest.kind)(path, manifest)

    def fault(self, digest: str) -> str | None:
        """Check every byte; return what is wrong in a few words, or None where all is as the manifest says."""
        path = self.path(digest)
        manifest = self._manifest(digest)
        if isinstance(manifest, str):
            return manifest
        if manifest.digest != digest:
            return f"{MANIFEST_NAME} was changed"
        found = digest_tree(path, exclude=frozenset({MANIFEST_NAME})).files
        for name in sorted(set(found) | set(manifest.files)):
            if name not in found:
                return f"{name} is missing"
            if name not in manifest.files:
                return f"{name} does not belong to it"
            if found[name] != manifest.files[name]:
                return f"{name} was changed"
        return None

    def quick_fault(self, digest: str) -> str | None:
        """Check names and sizes only, for a preview; a run checks every byte with `fault`."""
        manifest = self._manifest(digest)
        if isinstance(manifest, str):
            return manifest
        for name, entry in manifest.files.items():
            file = self.path(digest) / name
            if not file.is_file() or file.stat().st_size != entry.size:
                return f"{name} is missing or cut"
        return None

    def _manifest(self, digest: str) -> Manifest | str:
        """Return the manifest, or what is wrong with it."""
        if not self.has(digest):
            return "missing"
        try:
            return Manifest.read(self.path(digest))
        except ValueError:
            return f"{MANIFEST_NAME} is damaged"

    def verify(self, digest: str) -> Artifact[Any]:
        """Return the artifact, every byte checked.

        Raises:
            CorruptArtifact: it is missing or its files differ from the manifest.
        """
        if fault := self.fault(digest):
            raise CorruptArtifact(f"artifact {digest[:12]} in {self.root}: {fault}")
        return self.open(digest)

    def publish(self, staging: Path, manifest: Manifest) -> Artifact[Any]:
        """Move a complete staging directory into the store in one rename.

        Where the digest is already there and sound the staging directory is dropped; where it is there but damaged,
        it is replaced. `staging` must lie on the store's file system.

        Raises:
            OSError: the disk is full or the directory cannot be written; the store is as before.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        target = self.path(manifest.digest)
        _write_synced(staging / MANIFEST_NAME, manifest.to_bytes())
        for name in manifest.files:
            (staging / name).chmod(0o444)
        if target.exists():
            if self.fault(manifest.digest) is None:
                shutil.rmtree(staging)
                return self.open(manifest.digest)
            self.discard(manifest.digest)
        try:
            staging.rename(target)
        except OSError:
            # Another process published the same digest between the check and the rename.
            if self.fault(manifest.digest) is not None:
                raise
            shutil.rmtree(staging)
        _sync_directory(self.root)
        return self.open(manifest.digest)

    def discard(self, digest: str) -> None:
        """Remove an artifact: out of sight in one rename, then file by file."""
        path = self.path(digest)
        if not path.exists():
            return
        grave = self.root / f".discarded-{uuid.uuid4().hex}"
        path.rename(grave)
        shutil.rmtree(grave)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    path.chmod(0o444)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
