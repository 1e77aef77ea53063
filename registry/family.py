"""Families: published models, and the aliases that move only with a recorded decision.

A family is a registered model of MLflow, its members are the versions. Reads come from a mirror in the local index when
MLflow is embedded, and from the server where there is one.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from registry.champions import SUFFIX
from registry.errors import RegistryError, nearest
from registry.gates import GateDecision
from registry.home import Home
from registry.index import Entry, Index
from registry.members import Family, Member, Release
from registry.record import Execution, Recorder
from registry.registrar import Registrar
from registry.tracking import Tracking
from registry.versions import family_names as names_of
from registry.versions import read_family

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def resolve(home: Home, family: str, reference: str = "champion", format: str | None = None) -> Member:
    """Return the member of a family that an alias or version and a format name.

    Args:
        home: whose index or server is asked.
        family: name of the family.
        reference: `champion`, `candidate`, `previous`, a version number, or the start of a release's id.
        format: `hf`, `adapter`, `gguf:Q4_K_M`, `gptq-int4`, ...; the principal member for None.

    Raises:
        RegistryError: there is no such family, alias or format; the sentence names the nearest.
    """
    return load(home, family).member(reference, format)


def load(home: Home, family: str) -> Family:
    """Return all that is known of a family.

    Raises:
        RegistryError: there is no such family, or the tracking server does not answer.
    """
    found = find(home, family)
    if found is None:
        raise RegistryError(f"no family `{family}`{nearest(family, family_names(home))}")
    return found


def find(home: Home, family: str) -> Family | None:
    """Return all that is known of a family, None where there is none: by the server, or by the index of what is local.

    Raises:
        RegistryError: the name cannot be one, or the tracking server does not answer.
    """
    if not _NAME.fullmatch(family):
        raise RegistryError(f"`{family}` is no name of a family: letters, digits and `._-`")
    if not home.embedded:
        return read_family(Tracking(home), family)
    index = _index(home)
    if index.is_pending(_pending(family)):
        # Written this moment, or killed before the mirror knew: it is right once the lock is free.
        with index.lock(f"family-{family}"):
            if index.is_pending(_pending(family)):
                Registrar(Recorder(home), family).mirror()
                index.end(_pending(family))
    return _mirrored(index, family)


def member_at(home: Home, uri: str) -> Member:
    """Return the member that `registry://FAMILY@REFERENCE/FORMAT` names; by default the champion's checkpoint, `hf`.

    Raises:
        RegistryError: there is none.
    """
    place, _, form = uri.removeprefix("registry://").partition("/")
    family, _, reference = place.partition("@")
    return resolve(home, family, reference or "champion", form or "hf")


def member_with(home: Home, uri: str, digest: str) -> Member:
    """Return the member of this digest, of the family that a `registry://` source names: what its reference meant once.

    An alias moves, by another machine's publication, while what a plan resolved it to is awaited.

    Raises:
        RegistryError: there is none any more.
    """
    name = uri.removeprefix("registry://").partition("/")[0].partition("@")[0]
    members = (member for release in load(home, name).releases for member in release.members)
    found = next((member for member in members if member.digest == digest), None)
    if found is None:
        raise RegistryError(f"{uri}: `{name}` has no member {digest[:12]} any more, which it named when the run began")
    return found


def family_names(home: Home) -> list[str]:
    """Return the names of all families."""
    return _index(home).families() if home.embedded else names_of(Tracking(home))


def list_families(home: Home) -> list[dict[str, Any]]:
    """Return a row per family: its aliases, number of releases, and the formats of its newest release."""
    rows = []
    for name in family_names(home):
        family = load(home, name)
        newest = family.releases[-1] if family.releases else None
        rows.append(
            {
                "family": name,
                "aliases": dict(family.aliases),
                "releases": len(family.releases),
                "formats": [member.selector for member in newest.members] if newest else [],
                "updated": newest.created_at.isoformat() if newest else None,
            }
        )
    return rows


def show(home: Home, family: str) -> dict[str, Any]:
    """Return a family as plain data: aliases, releases with members, decisions and reports."""
    return load(home, family).model_dump(mode="json")


def publish(
    execution: Execution,
    family: str,
    members: Sequence[tuple[str, str, Entry]],
    decision: GateDecision,
    reports: Mapping[str, tuple[str, Entry]] | None = None,
) -> Release:
    """Register a release and move the aliases: `candidate` always, `champion` if the decision promotes.

    The same members, with the same principal one, are the same release: a publication that was killed is completed, one
    that is complete stays. A release that was rolled back is not promoted again by itself, whatever the gates say.

    Args:
        execution: the run that publishes.
        family: name of the family; made where it does not exist.
        members: role, artifact digest and index entry, the principal member first.
        decision: what the gates said; kept on the release and in the execution.
        reports: by step name, digest and entry of the reports that the gates looked at.

    Raises:
        RegistryError: two members cannot be told apart, or one was not recorded as a model.
    """
    if not _NAME.fullmatch(family) or family.endswith(SUFFIX):
        raise RegistryError(f"`{family}` is no name for a family: letters, digits, `._-`, no `{SUFFIX}` at its end")
    recorder = execution.recorder
    release = release_id([digest for _, digest, _ in members])
    with _writing(recorder, family, new=True) as registrar:
        version = registrar.register(release, members)
        refs = {step: {"digest": digest, "key": entry.key} for step, (digest, entry) in (reports or {}).items()}
        registrar.tag(version, "reports", json.dumps(refs))
        registrar.tag(version, "execution", execution.run_id)
        decision = _settle(registrar, version, decision)
        registrar.set_candidate(version)
        state = registrar.state()
    execution.set_tags({"posttrain.family": family, "posttrain.release": release})
    execution.log_file(decision.model_dump_json(indent=1).encode(), "gate_decision.json")
    return state.release(str(version))


def _settle(registrar: Registrar, version: int, decision: GateDecision) -> GateDecision:
    """Make a release champion if its gates held against the champion that there is now; return what was decided.

    The champion is asked for at this moment, and moved only if no other machine has moved it since.
    """
    while True:
        state = registrar.state()
        champion = state.aliases.get("champion")
        final = _effective(state, version, decision)
        before = None
        if final.promote and champion != version:
            if not registrar.set_champion(state, version, champion, final.sentence):
                continue
            before = champion
        elif champion == version and state.release(str(version)).succeeds is None:
            # A kill came between the move and this note of it.
            before = state.aliases.get("previous")
        if before is not None:
            registrar.tag(version, "succeeds", str(before))
        # Last: while it is missing the publication counts as unfinished, and the next run completes it.
        registrar.tag(version, "decision", final.model_dump_json())
        return final


def release_id(digests: Sequence[str]) -> str:
    """Return the id of the release that has these members: the sha256 over their digests.

    The principal one comes first and counts as such, because aliases point to it; the order of the others is nothing.
    """
    principal, *others = digests
    return hashlib.sha256("".join([principal, *sorted(others)]).encode()).hexdigest()


def rollback(recorder: Recorder, family: str, reason: str = "") -> Release:
    """Make the previous champion champion again; return its release.

    The release that is taken back remembers when and why, and is not promoted again by a gate. Repeated calls go
    further back; one that was killed when all but its last word was said is only completed.

    Raises:
        RegistryError: there is no earlier champion, or another machine moved the champion meanwhile.
    """
    shown = _mirrored(recorder.index, family) if recorder.home.embedded else None
    with _writing(recorder, family) as registrar:
        state = registrar.state()
        champion, previous = state.release("champion"), state.aliases.get("previous")
        if shown and _was_taken_back(state, shown.aliases.get("champion")):
            return champion
        if previous is None:
            raise RegistryError(f"family {family} has no earlier champion to go back to")
        said = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "to": previous, "reason": reason}
        registrar.tag(champion.version, "rolled_back", json.dumps(said))
        because = f"Version {champion.version} was rolled back{': ' if reason else ''}{reason}."
        *_, before = (None, *state.champions[:-2])
        if not registrar.set_champion(state, previous, before, because):
            registrar.tag(champion.version, "rolled_back", "")
            raise RegistryError(
                f"the champion of {family} was moved by another machine meanwhile; look at it, and roll back again"
            )
        return registrar.state().release("champion")


def promote(recorder: Recorder, family: str, reference: str, reason: str = "") -> Release:
    """Make a release champion by hand, also one that was rolled back or failed its gates; recorded with the reason.

    Raises:
        RegistryError: there is no such release.
    """
    with _writing(recorder, family) as registrar:
        release = registrar.state().release(reference)
        registrar.tag(release.version, "rolled_back", "")
        said = f"Promoted by hand{': ' if reason else ''}{reason}."
        # It stands until the gates change.
        terms = release.decision.terms if release.decision else ""
        _settle(registrar, release.version, GateDecision(promote=True, sentence=said, terms=terms))
        return registrar.state().release(str(release.version))


@contextmanager
def _writing(recorder: Recorder, family: str, *, new: bool = False) -> Iterator[Registrar]:
    """Hold a family's lock; however the context ends, the index then tells what MLflow knows.

    Raises:
        RegistryError: there is no such family, where it is not to be made.
    """
    with recorder.index.lock(f"family-{family}"):
        registrar = Registrar(recorder, family)
        if new:
            registrar.create()
        else:
            registrar.state()
        recorder.index.begin(_pending(family))
        try:
            yield registrar
        finally:
            registrar.mirror()
            recorder.index.end(_pending(family))


def _pending(family: str) -> str:
    """Name the note that the mirror of a family may lag behind MLflow."""
    return f"family-{family}"


def _mirrored(index: Index, family: str) -> Family | None:
    content = index.family(family)
    return Family.model_validate_json(content) if content else None


def _was_taken_back(state: Family, version: int | None) -> bool:
    """Whether a version that was champion when somebody last looked is so no more, because of a rollback."""
    if version in (None, state.aliases.get("champion")):
        return False
    return any(release.version == version and release.rolled_back for release in state.releases)


def _index(home: Home) -> Index:
    """Return the local index, rebuilt first where it was lost."""
    recorder = Recorder(home)
    if not recorder.index.exists and recorder.tracking.may_exist:
        recorder.rebuild_index()
    return recorder.index


def _effective(state: Family, version: int, decision: GateDecision) -> GateDecision:
    """Return the decision, unless the release was rolled back before, or was judged against another champion."""
    taken_back, champion = state.release(str(version)).taken_back, state.aliases.get("champion")
    if not decision.promote and champion == version:
        why = decision.sentence.removeprefix("Not promoted: ")
        return decision.model_copy(update={"sentence": f"It stays champion, though it would not become it now: {why}"})
    if not decision.promote:
        return decision
    if taken_back:
        why = f"this release was {taken_back}"
    elif decision.needs_champion and champion not in (decision.against, version):
        met = f"version {decision.against}" if decision.against else "no champion"
        why = f"it met {met}, and version {champion} is champion now; the next run judges it against that"
    else:
        return decision
    return decision.model_copy(update={"promote": False, "sentence": f"Not promoted: {why}."})
