"""Members of a family: one model in one format, named by the field's conventions."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from registry.errors import RegistryError, nearest
from registry.gates import GateDecision
from registry.step_run import format_of
from steps.artifacts import Manifest


class Member(BaseModel):
    """One version of a registered model."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    family: str
    name: str
    """`NAME`, `NAME-adapter`, `NAME-GPTQ-Int4`, `NAME-AWQ`, `NAME-GGUF:Q4_K_M`."""
    role: str
    """The step that gave it, as the recipe names it."""
    kind: str
    format: str
    """`hf`, `adapter`, `gguf`, `gptq`, `awq`, ..."""
    scheme: str
    selector: str
    """What `pull --format` takes: `hf`, `gguf:Q4_K_M`, `gptq-int4`."""
    digest: str
    parents: Mapping[str, str]
    """Artifact digests by role."""
    key: str
    """Key of the step that made it."""
    release: str
    version: int
    run_id: str
    model_id: str
    size: int
    """Bytes."""


class ReportRef(BaseModel):
    """A report that a release was judged by."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    digest: str
    key: str


class Release(BaseModel):
    """All members of one publication; its id is the sha256 over their digests, the principal's first."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    family: str
    version: int
    """Version of the principal member: the one that aliases point to."""
    members: tuple[Member, ...]
    """The principal member first."""
    aliases: tuple[str, ...] = ()
    decision: GateDecision | None = None
    reports: Mapping[str, ReportRef] = {}
    """By step name."""
    execution: str = ""
    """MLflow run that published it."""
    succeeds: int | None = None
    """Version that was champion before this release was."""
    rolled_back: str = ""
    """When and why it was taken back, as JSON; empty where it was not."""
    created_at: datetime

    @property
    def taken_back(self) -> str:
        """When and why it was rolled back, and how it is promoted all the same; empty where it was not."""
        if not self.rolled_back:
            return ""
        said = json.loads(self.rolled_back)
        because = f" ({said['reason']})" if said["reason"] else ""
        by_hand = f"`posttrain promote {self.family} {self.version}`"
        return f"rolled back at {said['at']}{because}; if it is right, {by_hand} makes it champion"

    def member(self, format: str | None) -> Member:
        """Return the member in a format (`gguf:Q4_K_M`, `gptq-int4`, `hf`), the principal one for None.

        Raises:
            RegistryError: the release has none, or several.
        """
        if format is None:
            return self.members[0]
        wanted = format.casefold()
        exact = [each for each in self.members if each.selector.casefold() == wanted]
        found = exact or [each for each in self.members if wanted in _spellings(each)]
        selectors = [each.selector for each in self.members]
        if len(found) > 1:
            raise RegistryError(
                f"`{format}` names several members of {self.family}: {', '.join(m.selector for m in found)}"
            )
        if not found:
            raise RegistryError(f"{self.family} has no member in format `{format}`{nearest(format, selectors)}")
        return found[0]


class Family(BaseModel):
    """A product's releases and where its aliases point."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    aliases: Mapping[str, int]
    """Version by alias: `candidate`, `champion`, `previous`."""
    releases: tuple[Release, ...]
    """Oldest first."""
    champions: tuple[int, ...] = ()
    """Versions through which rollbacks lead, the champion last."""
    move: int = 0
    """Number of the last move of its champion, see `registry.champions`."""

    def told(self, release: Release) -> str:
        """Say what was decided of a release, and first what became of that: who promoted it may not stand any more."""
        if release.decision is None:
            return "No decision."
        said, champion = release.decision.sentence, self.aliases.get("champion")
        if champion == release.version or said.startswith("Not promoted"):
            return said
        if release.rolled_back:
            return f"It was {release.taken_back}. Before that: {said}"
        since = f"Version {champion} is champion now" if champion else "It is not champion any more"
        return f"{since}. Earlier: {said}"

    def release(self, reference: str) -> Release:
        """Return the release of an alias (`champion`), of a version number, or of an id's first 8 or more digits.

        Raises:
            RegistryError: there is none.
        """
        version = self.aliases.get(reference) or (int(reference) if reference.isdecimal() else None)
        for release in self.releases:
            if version in [member.version for member in release.members]:
                return release
            if len(reference) >= 8 and release.id.startswith(reference):
                return release
        if version is not None:
            raise RegistryError(f"family {self.name} has no version {reference}")
        if reference in ("champion", "previous"):
            others = f"; it has `{self.name}@candidate`" if "candidate" in self.aliases else ""
            raise RegistryError(f"family {self.name} has no {reference} yet{others}")
        raise RegistryError(f"family {self.name} has no alias `{reference}`{nearest(reference, self.aliases)}")

    def member(self, reference: str, format: str | None = None) -> Member:
        """Return one member; a version number without a format is that very version.

        Raises:
            RegistryError: there is none.
        """
        release = self.release(reference)
        if format is None and reference not in self.aliases and reference.isdecimal():
            return next(member for member in release.members if member.version == int(reference))
        return release.member(format)


def selectors(family: str, artifacts: Sequence[tuple[str, Manifest]]) -> list[tuple[str, str]]:
    """Return selector and member name of each artifact of a release, given with its role.

    Two members that the short names would confuse (GPTQ Int4 with two group sizes) get the whole scheme.

    Raises:
        RegistryError: two members cannot be told apart.
    """
    short = [_named(family, manifest, whole=False) for _, manifest in artifacts]
    named = [
        _named(family, manifest, whole=True) if short.count(name) > 1 else name
        for name, (_, manifest) in zip(short, artifacts, strict=True)
    ]
    for index, name in enumerate(named):
        if name in named[:index]:
            first, second = artifacts[named.index(name)][0], artifacts[index][0]
            raise RegistryError(f"family {family}: `{first}` and `{second}` are both {name[0]}; publish one of them")
    return named


def _named(family: str, manifest: Manifest, *, whole: bool) -> tuple[str, str]:
    form, scheme = format_of(manifest)
    if form == "hf":
        return "hf", family
    if manifest.kind != "Quantized":
        return form, f"{family}-{form}"
    if form == "gguf":
        return f"gguf:{scheme}", f"{family}-GGUF:{scheme}"
    shown = scheme if whole else scheme.partition("-")[0]
    if form == "awq" and not whole:
        return "awq", f"{family}-AWQ"
    tail = re.sub(r"[^\w.-]", "_", shown)
    return f"{form}-{tail.lower()}".rstrip("-"), f"{family}-{form.upper()}-{tail}".rstrip("-")


def _spellings(member: Member) -> set[str]:
    form, scheme = member.format, member.scheme
    return {text.casefold() for text in (form, member.name, f"{form}:{scheme}", f"{form}-{scheme}")}
