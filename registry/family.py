"""Families: published models, and the aliases that move only with a recorded decision.

A family is a registered model of MLflow, its members are the versions. Reads come from a mirror in the local index when
MLflow is embedded, and from the server where there is one.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from registry.errors import RegistryError, nearest
from registry.gates import GateDecision
from registry.home import Home
from registry.index import Entry, Index
from registry.members import Family, Member, Release, selectors
from registry.record import Execution, Recorder
from registry.run_data import json_tag
from registry.step_run import format_of
from registry.tracking import Tracking
from registry.versions import FAMILY_TAG, read_family, versions_of
from registry.versions import family_names as names_of
from steps.artifacts import Manifest

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
    if not _NAME.fullmatch(family):
        raise RegistryError(f"`{family}` is no name of a family: letters, digits and `._-`")
    if home.embedded:
        content = _index(home).family(family)
        found = Family.model_validate_json(content) if content else None
    else:
        found = read_family(Tracking(home), family)
    if found is None:
        raise RegistryError(f"no family `{family}`{nearest(family, family_names(home))}")
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

    The same members are the same release: a publication that was killed is completed, one that is complete stays. A
    release that was rolled back is not promoted again by itself, whatever the gates say.

    Args:
        execution: the run that publishes.
        family: name of the family; made where it does not exist.
        members: role, artifact digest and index entry, the principal member first.
        decision: what the gates said; kept on the release and in the execution.
        reports: by step name, digest and entry of the reports that the gates looked at.

    Raises:
        RegistryError: two members cannot be told apart, or one was not recorded as a model.
    """
    if not _NAME.fullmatch(family):
        raise RegistryError(f"`{family}` is no name for a family: letters, digits and `._-`")
    recorder = execution.recorder
    release = release_id([digest for _, digest, _ in members])
    with recorder.index.lock(f"family-{family}"):
        registrar = _Registrar(recorder, family)
        registrar.create()
        version = registrar.register(release, members)
        state = registrar.state()
        decision = _effective(state.release(str(version)), decision)
        refs = {step: {"digest": digest, "key": entry.key} for step, (digest, entry) in (reports or {}).items()}
        registrar.tag(version, "decision", decision.model_dump_json())
        registrar.tag(version, "reports", json.dumps(refs))
        registrar.tag(version, "execution", execution.run_id)
        registrar.alias("candidate", version)
        if decision.promote:
            registrar.enthrone(state, version)
        state = registrar.mirror()
    execution.set_tags({"posttrain.family": family, "posttrain.release": release})
    execution.log_text(decision.model_dump_json(indent=1), "gate_decision.json")
    return state.release(str(version))


def release_id(digests: Sequence[str]) -> str:
    """Return the id of the release that has these members: the sha256 over their sorted digests."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def rollback(recorder: Recorder, family: str, reason: str = "") -> Release:
    """Make the previous champion champion again; return its release.

    The release that is taken back remembers when and why, and is not promoted again by a gate. Repeated calls go
    further back. A call that was killed is completed by the next.

    Raises:
        RegistryError: there is no earlier champion.
    """
    with recorder.index.lock(f"family-{family}"):
        registrar = _Registrar(recorder, family)
        state = registrar.state()
        champion, previous = state.release("champion"), state.aliases.get("previous")
        if previous is None:
            raise RegistryError(f"family {family} has no earlier champion to go back to")
        if previous != champion.version:
            said = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "to": previous, "reason": reason}
            registrar.tag(champion.version, "rolled_back", json.dumps(said))
            registrar.alias("champion", previous)
        registrar.alias("previous", state.release(str(previous)).succeeds)
        return registrar.mirror().release("champion")


def promote(recorder: Recorder, family: str, reference: str, reason: str) -> Release:
    """Make a release champion by hand, also one that was rolled back or failed its gates; recorded with the reason.

    Raises:
        RegistryError: there is no such release.
    """
    with recorder.index.lock(f"family-{family}"):
        registrar = _Registrar(recorder, family)
        state = registrar.state()
        release = state.release(reference)
        decision = GateDecision(promote=True, sentence=f"Promoted by hand: {reason}")
        registrar.tag(release.version, "decision", decision.model_dump_json())
        registrar.tag(release.version, "rolled_back", "")
        registrar.enthrone(state, release.version)
        return registrar.mirror().release("champion")


class _Registrar:
    """Writes one family into MLflow. The caller holds the family's lock."""

    def __init__(self, recorder: Recorder, family: str) -> None:
        self.recorder = recorder
        self.client = recorder.tracking.client
        self.family = family

    def create(self) -> None:
        """Make the registered model where it does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.family, tags={FAMILY_TAG: "1"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def register(self, release: str, members: Sequence[tuple[str, str, Entry]]) -> int:
        """Make the versions that the release still lacks; return the principal member's."""
        store = self.recorder.home.store
        manifests = [(role, store.open(digest).manifest) for role, digest, _ in members]
        names = selectors(self.family, manifests)
        there = {
            version.tags["posttrain.digest"]: int(version.version)
            for version in versions_of(self.recorder.tracking, self.family)
            if version.tags.get("posttrain.release") == release
        }
        for (role, digest, entry), (_, manifest), name in zip(members, manifests, names, strict=True):
            if digest not in there:
                tags = _member_tags(role, manifest, name, release, head=digest == members[0][1])
                there[digest] = self._version(digest, entry, manifest, tags)
        return there[members[0][1]]

    def _version(self, digest: str, entry: Entry, manifest: Manifest, tags: dict[str, str]) -> int:
        model_id = entry.models.get(manifest.output)
        if model_id is None or entry.outputs.get(manifest.output) != digest:
            raise RegistryError(f"step `{entry.step}` did not record artifact {digest[:12]} as a model")
        # Embedded MLflow would take any path as a source: see that the model is there and is this artifact.
        self.recorder.tracking.of_model(model_id, digest)
        tags["posttrain.model"] = model_id
        with self.recorder.tracking.as_global():
            version = self.client.create_model_version(
                self.family, f"models:/{model_id}", entry.run_id, tags, model_id=model_id
            )
        known = json.loads(self.client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
        link = {"name": self.family, "version": int(version.version)}
        if self.recorder.home.embedded and link not in known:
            # A server keeps this link by itself; MLflow's page shows the model's versions by it.
            self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([*known, link])})
        return int(version.version)

    def tag(self, version: int, name: str, value: str) -> None:
        """Set one of our tags on a version."""
        self.client.set_model_version_tag(self.family, str(version), f"posttrain.{name}", value)

    def alias(self, name: str, version: int | None) -> None:
        """Point an alias to a version, or take it away."""
        if version is None:
            self.client.delete_registered_model_alias(self.family, name)
        else:
            self.client.set_registered_model_alias(self.family, name, str(version))

    def enthrone(self, state: Family, version: int) -> None:
        """Make a version champion and the champion previous.

        In this order a kill between two moves leaves a champion that is sound; the next publication, or a rollback,
        puts the rest right.
        """
        champion = state.aliases.get("champion")
        if champion == version:
            return
        if champion is not None:
            self.tag(version, "succeeds", str(champion))
            self.alias("previous", champion)
        self.alias("champion", version)

    def state(self) -> Family:
        """Return the family as MLflow knows it."""
        found = read_family(self.recorder.tracking, self.family)
        if found is None:
            raise RegistryError(f"no family `{self.family}`{nearest(self.family, names_of(self.recorder.tracking))}")
        return found

    def mirror(self) -> Family:
        """Write what MLflow knows into the local index and return it."""
        state = self.state()
        self.recorder.index.put_family(self.family, state.model_dump_json(indent=1).encode())
        return state


def _index(home: Home) -> Index:
    """Return the local index, rebuilt first where it was lost."""
    recorder = Recorder(home)
    if not recorder.index.exists and recorder.tracking.may_exist:
        recorder.rebuild_index()
    return recorder.index


def _effective(release: Release, decision: GateDecision) -> GateDecision:
    """Return the decision, unless the release was rolled back before."""
    if not release.rolled_back or not decision.promote:
        return decision
    said = json.loads(release.rolled_back)
    because = f" ({said['reason']})" if said["reason"] else ""
    sentence = (
        f"Not promoted: this release was rolled back at {said['at']}{because}; promote it by hand if it is right."
    )
    return GateDecision(promote=False, outcomes=decision.outcomes, sentence=sentence)


def _member_tags(role: str, manifest: Manifest, name: tuple[str, str], release: str, *, head: bool) -> dict[str, str]:
    form, scheme = format_of(manifest)
    return {
        "posttrain.release": release,
        "posttrain.head": "true" if head else "",
        "posttrain.role": role,
        "posttrain.kind": manifest.kind,
        "posttrain.format": form,
        "posttrain.scheme": scheme,
        "posttrain.selector": name[0],
        "posttrain.member": name[1],
        "posttrain.digest": manifest.digest,
        "posttrain.key": manifest.key,
        "posttrain.size": str(manifest.size),
        "posttrain.parents": json_tag({each: parent.digest for each, parent in manifest.parents.items()}),
    }
