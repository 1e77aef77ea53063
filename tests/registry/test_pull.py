"""Pull from the local registry: verified, atomic, resumed, and never over somebody's files."""

import hashlib
import shutil
from pathlib import Path

import pytest

from registry.errors import RegistryError
from registry.family import publish
from registry.gates import GateDecision
from registry.pull import parse_reference, pull
from tests.registry.workshop import Workshop

YES = GateDecision(promote=True, sentence="Promoted.")


@pytest.fixture
def published(workshop: Workshop) -> Workshop:
    """A home with one published family: a model and a GGUF of it."""
    execution = workshop.begin()
    model = workshop.model()
    made = {"merged": model, "gguf": workshop.gguf(model, "Q4_K_M")}
    members = [(role, each.digest, execution.record(workshop.step(role, each))) for role, each in made.items()]
    publish(execution, "pico", members, YES)
    execution.finish()
    return workshop


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_is_pulled_with_files_of_its_own(published: Workshop, tmp_path: Path) -> None:
    to = tmp_path / "deep" / "model"
    result = pull(published.home, "pico", "hf", to)
    assert {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()} == {
        "artifact.json",
        "config.json",
        "model.safetensors",
        "tokenizer/vocab.json",
    }
    assert digest_of(to / "artifact.json") == result.digest
    assert (to / "model.safetensors").stat().st_nlink == 1, "who edits a pulled file must not edit the store"
    assert list(to.parent.iterdir()) == [to]
    again = pull(published.home, "pico@1", None, to)
    assert again.already_there
    assert again.digest == result.digest


def test_a_gguf_is_one_file_and_its_manifest(published: Workshop, tmp_path: Path) -> None:
    published.home.database.unlink()
    result = pull(published.home, "pico@champion", "gguf:Q4_K_M", tmp_path / "x")
    assert result.files == ("Q4_K_M.gguf",)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["Q4_K_M.gguf", "artifact.json"]
    assert result.member == "pico-GGUF:Q4_K_M"
    assert result.as_plain()["path"] == str(tmp_path / "x")


def test_an_interrupted_pull_goes_on(published: Workshop, tmp_path: Path) -> None:
    to = tmp_path / "x"
    whole = pull(published.home, "pico", "hf", to)
    staging = tmp_path / f".x.pulling-{whole.digest[:16]}"
    to.rename(staging)
    (staging / "model.safetensors").write_bytes(b"half")
    (staging / "stranger").write_bytes(b"")
    kept = (staging / "tokenizer" / "vocab.json").stat().st_ino
    result = pull(published.home, "pico", "hf", to)
    assert result.resumed == len(b"{}") * 2
    assert (to / "tokenizer" / "vocab.json").stat().st_ino == kept
    assert not (to / "stranger").exists()
    assert pull(published.home, "pico", "hf", to).already_there


def test_a_damaged_store_is_healed_from_mlflow_or_refused(published: Workshop, tmp_path: Path) -> None:
    weights = next(published.home.store.root.glob("*/model.safetensors"))
    shutil.rmtree(weights.parent)
    assert pull(published.home, "pico", "hf", tmp_path / "healed").files
    linked = next(published.home.mlruns.rglob("model.safetensors"))
    linked.chmod(0o644)
    linked.write_bytes(b"flip" + linked.read_bytes()[4:])
    with pytest.raises(RegistryError, match=r"`model.safetensors` of artifact .* is damaged"):
        pull(published.home, "pico", "hf", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_somebodys_files_are_left_alone(published: Workshop, tmp_path: Path) -> None:
    to = tmp_path / "x"
    to.mkdir()
    pull(published.home, "pico", "gguf:Q4_K_M", to)  # an empty directory is taken
    with pytest.raises(RegistryError, match=r"x holds another artifact \(quantize.gguf, \w{12}\)"):
        pull(published.home, "pico", "hf", to)
    (to / "Q4_K_M.gguf").chmod(0o644)
    (to / "Q4_K_M.gguf").write_bytes(b"mine")
    with pytest.raises(RegistryError, match=r"`Q4_K_M\.gguf` was changed"):
        pull(published.home, "pico", "gguf:Q4_K_M", to)
    (to / "artifact.json").unlink()
    with pytest.raises(RegistryError, match="x is not empty; give another directory"):
        pull(published.home, "pico", "gguf:Q4_K_M", to)
    assert (to / "Q4_K_M.gguf").read_bytes() == b"mine"
    with pytest.raises(RegistryError, match="is a file"):
        pull(published.home, "pico", "hf", to / "Q4_K_M.gguf")


def test_references() -> None:
    assert parse_reference("pico") == ("pico", "champion")
    assert parse_reference("pico@3") == ("pico", "3")
    for bad in ("", "@3", "pico@"):
        with pytest.raises(RegistryError, match="names no model"):
            parse_reference(bad)
