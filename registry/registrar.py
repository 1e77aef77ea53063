"""Writing one family into MLflow: its registered model, the versions of a release, their tags and aliases."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from registry.champions import Champions, Standing
from registry.errors import Lost, RegistryError, nearest
from registry.importing import importing
from registry.index import Entry
from registry.members import Family, selectors
from registry.record import Recorder
from registry.run_data import json_tag
from registry.step_run import format_of
from registry.versions import FAMILY_TAG, family_names, is_ours, read_family, versions_of
from steps.artifacts import Manifest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


class Registrar:
    """Writes one family into MLflow. The caller holds the family's lock, which holds off others on this machine."""

    def __init__(self, recorder: Recorder, family: str) -> None:
        self.recorder = recorder
        self.client = recorder.tracking.client
        self.family = family

    def create(self) -> None:
        """Make the registered model where it does not exist."""
        with importing():
            from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.family, tags={FAMILY_TAG: "1"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def register(self, release: str, members: Sequence[tuple[str, str, Entry]]) -> int:
        """Make the versions that the release still lacks; return the principal member's."""
        manifests = [(role, self.recorder.kept(digest, entry).manifest()) for role, digest, entry in members]
        names = selectors(self.family, manifests)
        there = self._there(release)
        for (role, digest, entry), (_, manifest), name in zip(members, manifests, names, strict=True):
            if version := there.get(digest):
                # A model that was deleted stays so: a version is bound to its model for ever.
                with suppress(Lost):
                    self._make_whole(version.tags["posttrain.model"], digest, entry)
            else:
                self._make_whole(entry.models.get(manifest.output, ""), digest, entry)
                tags = _member_tags(role, manifest, name, release, head=digest == members[0][1])
                self._version(digest, entry, manifest, tags)
        # Another machine may have published the same meanwhile: all take the versions that were first.
        return int(self._there(release)[members[0][1]].version)

    def _there(self, release: str) -> "dict[str, ModelVersion]":
        """Return the versions that a release has, by the artifact's digest; of several the first."""
        found: dict[str, ModelVersion] = {}
        for version in versions_of(self.recorder.tracking, self.family):
            if is_ours(version) and version.tags["posttrain.release"] == release:
                first = found.setdefault(version.tags["posttrain.digest"], version)
                found[version.tags["posttrain.digest"]] = min(first, version, key=lambda each: int(each.version))
        return found

    def _make_whole(self, model_id: str, digest: str, entry: Entry) -> None:
        """See that a model that is to be published has its files, given again where MLflow lost them.

        Raises:
            Lost: the files are nowhere, or MLflow no longer holds the model itself.
        """
        kept = self.recorder.kept_model(model_id, digest)
        if model_id and kept.lost():
            # It may be another model than the step's: of an earlier run that gave the same.
            self.recorder.fetch(digest, entry)
            kept.give()

    def _version(self, digest: str, entry: Entry, manifest: Manifest, tags: dict[str, str]) -> None:
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

    def tag(self, version: int, name: str, value: str) -> None:
        """Set one of our tags on a version."""
        self.client.set_model_version_tag(self.family, str(version), f"posttrain.{name}", value)

    def set_candidate(self, version: int) -> None:
        """Point the alias of the newest release to a version."""
        self.client.set_registered_model_alias(self.family, "candidate", str(version))

    def set_champion(self, state: Family, version: int, previous: int | None, why: str) -> bool:
        """Make a version champion; returns whether nobody else has moved the champion since `state` was read.

        Args:
            state: what the decision rests on.
            version: of the new champion's principal member.
            previous: where a rollback leads from then on; what stood before it in the line stays there.
            why: one sentence, kept with the move.
        """
        seen = Standing(state.champions, state.move)
        model_id = state.release(str(version)).members[0].model_id
        return Champions(self.recorder.tracking, self.family).move(seen, version, previous, model_id, why)

    def state(self) -> Family:
        """Return the family as MLflow knows it."""
        found = read_family(self.recorder.tracking, self.family)
        if found is None:
            raise RegistryError(
                f"no family `{self.family}`{nearest(self.family, family_names(self.recorder.tracking))}"
            )
        return found

    def mirror(self) -> Family:
        """Write what MLflow knows into the local index and return it; aliases that were left behind are moved up."""
        Champions(self.recorder.tracking, self.family).follow()
        state = self.state()
        self.recorder.index.put_family(self.family, state.model_dump_json(indent=1).encode())
        return state


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
