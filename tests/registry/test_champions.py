"""Where a rollback leads: back through the champions that were good, also past deleted ones and after a kill."""

import shutil
from collections.abc import Callable

import pytest

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
