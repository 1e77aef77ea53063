"""`package.bundle`: a family's members in one directory to hand out, with model card and checksums."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from steps.artifacts import (
    MANIFEST_NAME,
    Adapter,
    Dataset,
    Draft,
    Model,
    Package,
    PackageFacts,
    Quantized,
    Report,
    digest_file,
    link_or_copy,
)
from steps.frame import Input, Job, NamesOf, Resources, StepConfig, UserError, step
from steps.package._card import Folder, Member, card, licence_of

SUMS_NAME = "SHA256SUMS"
CARD_NAME = "README.md"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class Bundle(StepConfig):
    """Bundle models for hand-out: weights, tokenizer, chat template, model card, checksums, manifests."""

    members: list[Input[Model | Quantized | Adapter]] = Field(min_length=1)
    names: tuple[str, ...] | None = NamesOf("members")
    """Names of the members, in their order; a member lies in the folder of its name."""
    report: Input[Report] | None = None
    """Comparison whose table goes into the card."""
    data: Input[Dataset] | None = None
    """Training data, described in the card."""
    title: str
    """Heading of the card."""
    licence: str | None = None
    """SPDX name, e.g. `apache-2.0`; the members' own where unset."""


@step(
    "package.bundle",
    produces=Package,
    reference="https://huggingface.co/docs/hub/model-cards",
    resources=Resources(cpus=1),
    opens=False,
)
def bundle(config: Bundle, job: Job) -> Draft:
    """Link the members' files, write the card, write the checksums."""
    names = folder_names(config.names, config.members)
    out = job.output()
    sums: dict[str, str] = {}
    for index, (name, member) in enumerate(zip(names, config.members, strict=True)):
        job.progress(index, len(names), name)
        sums |= _link_member(member, out, name)
    folders, more = _with_tokenizers(names, config.members, out)
    licence = licence_of(config.licence, {each.name: each.artifact for each in folders})
    if licence.disagreement:
        job.note(licence.disagreement.removesuffix("."))
    text = card(config.title, licence, folders, _table(config.report), config.data)
    (out / CARD_NAME).write_text(text, encoding="utf-8")
    sums |= more | {CARD_NAME: digest_file(out / CARD_NAME).sha256}
    lines = "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))
    (out / SUMS_NAME).write_text(lines, encoding="utf-8")
    return Package.draft(out, PackageFacts(members=tuple(names)))


def folder_names(names: Sequence[str] | None, members: Sequence[Member]) -> list[str]:
    """Turn members' names into folder names: `gguf[Q4_K_M]` becomes `gguf-Q4_K_M`.

    Raises:
        UserError: not one name a member, or two that come to the same folder.
    """
    if names and len(names) != len(members):
        raise UserError(
            f"package.bundle: `names` has {len(names)} entries for {len(members)} members; give one name a member"
        )
    folders: list[str] = []
    for name in names or [_own_name(member) for member in members]:
        folder = _UNSAFE.sub("-", name).strip("-.")
        if not folder or folder in [*folders, CARD_NAME, SUMS_NAME, MANIFEST_NAME]:
            raise UserError(f"package.bundle: member `{name}` needs a folder of its own; give it another of `names`")
        folders.append(folder)
    return folders


def _own_name(member: Member) -> str:
    if isinstance(member, Quantized):
        return f"{member.facts.format}-{member.facts.scheme}"
    return member.kind.lower()


def _link_member(member: Member, out: Path, folder: str) -> dict[str, str]:
    """Link a member's files and its manifest; return sha256 by path in the package.

    The digests are the manifest's own, not those of the bytes on this disk: a file that was damaged after it was
    published must fail the check.
    """
    for path in member.manifest.files:
        link_or_copy(member.path / path, out / folder / path)
    link_or_copy(member.path / MANIFEST_NAME, out / folder / MANIFEST_NAME)
    sums = {f"{folder}/{path}": entry.sha256 for path, entry in member.manifest.files.items()}
    return sums | {f"{folder}/{MANIFEST_NAME}": member.digest}


def _with_tokenizers(names: Sequence[str], members: Sequence[Member], out: Path) -> tuple[list[Folder], dict[str, str]]:
    """Put a tokenizer at hand for every member: its own, or that of a member with the same chat template.

    A borrowed one lies in `tokenizers/<member>`, beside the member's folder, which stays as its manifest says.

    Raises:
        UserError: a member that needs a tokenizer has none, and no other member has one that fits.
    """
    folders: list[Folder] = []
    sums: dict[str, str] = {}
    for name, member in zip(names, members, strict=True):
        if "tokenizer.json" in member.manifest.files:
            folders.append(Folder(name, member, name))
            continue
        donor = next((each for each in members if _can_lend(each, member)), None)
        if donor is not None:
            sums |= _lend(donor, out, f"tokenizers/{name}")
        elif not (isinstance(member, Quantized) and member.facts.format == "gguf"):
            raise UserError(
                f"package.bundle: member `{name}` has no tokenizer and no other member shares its chat template; "
                "add the model it was made from to `members`"
            )
        folders.append(Folder(name, member, f"tokenizers/{name}" if donor is not None else ""))
    return folders, sums


def _can_lend(donor: Member, member: Member) -> bool:
    template = member.facts.template_sha256
    return template is not None and donor.facts.template_sha256 == template and "tokenizer.json" in donor.manifest.files


def _lend(donor: Member, out: Path, folder: str) -> dict[str, str]:
    files = {path: entry for path, entry in donor.manifest.files.items() if path in _TOKENIZER_FILES}
    for path in files:
        link_or_copy(donor.path / path, out / folder / path)
    return {f"{folder}/{path}": entry.sha256 for path, entry in files.items()}


def _table(report: Report | None) -> str:
    if report is None:
        return ""
    if "table.md" not in report.manifest.files:
        raise UserError(
            f"package.bundle: the report from {report.manifest.step} holds no table.md; give one of evaluate.compare"
        )
    return (report.path / "table.md").read_text(encoding="utf-8")
