"""Runs whose process is gone: Prefect would show them as running, or start them late, for ever."""

from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from flows.team.state import PREFECT, Team

_BEGUN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def client_of(team: Team) -> SyncPrefectClient:
    """Return a client of the team's Prefect server, whatever server the environment names."""
    return SyncPrefectClient(f"{team.url(PREFECT)}/api")


def cancel_begun(client: SyncPrefectClient) -> list[str]:
    """Mark what the worker was running as cancelled; return the runs' names. Its processes must be gone."""
    said = "Stopped by `posttrain down`; what had finished is kept, run it again to go on."
    return _close_begun(client, Cancelled(message=said))


def close_lost(client: SyncPrefectClient) -> list[str]:
    """Mark runs as crashed that a killed worker left behind; return their names. No worker may be up."""
    return _close_begun(client, Crashed(message="Its worker was killed; run it again to go on."))


def skip_missed(client: SyncPrefectClient) -> list[str]:
    """Cancel the nights that passed while nobody was up, so that they do not all run now; return their names."""
    missed = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # pyright: ignore[reportArgumentType]
        ),
    )
    nights = [run for run in missed if run.auto_scheduled]
    for run in nights:
        client.set_flow_run_state(run.id, Cancelled(name="Missed", message="Nobody was up at that time."), force=True)
    return [run.name for run in nights]


def _close_begun(client: SyncPrefectClient, state: State) -> list[str]:
    deployments = [deployment.id for deployment in client.read_deployments()]
    if not deployments:
        return []
    begun: list[FlowRun] = client.read_flow_runs(
        # A run from the command line has no deployment: its process is not the worker's.
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=deployments)),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_BEGUN))),
    )
    if not begun:
        return []
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in begun])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_BEGUN))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, state, force=True)
    for run in begun:
        client.set_flow_run_state(run.id, state, force=True)
    return [run.name for run in begun]
