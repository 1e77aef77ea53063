"""What keeps a step from running here: a source that does not answer, a member that is lost, a lack of room."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.base_check import misfit
from flows.graph import Graph
from flows.runtimes import fault, gpu_fault, needed, unproven
from registry.family import load, member_at
from registry.members import Family, Member
from registry.record import Recorder
from steps.frame import UserError
from steps.frame.config import sources_of
from steps.frame.kinds import ABSENT, version_of
from steps.frame.scale import lacking
from steps.sources import check

if TYPE_CHECKING:
    from flows.plan import PlannedStep

REGISTRY = "registry://"


def is_to_run(step: "PlannedStep") -> bool:
    """Whether a step's function is to be called."""
    return step.status not in ("cached", "record")


def blocked(graph: Graph, step: "PlannedStep", recorder: Recorder, root: Path) -> "PlannedStep":
    """Check what only matters for a step that is to run, here: that its sources answer and the machine has room."""
    if not is_to_run(step):
        return step
    for uris in sources_of(step.node.config).values():
        for uri in uris:
            try:
                if uri.startswith(REGISTRY):
                    _check_member(recorder, uri)
                else:
                    check(uri, root, recorder.home.cache)
            except UserError as error:
                where = graph.loaded.file.where(step.node.place)
                return replace(step, status="blocked", reason=f"{where}: {error}")
    if why := misfit(graph, step.node, recorder.home.cache, root):
        return replace(step, status="blocked", reason=why)
    environment = step.node.kind.environment
    if environment and not environment_python(environment).exists():
        return replace(
            step, status="blocked", reason=f"needs the environment {environment_python(environment).parents[1]}"
        )
    absent = [name for name in step.node.config.packages if version_of(name) == ABSENT]
    if absent:
        said = graph.loaded.error(step.node.place, f"its settings need {absent[0]}, which is not installed")
        return replace(step, status="blocked", reason=str(said))
    key, why = lacking(step.node.resources)
    if why:
        said = graph.loaded.error((*step.node.place, "resources", key), why)
        return replace(step, status="blocked", reason=str(said))
    return step if environment else _with_verdict(graph, step)


def _with_verdict(graph: Graph, step: "PlannedStep") -> "PlannedStep":
    """Block a step of which a native runtime is broken on this machine; say of which it is not known."""
    runtimes = needed(graph, step.node)
    if why := fault(runtimes):
        return replace(step, status="blocked", reason=f"{graph.loaded.file.where(step.node.place)}: {why}")
    said = [step.reason] if step.reason else []
    if open_ := unproven(runtimes):
        said.append(f"{', '.join(open_)} not proven on this machine yet")
    if "torch" in runtimes and (why := gpu_fault()):
        said.append(why)
    return replace(step, reason="; ".join(said))


def _check_member(recorder: Recorder, uri: str) -> None:
    """See that the published model that a source names can be had; where it is here, nobody is asked.

    Raises:
        UserError: MLflow no longer holds it.
    """
    if not recorder.home.has_server:
        return
    member = member_at(recorder.home, uri)
    if recorder.home.store.quick_fault(member.digest) is None:
        return
    if why := recorder.kept_model(member.model_id, member.digest).lost():
        raise UserError(f"{uri}: {why}; {_instead(load(recorder.home, member.family), member)}")


def _instead(family: Family, member: Member) -> str:
    """Say what to do where a published model is lost."""
    if family.release(str(member.version)).version != family.aliases.get("champion"):
        return "name another version"
    if "previous" in family.aliases:
        return f"`posttrain rollback {family.name}` makes the release before it champion"
    return "it is the only champion so far: publish once without a gate `against: champion`"


def environment_python(name: str) -> Path:
    """Return the interpreter of an environment of a step kind's own."""
    return Path(".venvs") / name / "bin" / "python"
