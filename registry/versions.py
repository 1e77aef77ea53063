"""Families as MLflow holds them: a registered model, its versions and aliases, read into our own words."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from registry.champions import SUFFIX, replay
from registry.gates import GateDecision
from registry.importing import importing
from registry.members import Family, Member, Release, ReportRef
from registry.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FAMILY_TAG = "posttrain.family"
"""Tag by which a registered model is known to be ours."""


def read_family(tracking: Tracking, family: str) -> Family | None:
    """Ask MLflow for a family; None where there is none of ours."""
    with importing():
        from mlflow.exceptions import MlflowException

    try:
        registered = tracking.client.get_registered_model(family)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if FAMILY_TAG not in registered.tags:
        return None
    every = sorted(versions_of(tracking, family), key=lambda version: int(version.version))
    ours = [version for version in every if is_ours(version)]
    standing = replay(registered, ours, versions_of(tracking, f"{family}{SUFFIX}"))[-1]
    stands = {**registered.aliases, "champion": standing.champion, "previous": standing.previous}
    known = {int(version.version) for version in every}
    aliases = {name: int(version) for name, version in sorted(stands.items()) if version and int(version) in known}
    groups: dict[str, list[ModelVersion]] = {}
    for version in ours:
        groups.setdefault(version.tags["posttrain.release"], []).append(version)
    releases = [_release(release, versions, aliases) for release, versions in groups.items()]
    return Family(
        name=family,
        aliases=aliases,
        releases=tuple(each for each in releases if each),
        champions=standing.line,
        move=standing.move,
    )


def is_ours(version: "ModelVersion") -> bool:
    """Whether a release made this version: not somebody by hand, and its source is the model that it names."""
    own = version.source == f"models:/{version.tags.get('posttrain.model')}"
    return own and "posttrain.release" in version.tags


def _release(release: str, versions: list["ModelVersion"], aliases: Mapping[str, int]) -> Release | None:
    """Put a release together from its versions, oldest first; None while its principal member is missing.

    Where two machines published the same at once, there are several versions of a member: the first counts.
    """
    first = {version.tags["posttrain.digest"]: version for version in reversed(versions)}
    ordered = sorted(
        (each for each in versions if first[each.tags["posttrain.digest"]] is each),
        key=lambda version: version.tags["posttrain.head"] != "true",
    )
    head, tags = ordered[0], ordered[0].tags
    if tags["posttrain.head"] != "true":
        return None
    return Release(
        id=release,
        family=head.name,
        version=int(head.version),
        members=tuple(map(_member, ordered)),
        aliases=tuple(name for name, version in aliases.items() if version == int(head.version)),
        decision=_decision(tags.get("posttrain.decision", "")),
        reports={
            step: ReportRef.model_validate(ref) for step, ref in json.loads(tags.get("posttrain.reports", "{}")).items()
        },
        execution=tags.get("posttrain.execution", ""),
        succeeds=int(tags["posttrain.succeeds"]) if "posttrain.succeeds" in tags else None,
        rolled_back=tags.get("posttrain.rolled_back", ""),
        created_at=datetime.fromtimestamp(head.creation_timestamp / 1000, UTC),
    )


def _decision(text: str) -> GateDecision | None:
    """Read a decision; one that cannot be read counts as none, so that the next publication decides again."""
    try:
        return GateDecision.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _member(version: "ModelVersion") -> Member:
    fields = {name.removeprefix("posttrain."): value for name, value in version.tags.items()}
    return Member.model_validate(
        {
            **fields,
            "family": version.name,
            "name": fields["member"],
            "parents": json.loads(fields["parents"] or "{}"),
            "version": int(version.version),
            "run_id": version.run_id,
            "model_id": fields["model"],
        }
    )


def versions_of(tracking: Tracking, family: str) -> Iterator["ModelVersion"]:
    """Yield all versions of a registered model."""
    token = None
    while True:
        page = tracking.client.search_model_versions(f"name = '{family}'", max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def family_names(tracking: Tracking) -> list[str]:
    """Return the names of our registered models."""
    names, token = [], None
    while tracking.may_exist:
        page = tracking.client.search_registered_models(max_results=1000, page_token=token)
        names += [registered.name for registered in page if FAMILY_TAG in registered.tags]
        token = page.token
        if not token:
            break
    return sorted(names)
