"""Where a rollback leads: back through the champions that were good, also past deleted ones and after a kill."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from registry.champions import Champions, Standing
from registry.errors import RegistryError
from registry.family import load, promote, publish, resolve, rollback
from registry.gates import GateDecision
from registry.members import Release
from registry.registrar import Registrar
from tests.registry.workshop import Workshop

YES = GateDecision(promote=True, sentence="Promoted: it is better.")
NO = GateDecision(promote=False, sentence="Not promoted: it is worse.")

Publishes = Callable[..., Release]


@pytest.fixture
def night(workshop: Workshop) -> Publishes:
    """Publish a model of one member as a night does."""

    def night(seed: bytes, decision: GateDecision = YES) -> Release:
        execution = workshop.begin()
        model = workshop.model(seed)
        entry = execution.record(workshop.step("merged", model))
        release = publish(execution, "pico", [("merged", model.digest, entry)], decision)
        execution.finish()
        return release

    return night


def aliases(workshop: Workshop) -> dict[str, int]:
    """What everyone is served, and what MLflow's page shows: the same."""
    shown = workshop.recorder.tracking.client.get_registered_model("pico").aliases
    served = dict(load(workshop.home, "pico").aliases)
    assert {name: int(version) for name, version in shown.items()} == served
    return {name: version for name, version in served.items() if name != "candidate"}


def back(workshop: Workshop) -> int:
    return rollback(workshop.recorder, "pico", "it is bad").version


def test_a_rollback_never_leads_to_a_release_that_was_taken_back(workshop: Workshop, night: Publishes) -> None:
    one, two, three = (night(seed).version for seed in (b"one", b"two", b"three"))
    assert night(b"two").version == two
    assert aliases(workshop) == {"champion": two, "previous": three}
    assert [back(workshop), back(workshop)] == [three, one]
    with pytest.raises(RegistryError, match="no earlier champion"):
        back(workshop)
    assert aliases(workshop) == {"champion": one}
    assert promote(workshop.recorder, "pico", str(two), "the data were right").succeeds == one
    assert aliases(workshop) == {"champion": two, "previous": one}
    shutil.rmtree(workshop.home.index)
    assert aliases(workshop) == {"champion": two, "previous": one}


def test_a_rollback_passes_over_what_was_deleted_in_mlflow(workshop: Workshop, night: Publishes) -> None:
    one, two, three, four = (night(seed).version for seed in (b"one", b"two", b"three", b"four"))
    client = workshop.recorder.tracking.client
    for version in (one, three):
        client.delete_model_version("pico", str(version))
    assert back(workshop) == two
    assert aliases(workshop) == {"champion": two}
    with pytest.raises(RegistryError, match="no earlier champion"):
        back(workshop)
    assert aliases(workshop) == {"champion": two}
    assert promote(workshop.recorder, "pico", str(four), "better after all").version == four
    assert aliases(workshop) == {"champion": four, "previous": two}
    client.delete_model_version("pico", str(four))
    assert night(b"five", NO).aliases == ("candidate",)
    assert aliases(workshop) == {"champion": two}, "the one before serves where the champion was deleted"


def test_a_rollback_that_was_interrupted_is_seen_at_once(
    workshop: Workshop, night: Publishes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = night(b"one").version
    night(b"two")
    move = Registrar.set_champion

    def interrupted(*arguments: object) -> bool:
        move(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registrar, "set_champion", interrupted)
        back(workshop)
    assert aliases(workshop) == {"champion": one}


@pytest.mark.parametrize("looked", [True, False], ids=["somebody looks first", "it is repeated at once"])
def test_a_rollback_that_was_killed_before_the_mirror_is_completed(
    workshop: Workshop, night: Publishes, looked: bool
) -> None:
    one, two, _ = (night(seed).version for seed in (b"one", b"two", b"three"))
    before = workshop.recorder.index.family("pico")
    assert before
    assert back(workshop) == two
    # As a kill leaves it: MLflow has moved, the index has not heard of it.
    workshop.recorder.index.put_family("pico", before)
    workshop.recorder.index.begin("family-pico")
    if looked:
        assert resolve(workshop.home, "pico").version == two
        assert aliases(workshop) == {"champion": two, "previous": one}
    else:
        assert back(workshop) == two, "the one that was asked for, no further"
        assert aliases(workshop) == {"champion": two, "previous": one}
    assert back(workshop) == one


def moves(workshop: Workshop) -> tuple[Champions, Standing, dict[int, str]]:
    """The log of moves, how it stands, and the models of the releases."""
    state = Registrar(workshop.recorder, "pico").state()
    models = {release.version: release.members[0].model_id for release in state.releases}
    return Champions(workshop.recorder.tracking, "pico"), Standing(state.champions, state.move), models


@pytest.mark.parametrize("killed", [False, True], ids=["it knows", "it was killed before it knew"])
@pytest.mark.parametrize("later", [False, True], ids=["the last", "followed by another"])
def test_a_move_that_lost_stays_lost_when_what_it_lost_to_is_deleted(
    workshop: Workshop, night: Publishes, monkeypatch: pytest.MonkeyPatch, killed: bool, later: bool
) -> None:
    one, two, three = (night(seed).version for seed in (b"one", b"two", b"three"))
    log, seen, models = moves(workshop)
    assert log.move(seen, one, None, models[one], "It wins.")
    with monkeypatch.context() as patch, nullcontext() if not killed else pytest.raises(KeyboardInterrupt):
        if killed:
            patch.setattr(Champions, "follow", interrupted)
        assert not log.move(seen, two, one, models[two], "It was decided before the other was known.")
    won = seen.move + 1
    if later:
        assert log.move(moves(workshop)[1], three, one, models[three], "After the one that won.")
    workshop.recorder.tracking.client.delete_model_version("pico.champions", str(won))
    assert log.follow()[-1].champion == three
    assert promote(workshop.recorder, "pico", str(two), "now it is").version == two, "the log goes on"
    assert back(workshop) == three
    shutil.rmtree(workshop.home.index)
    assert aliases(workshop)["champion"] == three


def test_a_log_that_was_deleted_begins_anew(workshop: Workshop, night: Publishes) -> None:
    one, two, three = (night(seed).version for seed in (b"one", b"two", b"three"))
    workshop.recorder.tracking.client.delete_registered_model("pico.champions")
    assert back(workshop) == two
    log, seen, models = moves(workshop)
    assert seen.move == 1
    assert log.move(seen, three, two, models[three], "It wins.")
    assert not log.move(seen, one, None, models[one], "It was decided before the other was known.")
    assert (log.follow()[-1].champion, log.follow()[-1].previous) == (three, two)


def interrupted(*_: object) -> None:
    """The process ends here."""
    raise KeyboardInterrupt
