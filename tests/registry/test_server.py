"""The team case: a real MLflow server on loopback, one home that publishes and empty homes that find and pull."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from registry.champions import replay
from registry.errors import Lost
from registry.family import family_names, load, publish, resolve, rollback
from registry.gates import GateDecision
from registry.home import Home
from registry.members import Release
from registry.pull import pull
from registry.record import Recorder
from registry.versions import read_family, versions_of
from steps.artifacts import MANIFEST_NAME
from tests.registry.workshop import Workshop

YES = GateDecision(promote=True, sentence="Promoted.")


@pytest.fixture(scope="module")
def server_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the server."""
    return tmp_path_factory.mktemp("server")


@contextmanager
def serving(root: Path, migrated: Path, destination: str, **more: str) -> Iterator[str]:
    """Yield the URI of a server that proxies artifacts, which lie at `destination`; `more` is its environment."""
    shutil.copyfile(migrated, root / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--artifacts-destination", destination]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (root / "log.txt").open("wb") as log:
        # Without its job workers (LLM judges and the like) the server is one process and up in a third of the time.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **more}
        process = subprocess.Popen(
            [*command, *store], stdout=log, stderr=log, cwd=root, env=environment, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(f"{uri}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                assert process.poll() is None, (root / "log.txt").read_text()
                time.sleep(0.1)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def server(server_root: Path, migrated: Path) -> Iterator[str]:
    """URI of a server that proxies artifacts, which lie beside it."""
    with serving(server_root, migrated, str(server_root / "artifacts")) as uri:
        yield uri


def released(workshop: Workshop, family: str, seed: bytes) -> Release:
    execution = workshop.begin(family)
    model, data = workshop.model(seed), workshop.dataset()
    execution.record(workshop.step("data", data))
    merged = execution.record(workshop.step("merged", model, inputs={"data": data}))
    gguf = workshop.gguf(model, "Q4_K_M")
    quantized = execution.record(workshop.step("gguf[Q4_K_M]", gguf, inputs={"model": model}))
    members = [("merged", model.digest, merged), ("gguf[Q4_K_M]", gguf.digest, quantized)]
    release = publish(execution, family, members, YES)
    execution.finish()
    return release


def test_what_one_machine_publishes_another_finds_fetches_and_pulls(server: str, tmp_path: Path) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    release = released(here, "team", b"one")
    there = Home.at(tmp_path / "there", server)
    assert family_names(there) == ["team"]
    member = resolve(there, "team", "champion", "gguf:Q4_K_M")
    assert (member.digest, member.scheme) == (release.members[1].digest, "Q4_K_M")

    recorder = Recorder(there)
    entry = recorder.find(member.key)
    assert entry
    assert entry == here.recorder.index.get(member.key)
    assert recorder.index.get(member.key) == entry, "what was found is indexed"
    assert recorder.fetch(member.digest, entry).size == member.size
    assert there.store.fault(member.digest) is None
    data = here.dataset()
    prepared = recorder.find(data.manifest.key)
    assert prepared
    recorder.fetch(data.digest, prepared)
    assert (there.store.path(data.digest) / "rows.jsonl").read_bytes() == data.rows_file.read_bytes()
    assert recorder.find("0" * 64) is None

    result = pull(Home.at(tmp_path / "third", server), "team", "hf", tmp_path / "pulled")
    assert result.digest == release.members[0].digest
    assert (tmp_path / "pulled" / "tokenizer" / "vocab.json").read_bytes() == b"{}"
    assert not (tmp_path / "third" / "artifacts").exists()
    run = recorder.tracking.client.get_run(member.run_id)
    assert run.inputs
    assert [each.model_id for each in run.inputs.model_inputs] == [release.members[0].model_id]


def test_a_download_that_was_cut_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    release = released(here, "cut", b"two")
    away, to = Home.at(tmp_path / "away", server), tmp_path / "x"
    weights = (here.home.store.path(release.members[0].digest) / "model.safetensors").read_bytes()
    staging = tmp_path / f".x.pulling-{release.members[0].digest[:16]}"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(weights[:1234])
    assert pull(away, "cut", "hf", to).resumed == 1234
    assert (to / "model.safetensors").read_bytes() == weights

    to.rename(staging)
    (staging / "model.safetensors").write_bytes(b"x" * 1234)  # no prefix of the file: fetched whole
    assert pull(away, "cut", "hf", to).resumed == len(b"{}") * 2
    assert (to / "model.safetensors").read_bytes() == weights


def test_recording_again_uploads_nothing_and_rollback_works(server: str, tmp_path: Path) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    one, again = released(here, "back", b"three"), released(here, "back", b"three")
    assert [member.model_id for member in again.members] == [member.model_id for member in one.members]
    two = released(here, "back", b"four")
    assert load(here.home, "back").aliases == {
        "candidate": two.version,
        "champion": two.version,
        "previous": one.version,
    }
    assert rollback(here.recorder, "back").id == one.id
    assert load(here.home, "back").aliases == {"candidate": two.version, "champion": one.version}


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.recipes)])
def test_of_two_machines_that_publish_at_once_none_promotes_what_did_not_meet_the_champion(
    rounds: int, server: str, tmp_path: Path
) -> None:
    """Two processes with homes of their own; a third asks all the while who is champion."""
    family = "race"
    command = [sys.executable, "-m", "tests.registry.publishing_process", server]
    lines = [[*command, str(tmp_path / name), str(rounds)] for name in ("one", "two")]
    machines = [subprocess.Popen(each, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for each in lines]
    watcher = Recorder(Home.at(tmp_path / "three", server))
    if read_family(watcher.tracking, family):
        watcher.tracking.client.delete_registered_model(family)
    for machine in machines:
        assert machine.stdout and machine.stdin and machine.stdout.readline() == "ready\n"
    for machine in machines:
        assert machine.stdin
        machine.stdin.write("go\n")
        machine.stdin.close()
    seen: list[int] = []
    while any(machine.poll() is None for machine in machines):
        found = read_family(watcher.tracking, family)
        if found and "champion" in found.aliases:
            seen.append(found.release("champion").version)
    assert [machine.returncode for machine in machines] == [0, 0]

    found = read_family(watcher.tracking, family)
    assert found
    registered = watcher.tracking.client.get_registered_model(family)
    own, moves = (versions_of(watcher.tracking, name) for name in (family, f"{family}.champions"))
    standings = replay(registered, own, moves)
    champions = [standing.champion for standing in standings[1:]]
    assert found.aliases["champion"] == champions[-1] == int(registered.aliases["champion"])
    releases = {release.version: release for release in found.releases}
    assert len(releases) == 2 * rounds
    before: list[int | None] = [None, *champions[:-1]]
    for version, met in zip(champions, before, strict=True):
        decision = releases[version].decision if version else None
        assert decision and decision.promote
        assert decision.against == met, "it met another than the one that it follows"
    promoted = {version for version, release in releases.items() if release.decision and release.decision.promote}
    assert promoted == set(champions)
    assert [version for index, version in enumerate(seen) if index == 0 or seen[index - 1] != version] == [
        version for version in champions if version in seen
    ], "each was champion once, in the order of the log"


def test_a_record_that_failed_is_made_whole(server: str, tmp_path: Path) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    execution, model = here.begin("failed"), here.model(b"five")
    away = (model.path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        execution.record(here.step("base", model))
    assert here.recorder.find(model.manifest.key) is None
    away.rename(model.path / "model.safetensors")
    entry = execution.record(here.step("base", model))
    shutil.rmtree(here.home.store.root)
    assert here.recorder.fetch(model.digest, entry).digest == model.digest


def test_a_model_damaged_on_the_server_is_refused_and_given_again(
    server: str, server_root: Path, tmp_path: Path
) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    release = released(here, "damaged", b"six")
    member = release.members[0]
    (weights,) = server_root.glob(f"artifacts/**/{member.model_id}/artifacts/model.safetensors")
    sound = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(b"flip" + sound[4:])
    with pytest.raises(Lost, match="is damaged in MLflow's store"):
        pull(Home.at(tmp_path / "away", server), "damaged", "hf", tmp_path / "x")
    assert not (tmp_path / "x").exists()

    # Only fetching it tells; who has done so knows it from then on, and makes it again.
    there = Workshop(Home.at(tmp_path / "there", server))
    entry = there.recorder.find(member.key)
    assert entry and not there.recorder.lost(member.digest, entry)
    with pytest.raises(Lost, match="is damaged in MLflow's store"):
        there.recorder.fetch(member.digest, entry)
    assert "is damaged in MLflow's store" in there.recorder.lost(member.digest, entry)
    execution = there.begin("damaged")
    assert execution.record(there.step("merged", there.model(b"six"))) == entry
    assert weights.read_bytes() == sound, "in its place: the release has it again"
    assert not there.recorder.lost(member.digest, entry)
    assert pull(Home.at(tmp_path / "away", server), "damaged", "hf", tmp_path / "x").digest == member.digest


def test_what_a_server_lost_of_a_release_is_given_again_by_who_publishes_it(
    server: str, server_root: Path, tmp_path: Path
) -> None:
    here = Workshop(Home.at(tmp_path / "here", server))
    member = released(here, "given", b"seven").members[0]
    (weights,) = server_root.glob(f"artifacts/**/{member.model_id}/artifacts/model.safetensors")
    weights.unlink()
    (weights.parent / MANIFEST_NAME).unlink()
    execution = here.begin("given")
    entry = here.recorder.find(member.key)
    assert entry
    again = publish(execution, "given", [("merged", member.digest, entry)], YES)
    assert again.members[0].model_id == member.model_id
    assert pull(Home.at(tmp_path / "away", server), "given", "hf", tmp_path / "x").digest == member.digest

    weights.unlink()
    shutil.rmtree(here.home.store.root)
    with pytest.raises(Lost, match=r"`model\.safetensors` cannot be fetched"):
        publish(here.begin("given"), "new", [("merged", member.digest, entry)], YES)
    assert "new" not in family_names(here.home) or not load(here.home, "new").aliases
