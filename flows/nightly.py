"""The flow `nightly`: run a recipe if something changed; a better model becomes champion, a worse one does not."""

from collections.abc import Sequence

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.ending import Ending
from flows.lifecycle import run_name, run_steps
from flows.prefect_artifacts import show_unchanged
from flows.prepare import prepare
from flows.publication import is_current
from registry.errors import RegistryError
from steps.frame import UserError


@flow(name="nightly", flow_run_name=run_name, persist_result=False, result_serializer="json")
def nightly(recipe: str, profile: str = "", overrides: Sequence[str] = ()) -> State:
    """Run a recipe where its data, its settings or a library changed since its last publication.

    The state's name says how the night ended: `Unchanged`, `Promoted`, `NotPromoted`, or `Failed`; its message says
    why. The champion of the night before is measured on the same rows as the new candidate.

    Args:
        recipe: Name of a file in `recipes/`.
        profile: One of the recipe's profiles, such as `pico`; empty for the recipe as it stands.
        overrides: Keys of the recipe to change for this run, each as path=value: `steps.sft.epochs=2`.
    """
    try:
        execution = prepare(recipe, overrides, profile=profile)
    except (UserError, RegistryError) as error:
        return Failed(message=str(error))
    if not execution.plan.todo and (current := is_current(execution)):
        name = execution.plan.graph.loaded.name
        sentence = f"{name}: nothing changed since the last run. {current.sentence}"
        show_unchanged(name, sentence)
        return Completed(name="Unchanged", message=sentence)
    return _state(run_steps(execution, publish=True))


def _state(ending: Ending) -> State:
    if not ending.ok:
        return Failed(message=ending.sentence)
    if ending.release is None:
        return Completed(message=ending.sentence)
    return Completed(name="Promoted" if ending.promoted else "NotPromoted", message=ending.sentence)
