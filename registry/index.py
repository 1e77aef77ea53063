"""The local index: finished steps by key and families by name, in small files that can be rebuilt from MLflow."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from steps.artifacts import write_atomic


class Entry(BaseModel):
    """A finished step: what it gave, what it cost, and where MLflow keeps it."""

    # A metric that is no number (the loss of a diverged training) must not make a finished step look damaged.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    key: str
    """The step's key: sha256 over everything that shapes its result."""
    recipe: str
    step: str
    """Name in the recipe."""
    kind: str
    """Step kind, e.g. `merge.adapter`."""
    likeness: str = ""
    """Digest of its settings and those of all steps before it; what `plan` predicts comes from steps that are alike."""
    outputs: Mapping[str, str]
    """Artifact digest by output name (empty where the step has one output)."""
    models: Mapping[str, str]
    """MLflow's model id by output name, for outputs that are models."""
    run_id: str
    metrics: Mapping[str, float] = {}
    """Last value of each metric."""
    notes: tuple[str, ...] = ()
    """What a person must know of the result, a sentence each."""
    seconds: float
    peak_memory: int
    """Bytes."""
    size: int
    """Bytes of all outputs."""
    finished_at: datetime


class Index:
    """Files under one root: `keys/<key>.json`, `families/<family>.json`, `pending/<key>`, `damaged/<digest>`,
    `locks/<name>`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def exists(self) -> bool:
        """Whether it was ever written; a lost index is rebuilt from MLflow, an empty one is trusted."""
        return (self.root / "keys").is_dir()

    def create(self) -> None:
        """Make the empty index."""
        (self.root / "keys").mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Entry | None:
        """Return the finished step with this key; None where there is none or its file is damaged."""
        return self._read(self.root / "keys" / f"{key}.json")

    def put(self, entry: Entry) -> None:
        """Add or replace an entry in one rename."""
        write_atomic(self.root / "keys" / f"{entry.key}.json", entry.model_dump_json(indent=1).encode())

    def entries(self, limit: int = 1000) -> list[Entry]:
        """Return the entries that finished last, newest first, at most `limit`."""
        paths = sorted((self.root / "keys").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[-limit:]
        found = [entry for path in paths if (entry := self._read(path))]
        return sorted(found, key=lambda entry: entry.finished_at, reverse=True)

    def begin(self, key: str) -> None:
        """Note that a step is being recorded: until `end`, MLflow may know more than the index."""
        write_atomic(self.root / "pending" / key, b"")

    def end(self, key: str) -> None:
        """Note that the index knows what became of the step."""
        (self.root / "pending" / key).unlink(missing_ok=True)

    def is_pending(self, key: str) -> bool:
        """Whether a record of this step was begun and not ended: its process was killed, or still runs."""
        return (self.root / "pending" / key).exists()

    def note_damage(self, digest: str, place: str, what: str) -> None:
        """Note that MLflow holds an artifact damaged at a place, a model or a run: only fetching it tells."""
        write_atomic(self.root / "damaged" / digest, f"{place}\n{what}".encode())

    def damage(self, digest: str, place: str) -> str:
        """Return what was found damaged there, empty where nothing was."""
        try:
            where, _, what = (self.root / "damaged" / digest).read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return ""
        return what if where == place else ""

    def forget_damage(self, digest: str) -> None:
        """Note that it was given anew, or was fetched whole."""
        (self.root / "damaged" / digest).unlink(missing_ok=True)

    def family(self, name: str) -> bytes | None:
        """Return the mirrored state of a family."""
        path = self.root / "families" / f"{name}.json"
        return path.read_bytes() if path.is_file() else None

    def put_family(self, name: str, content: bytes) -> None:
        """Mirror a family's state in one rename."""
        write_atomic(self.root / "families" / f"{name}.json", content)

    def families(self) -> list[str]:
        """Return the names of the mirrored families."""
        return sorted(path.stem for path in (self.root / "families").glob("*.json"))

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a name against every other thread and process of this machine; a killed holder releases it."""
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _read(path: Path) -> Entry | None:
        try:
            return Entry.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
