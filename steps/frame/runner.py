"""Run one step in this process: resolve its inputs, call it, digest and publish what it returns."""

import errno
import faulthandler
import logging
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steps.artifacts import Artifact, Draft, Facts, Manifest, Parent, Store, digest_tree
from steps.frame.code import code_modules, digest_modules
from steps.frame.config import StepConfig, choices_of, edges_of
from steps.frame.errors import PartDone, ProofFailed, UserError, first_complaint
from steps.frame.job import Job
from steps.frame.kinds import StepKind, load_kind
from steps.frame.pinned import pin
from steps.frame.row_place import row_place
from steps.frame.scale import rank_of
from steps.frame.spec import LOG_NAME, RESULT_NAME, InputSpec, StepResult, StepSpec

_ROOM = Path(__file__).parents[1]
"""The directory of all steps."""
_LONGEST = 600
"""Letters of a message."""


def run_step(spec: StepSpec) -> StepResult:
    """Run a step to its end and write `result.json` into its work directory.

    Of several processes the main one publishes and writes; another is heard only where it fails, because what the rest
    then say is only that they lost it.

    Never raises for what a step does: a `UserError` becomes `refused`, anything else `failed` with the last line of
    the traceback (the whole of it is in the log).
    """
    began = time.perf_counter()
    # Where a native library dies, the log tells which Python frames had called it.
    faulthandler.enable()
    rank = rank_of(spec)
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("posttrain.frame").info("begins: %s (%s), key %s", spec.name, spec.kind, spec.key[:16])
    try:
        result = _run(spec, rank)
    except PartDone:
        return StepResult(status="finished", seconds=time.perf_counter() - began)
    except UserError as error:
        result = StepResult(status="refused", message=_brief(str(error)))
    except Exception as error:
        # Where the disk is full, the log and the result need the room that the half-made output takes.
        shutil.rmtree(spec.work / "staging", ignore_errors=True)
        at = row_place()
        traceback.print_exc()
        full = _is_disk_full(error)
        result = StepResult(status="refused", message=_disk_full(spec)) if full else _failed(spec, error, at)
    shutil.rmtree(spec.work / "staging", ignore_errors=True)
    result = result.model_copy(update={"seconds": time.perf_counter() - began, "peak_memory": peak_memory()})
    _write_result(spec, result, rank)
    return result


def peak_memory() -> int:
    """Largest resident set of this process or of any child it waited for, in bytes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage.ru_maxrss for usage in usages) * 1024


def _run(spec: StepSpec, rank: int) -> StepResult:
    began = time.perf_counter()
    _pin_code(spec)
    kind = load_kind(spec.kind)
    config, parents = _resolve(kind, spec)
    job = Job(spec, rank)
    limit_threads(job.cpus)
    ready = time.perf_counter()
    returned = kind.run(config, job)
    done = time.perf_counter()
    drafts: Mapping[str, Draft] = {"": returned} if isinstance(returned, Draft) else returned
    _check_outputs(kind, config, drafts)
    _check_sources(spec)
    store = Store(spec.store)
    outputs = {name: _publish(spec, kind, config, name, draft, parents, store).digest for name, draft in drafts.items()}
    own = ready - began + time.perf_counter() - done
    return StepResult(status="finished", outputs=outputs, metrics=job.last_metrics, notes=job.notes, load_seconds=own)


def _pin_code(spec: StepSpec) -> None:
    """Let the step run, to its end, the code that its key speaks of; what is edited meanwhile is for the next run.

    Its scratch space is kept: it is of that code, too, and right again once the code is back.

    Raises:
        UserError: the code is another already.
    """
    if not spec.code:
        return
    changed = f"step `{spec.name}`: its code was changed between the plan and the step; run again"
    try:
        modules = code_modules(f"steps.{spec.kind}")
        pin(modules)
        if digest_modules(modules) != spec.code:
            raise UserError(changed)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{changed} ({error})") from None


def _resolve(kind: StepKind, spec: StepSpec) -> tuple[StepConfig, dict[str, Parent]]:
    """Build the config with artifacts in place of references, and the parents by role.

    Raises:
        UserError: they do not agree with the settings, or a set of rows is empty. No step makes one, and none has a use
            for one: it is said here once, before any model is loaded.
    """
    store = Store(spec.store)
    values: dict[str, Any] = dict(spec.config)
    parents: dict[str, Parent] = {}

    def opened(role: str, item: InputSpec) -> Artifact[Any]:
        artifact = store.open(item.digest)
        parents[role] = Parent(kind=artifact.kind, digest=artifact.digest)
        if getattr(artifact.facts, "rows", None) == 0:
            field, _, index = role.partition(".")
            place = f"entry {int(index) + 1} of `{field}`" if index else f"`{field}`"
            made_by = artifact.manifest.step
            raise UserError(f"step `{spec.name}`: {place} (from {made_by}) has no rows; name a set that has some")
        return artifact

    for field, items in spec.inputs.items():
        if field in spec.lists:
            values[field] = [opened(f"{field}.{index}", item) for index, item in enumerate(items)]
        else:
            values[field] = opened(field, items[0])
    try:
        return kind.config.model_validate(values), parents
    except ValidationError as error:
        raise UserError(f"step `{spec.name}` ({kind.name}): {first_complaint(error)}") from error


def _publish(
    spec: StepSpec,
    kind: StepKind,
    config: StepConfig,
    name: str,
    draft: Draft,
    parents: Mapping[str, Parent],
    store: Store,
) -> Artifact[Any]:
    tree = digest_tree(draft.path)
    manifest = Manifest(
        kind=draft.kind.kind,
        tree=tree.sha256,
        files=tree.files,
        parents=parents,
        step=kind.name,
        output=name,
        key=spec.key,
        config=spec.config,
        libraries=kind.library_versions(config),
        facts=_with_rows_behind(_with_choices(draft.facts, config), config).as_plain(),
    )
    return store.publish(draft.path, manifest)


def _with_choices(facts: Facts, config: StepConfig) -> Facts:
    """Return a model's facts with the rows that it, or what it was made of, was chosen by."""
    if "chosen_on" not in type(facts).model_fields:
        return facts
    found: set[str] = set(getattr(facts, "chosen_on", ()))
    for artifact in _inputs(config):
        found.update(getattr(artifact.facts, "chosen_on", ()))
    for field in choices_of(type(config)):
        if (chooser := getattr(config, field)) is not None:
            found.update(chooser.all_rows)
    return facts.model_copy(update={"chosen_on": tuple(sorted(found))})


def _with_rows_behind(facts: Facts, config: StepConfig) -> Facts:
    """Return the facts of rows, or of a report on rows, with those from which the step made them.

    Only which sets they were, not which rows: of two that were mixed or filtered from one set it is known that they may
    share some.
    """
    if "made_of" not in type(facts).model_fields:
        return facts
    found = {
        each
        for artifact in _inputs(config)
        if "made_of" in type(artifact.facts).model_fields
        for each in artifact.all_rows
    }
    return facts.model_copy(update={"made_of": tuple(sorted(found))})


def _inputs(config: StepConfig) -> Iterator[Artifact[Any]]:
    for field in edges_of(type(config)):
        given = getattr(config, field)
        yield from given if isinstance(given, list) else [given] if given is not None else []


def _check_outputs(kind: StepKind, config: StepConfig, drafts: Mapping[str, Draft]) -> None:
    found = {name: draft.kind for name, draft in drafts.items()}
    values = {name: getattr(config, name) for name in kind.edges}
    given = {name: type(value[0] if isinstance(value, list) else value) for name, value in values.items() if value}
    if found != (declared := kind.outputs_of(config, given)):
        raise TypeError(f"{kind.name} must return {declared}, it returned {found}")


def _check_sources(spec: StepSpec) -> None:
    """Refuse to publish, under a key that speaks of other bytes, what was made of a source that changed meanwhile.

    Raises:
        UserError: a source is no longer what it was when the key was computed.
    """
    if not spec.sources:
        return
    # Sources are part of what steps do, and stand on the frame.
    from steps.sources import fingerprint

    for uri, planned in spec.sources.items():
        if fingerprint(uri, Path.cwd()) != planned:
            shutil.rmtree(spec.work / "scratch", ignore_errors=True)
            raise UserError(f"step `{spec.name}`: {uri} changed between the plan and the end of the step; run again")


def limit_threads(cpus: int) -> None:
    """Fix the number of threads, so that results do not depend on what else runs on the machine."""
    os.environ["OMP_NUM_THREADS"] = str(cpus)
    os.environ["RAYON_NUM_THREADS"] = str(cpus)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(cpus)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk; libraries in Rust and C++ only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(spec: StepSpec) -> str:
    places = (path for path in (spec.work, spec.store.parent, spec.cache) if path.exists())
    full = min(places, key=lambda path: shutil.disk_usage(path).free)
    free = shutil.disk_usage(full).free
    return (
        f"step `{spec.name}`: the disk that holds {full} is full ({free / 1e6:.0f} MB left); free some space and run "
        "again"
    )


def _brief(said: str) -> str:
    """Return a sentence on one line, without the midst of what someone's data or library made endless."""
    line = " ".join(said.splitlines()) if "\n" in said else said
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 160]} ... {line[-150:]}"


def _failed(spec: StepSpec, error: Exception, at: str) -> StepResult:
    """Say in one sentence what happened, at which row, in which file of ours, and where the rest is told.

    Args:
        spec: of the step.
        error: what nobody caught.
        at: where the row stands that the step was at; empty where it was at none.
    """
    if isinstance(error, ProofFailed):
        return StepResult(status="failed", message=str(error))
    if isinstance(error, ValidationError):
        said = f"{error.title}: {first_complaint(error)}"
    else:
        said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    ours = [each for each in traceback.extract_tb(error.__traceback__) if _ROOM in Path(each.filename).parents]
    places = [at, *(f"{Path(each.filename).relative_to(_ROOM.parent)} line {each.lineno}" for each in ours[-1:])]
    where = ", ".join(filter(None, places))
    return StepResult(
        status="failed", message=f"{_brief(said)}{f' (at {where})' if where else ''}; its log is {spec.work / LOG_NAME}"
    )


def _write_result(spec: StepSpec, result: StepResult, rank: int) -> None:
    """Write the result whole; of several processes the first to end says what became of the step."""
    if spec.resources.world == 1 or not (spec.work / RESULT_NAME).exists():
        result.write(spec.work, str(rank))
