"""A server whose artifacts lie elsewhere, as in S3: what it answers for files that are gone or not to be had.

The store behind it is another MLflow server; like any that is not a folder of its own it is asked through its API.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from registry.errors import Lost, RegistryError
from registry.home import Home
from registry.index import Entry
from registry.record import Recorder
from steps.artifacts import Artifact
from tests.registry.test_server import serving
from tests.registry.workshop import Workshop


class Distant:
    """A server, and the store behind it that can go away."""

    def __init__(self, root: Path, migrated: Path) -> None:
        self.root = root
        self._store, self._server = ExitStack(), ExitStack()
        for name in ("store", "server"):
            (root / name).mkdir()
        store = self._store.enter_context(serving(root / "store", migrated, str(root / "artifacts")))
        behind = f"{store}/api/2.0/mlflow-artifacts/artifacts/far"
        # Its own client would ask an absent store for minutes.
        patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        self.uri = self._server.enter_context(serving(root / "server", migrated, behind, **patience))

    def go_away(self) -> None:
        """Stop the store; the server stays."""
        self._store.close()

    def end(self) -> None:
        """Stop both."""
        self._server.close()
        self._store.close()

    def file(self, name: str) -> Path:
        """Where the store keeps the only file of this name."""
        (found,) = (self.root / "artifacts").rglob(name)
        return found

    def recorded(self, home: Path) -> tuple[Artifact[Any], Entry]:
        """Record a model from a home of its own."""
        workshop = Workshop(Home.at(home, self.uri))
        execution, model = workshop.begin("far"), workshop.model(b"far")
        entry = execution.record(workshop.step("merged", model))
        execution.finish()
        return model, entry


@pytest.fixture
def distant(tmp_path: Path, migrated: Path) -> Iterator[Distant]:
    distant = Distant(tmp_path, migrated)
    yield distant
    distant.end()


def test_what_is_gone_is_told_from_what_gives_no_answer(distant: Distant, tmp_path: Path) -> None:
    model, entry = distant.recorded(tmp_path / "one")
    other = Recorder(Home.at(tmp_path / "other", distant.uri))
    assert other.find(entry.key) == entry
    assert not other.lost(model.digest, entry)

    weights, settings = (distant.file(name) for name in ("model.safetensors", "vocab.json"))
    aside = weights.rename(tmp_path / "weights")
    assert other.lost(model.digest, entry).startswith("MLflow no longer holds `model.safetensors` of artifact")
    with pytest.raises(Lost, match=r"`model\.safetensors` is not in http"):
        other.fetch(model.digest, entry)
    shutil.copyfile(aside, weights)
    settings.write_bytes(b"{")
    assert "`tokenizer/vocab.json`" in (why := other.lost(model.digest, entry))
    assert why.endswith("is damaged in MLflow's store: 1 of 2 bytes")
    settings.write_bytes(b"{}")
    weights.write_bytes(b"")
    assert other.lost(model.digest, entry).endswith("store: 0 of 3000 bytes")
    shutil.copyfile(aside, weights)
    assert other.fetch(model.digest, entry).digest == model.digest

    # The run says that the step is finished: without an answer for its files it is not to be made again.
    empty = Recorder(Home.at(tmp_path / "empty", distant.uri))
    distant.file("entry.json").rename(tmp_path / "entry")
    assert empty.find(entry.key) is None
    distant.go_away()
    with pytest.raises(RegistryError, match=r"cannot be listed \(the server answers 500 .*\)$") as refused:
        empty.find(entry.key)
    assert not isinstance(refused.value, Lost)
    shutil.rmtree(other.home.store.root)
    assert other.lost(model.digest, entry) == "", "no answer is no loss"
