"""Families in a real embedded MLflow: releases, aliases, decisions, rollback."""

import json
import shutil
from typing import Any

import pytest

from flows.opponent import opponent_of
from registry.errors import RegistryError
from registry.family import family_names, list_families, load, promote, publish, resolve, rollback, show
from registry.gates import GateDecision
from registry.index import Entry
from registry.members import Family, Release
from registry.record import Execution
from registry.registrar import Registrar
from steps.artifacts import Artifact
from tests.registry.workshop import Workshop, judged

YES = GateDecision(promote=True, sentence="Promoted: it is better.")
NO = GateDecision(promote=False, sentence="Not promoted: it is worse.")

Members = list[tuple[str, str, Entry]]


def recorded(workshop: Workshop, execution: Execution, seed: bytes) -> Members:
    """A model, two GGUF files and a GPTQ checkpoint of it, recorded."""
    model = workshop.model(seed)
    made: dict[str, Artifact[Any]] = {
        "merged": model,
        "gguf[Q4_K_M]": workshop.gguf(model, "Q4_K_M"),
        "gguf[Q8_0]": workshop.gguf(model, "Q8_0"),
        "gptq": workshop.gptq(model),
    }
    return [(role, each.digest, execution.record(workshop.step(role, each))) for role, each in made.items()]


def released(workshop: Workshop, seed: bytes, decision: GateDecision = YES) -> Release:
    execution = workshop.begin()
    release = publish(execution, "pico", recorded(workshop, execution, seed), decision)
    execution.finish()
    return release


def aliases(workshop: Workshop) -> dict[str, int]:
    return dict(load(workshop.home, "pico").aliases)


def test_a_release_has_named_members_and_becomes_champion(workshop: Workshop) -> None:
    execution = workshop.begin()
    members = recorded(workshop, execution, b"one")
    report = workshop.report({"merged/kl": 0.0})
    quality = execution.record(workshop.step("quality", report))
    release = publish(execution, "pico", members, YES, {"quality": (report.digest, quality)})
    assert [(member.name, member.selector, member.version) for member in release.members] == [
        ("pico", "hf", 1),
        ("pico-GGUF:Q4_K_M", "gguf:Q4_K_M", 2),
        ("pico-GGUF:Q8_0", "gguf:Q8_0", 3),
        ("pico-GPTQ-Int4", "gptq-int4", 4),
    ]
    assert release.members[1].parents == {"model": members[0][1]}
    assert set(release.aliases) == {"candidate", "champion"}
    assert (release.decision, release.execution) == (YES, execution.run_id)
    assert release.reports["quality"].digest == report.digest
    client = workshop.recorder.tracking.client
    version = client.get_model_version_by_alias("pico", "champion")
    assert version.source == f"models:/{release.members[0].model_id}"
    assert version.tags["posttrain.digest"] == members[0][1]
    shown_on_model = client.get_logged_model(release.members[0].model_id).tags["mlflow.modelVersions"]
    assert json.loads(shown_on_model) == [{"name": "pico", "version": 1}]
    assert client.get_run(execution.run_id).data.tags["posttrain.release"] == release.id


def test_resolve_by_alias_version_release_and_format_needs_no_mlflow(workshop: Workshop) -> None:
    release = released(workshop, b"one")
    workshop.home.database.unlink()
    home = workshop.home
    assert resolve(home, "pico").name == "pico"
    assert resolve(home, "pico", "champion", "gguf:q4_k_m").name == "pico-GGUF:Q4_K_M"
    assert resolve(home, "pico", "candidate", "gptq-int4").name == "pico-GPTQ-Int4"
    assert resolve(home, "pico", "candidate", "gptq").name == "pico-GPTQ-Int4"
    assert resolve(home, "pico", "3").name == "pico-GGUF:Q8_0"
    assert resolve(home, "pico", "3", "hf").name == "pico"
    assert resolve(home, "pico", release.id[:12]).version == 1
    assert list_families(home)[0]["formats"] == ["hf", "gguf:Q4_K_M", "gguf:Q8_0", "gptq-int4"]
    assert json.loads(json.dumps(show(home, "pico")))["releases"][0]["id"] == release.id


def test_what_is_not_there_is_one_sentence_with_the_nearest(workshop: Workshop) -> None:
    released(workshop, b"one", NO)
    cases = {
        ("pica", "champion", None): "no family `pica`; did you mean `pico`?",
        ("pico", "champion", None): "family pico has no champion yet; it has `pico@candidate`",
        ("pico", "candidat", None): "no alias `candidat`; did you mean `candidate`?",
        ("pico", "9", None): "family pico has no version 9",
        ("pico", "candidate", "gguf:Q4_K_S"): "no member in format `gguf:Q4_K_S`; did you mean `gguf:Q4_K_M`?",
        ("pico", "candidate", "gguf"): "`gguf` names several members of pico: gguf:Q4_K_M, gguf:Q8_0",
        ("../x", "candidate", None): "`../x` is no name of a family",
    }
    for (family, reference, form), sentence in cases.items():
        with pytest.raises(RegistryError) as caught:
            resolve(workshop.home, family, reference, form)
        assert sentence in str(caught.value)


def test_publishing_again_changes_nothing(workshop: Workshop) -> None:
    first = released(workshop, b"one")
    second = released(workshop, b"one")
    assert second.model_copy(update={"execution": first.execution}) == first
    assert len(load(workshop.home, "pico").releases) == 1


def test_the_champion_moves_only_with_a_decision_and_back(workshop: Workshop) -> None:
    one = released(workshop, b"one")
    two = released(workshop, b"two", NO)
    assert aliases(workshop) == {"candidate": two.version, "champion": one.version}
    three = released(workshop, b"three")
    four = released(workshop, b"four")
    assert aliases(workshop) == {"candidate": four.version, "champion": four.version, "previous": three.version}

    back = rollback(workshop.recorder, "pico", "it flatters")
    assert back.id == three.id
    assert aliases(workshop) == {"candidate": four.version, "champion": three.version, "previous": one.version}
    taken = load(workshop.home, "pico").release(str(four.version))
    assert json.loads(taken.rolled_back)["reason"] == "it flatters"
    assert rollback(workshop.recorder, "pico").id == one.id
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(workshop.recorder, "pico")

    again = released(workshop, b"four")
    assert again.decision
    assert "was rolled back at" in again.decision.sentence
    assert aliases(workshop)["champion"] == one.version
    assert promote(workshop.recorder, "pico", str(four.version), "fixed the evaluation").id == four.id
    assert aliases(workshop) == {"candidate": four.version, "champion": four.version, "previous": one.version}


def test_aliases_that_were_moved_by_hand_or_left_behind_by_a_kill_follow_the_log(workshop: Workshop) -> None:
    client = workshop.recorder.tracking.client
    one, two = released(workshop, b"one"), released(workshop, b"two")
    # As if killed between a move and the aliases; as if set by hand on MLflow's page.
    client.set_registered_model_alias("pico", "champion", str(one.version))
    client.delete_registered_model_alias("pico", "previous")
    shutil.rmtree(workshop.home.index)
    assert aliases(workshop) == {"candidate": two.version, "champion": two.version, "previous": one.version}
    assert rollback(workshop.recorder, "pico").id == one.id
    assert aliases(workshop) == {"candidate": two.version, "champion": one.version}
    assert client.get_registered_model("pico").aliases == {"candidate": two.version, "champion": one.version}
    moves = sorted(client.search_model_versions("name = 'pico.champions'"), key=lambda move: int(move.version))
    assert [move.tags["posttrain.move.champion"] for move in moves] == ["1", "5", "1"]
    assert family_names(workshop.home) == ["pico"]


def test_a_family_from_before_the_log_goes_on_from_its_aliases(workshop: Workshop) -> None:
    client = workshop.recorder.tracking.client
    one, two = released(workshop, b"one"), released(workshop, b"two")
    client.delete_registered_model("pico.champions")
    three = released(workshop, b"three")
    assert aliases(workshop) == {"candidate": three.version, "champion": three.version, "previous": two.version}
    assert rollback(workshop.recorder, "pico").id == two.id
    assert rollback(workshop.recorder, "pico").id == one.id


def test_a_family_that_was_deleted_begins_anew(workshop: Workshop) -> None:
    client = workshop.recorder.tracking.client
    released(workshop, b"one")
    released(workshop, b"two")
    client.delete_registered_model("pico")
    one = released(workshop, b"three", NO)
    assert aliases(workshop) == {"candidate": one.version}
    two = released(workshop, b"four")
    assert aliases(workshop) == {"candidate": two.version, "champion": two.version}


def test_who_was_judged_against_another_champion_than_there_is_waits(workshop: Workshop) -> None:
    one = released(workshop, b"one", judged(None))
    assert aliases(workshop)["champion"] == one.version
    for against, met in ((None, "no champion"), (99, "version 99")):
        two = released(workshop, b"two", judged(against))
        assert two.decision
        assert f"it met {met}, and version 1 is champion now" in two.decision.sentence
        assert aliases(workshop) == {"candidate": two.version, "champion": one.version}
    two = released(workshop, b"two", judged(one.version))
    assert aliases(workshop) == {"candidate": two.version, "champion": two.version, "previous": one.version}
    again = released(workshop, b"two", judged(one.version))
    assert again.decision
    assert again.decision.promote, "published again, it is the champion that it became"


def test_who_loses_to_another_machine_is_judged_against_that_ones_champion_next(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not be taken for one that has succeeded the champion that it met."""
    one, other = released(workshop, b"one"), released(workshop, b"other", NO)
    move, moved = Registrar.set_champion, []

    def late(self: Registrar, state: Family, version: int, previous: int | None, why: str) -> bool:
        if not moved:
            moved.append(move(self, self.state(), other.version, one.version, "another machine's"))
        return move(self, state, version, previous, why)

    monkeypatch.setattr(Registrar, "set_champion", late)
    two = released(workshop, b"two", judged(one.version))
    assert moved == [True]
    assert two.decision and not two.decision.promote
    assert f"it met version {one.version}, and version {other.version} is champion now" in two.decision.sentence
    assert two.succeeds is None
    met = opponent_of(load(workshop.home, "pico"), two.id)
    assert met and met.version == other.version


def test_a_champion_whose_publication_was_killed_after_the_move_is_completed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = released(workshop, b"one")
    tag = Registrar.tag

    def killed(self: Registrar, version: int, name: str, value: str) -> None:
        if name == "succeeds":
            raise KeyboardInterrupt
        tag(self, version, name, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registrar, "tag", killed)
        released(workshop, b"two", judged(one.version))
    shutil.rmtree(workshop.home.index)
    left = load(workshop.home, "pico").release("champion")
    assert (left.decision, left.succeeds) == (None, None), "so the next run publishes again"
    two = released(workshop, b"two", judged(one.version))
    assert two.decision and two.decision.promote
    assert (two.version, two.succeeds) == (left.version, one.version)


def test_a_move_that_was_decided_before_anothers_counts_for_nothing(workshop: Workshop) -> None:
    released(workshop, b"one")
    registrar = Registrar(workshop.recorder, "pico")
    seen = registrar.state()
    released(workshop, b"two")
    assert not registrar.set_champion(seen, 1, None, "late")
    assert aliases(workshop)["champion"] == 5
    assert registrar.state().aliases["champion"] == 5
    assert registrar.set_champion(registrar.state(), 1, 5, "in time")
    assert registrar.state().aliases["champion"] == 1


def test_a_publication_killed_midway_is_completed(workshop: Workshop) -> None:
    one = released(workshop, b"one")
    client = workshop.recorder.tracking.client
    client.delete_model_version("pico", str(one.members[2].version))
    client.delete_registered_model_alias("pico", "champion")
    client.delete_registered_model("pico.champions")
    again = released(workshop, b"one")
    assert [member.selector for member in again.members] == ["hf", "gguf:Q4_K_M", "gptq-int4", "gguf:Q8_0"]
    assert (again.id, again.version) == (one.id, one.version)
    assert aliases(workshop) == {"candidate": one.version, "champion": one.version}


def test_two_members_of_one_name(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    sizes = {scheme: workshop.gptq(model, scheme) for scheme in ("Int4-g64", "Int4-g128")}
    members = [(name, each.digest, execution.record(workshop.step(name, each))) for name, each in sizes.items()]
    release = publish(execution, "sizes", members, YES)
    assert [member.name for member in release.members] == ["sizes-GPTQ-Int4-g64", "sizes-GPTQ-Int4-g128"]
    assert resolve(workshop.home, "sizes", format="gptq-int4-g128").role == "Int4-g128"
    other = workshop.model(b"other")
    both = [
        (role, each.digest, execution.record(workshop.step(role, each)))
        for role, each in {"a": model, "b": other}.items()
    ]
    with pytest.raises(RegistryError, match="`a` and `b` are both hf"):
        publish(execution, "both", both, YES)


def test_only_recorded_models_are_published(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    entry = execution.record(workshop.step("base", model))
    with pytest.raises(RegistryError, match="did not record"):
        publish(execution, "pico", [("base", model.digest, entry.model_copy(update={"models": {}}))], YES)
    with pytest.raises(RegistryError, match="no name for a family"):
        publish(execution, "a/b", [("base", model.digest, entry)], YES)


def test_versions_registered_by_hand_are_ignored(workshop: Workshop) -> None:
    one = released(workshop, b"one")
    client = workshop.recorder.tracking.client
    tags = {"posttrain.release": one.id, "posttrain.head": "true", "posttrain.model": one.members[0].model_id}
    client.create_model_version("pico", "file:///etc", tags=tags)
    client.create_registered_model("somebody-elses")
    released(workshop, b"two")
    assert [member.version for member in load(workshop.home, "pico").release("1").members] == [1, 2, 3, 4]
    assert family_names(workshop.home) == ["pico"]


def test_the_mirror_is_rebuilt(workshop: Workshop) -> None:
    released(workshop, b"one")
    before = load(workshop.home, "pico")
    shutil.rmtree(workshop.home.index)
    assert load(workshop.home, "pico") == before


@pytest.mark.parametrize(
    "text", ['{"promote": true, "outcomes": [{"interval": [null, null]}], "sentence": ""}', "{", ""]
)
def test_a_decision_that_cannot_be_read_costs_itself_and_not_the_family(workshop: Workshop, text: str) -> None:
    one = released(workshop, b"one")
    workshop.recorder.tracking.client.set_model_version_tag("pico", str(one.version), "posttrain.decision", text)
    shutil.rmtree(workshop.home.index)
    assert load(workshop.home, "pico").release("1").decision is None
    assert released(workshop, b"one").decision == YES
