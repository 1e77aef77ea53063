"""The manifest: what an artifact is, what it is made of and where it comes from, in `artifact.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from steps.artifacts.tree import FileDigest

MANIFEST_NAME = "artifact.json"


def canonical_json(value: Any) -> bytes:
    """Serialise to the one JSON text that equal values share: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Parent(BaseModel):
    """An artifact that this one was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    digest: str


class Manifest(BaseModel):
    """The content of `artifact.json`.

    An artifact's digest is the sha256 of the manifest's bytes, as in an OCI image: it fixes the files (through
    `tree`), the lineage and the facts at once. Nothing in it depends on the clock or the machine, so the same work
    ends in the same digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    kind: str
    """Artifact kind, e.g. `Model`."""
    tree: str
    """sha256 of the files, see `steps.artifacts.tree.Tree`."""
    files: Mapping[str, FileDigest]
    parents: Mapping[str, Parent]
    """Input artifacts by role (`model`, `data`, `candidates.0`, ...)."""
    step: str
    """Step kind that made it, e.g. `merge.adapter`."""
    output: str
    """Name of the output within the step; empty where the step has only one."""
    key: str
    """The step's key: sha256 over everything that shapes the result."""
    config: Mapping[str, Any]
    libraries: Mapping[str, str]
    """Versions of the libraries that shaped the result."""
    facts: Mapping[str, Any]
    """What a later step must know without opening the files; typed by the kind's `Facts`."""

    def to_bytes(self) -> bytes:
        """Return the canonical bytes that are written and digested."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @property
    def digest(self) -> str:
        """sha256 of `to_bytes()`; what `sha256sum artifact.json` prints."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the artifact's files."""
        return sum(entry.size for entry in self.files.values())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read `artifact.json` from an artifact's directory.

        Raises:
            FileNotFoundError: there is no manifest.
            pydantic.ValidationError: it is not a manifest.
        """
        return cls.model_validate_json((directory / MANIFEST_NAME).read_bytes())
