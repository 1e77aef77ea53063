"""`posttrain status`: what is up, what is scheduled, how the last runs ended."""

from typing import Any

from flows.reach import answers, reach_directly
from flows.team.state import MLFLOW, PREFECT, WORKER, Running, Team
from registry.home import Home

_HEALTH = {PREFECT: "/api/health", MLFLOW: "/health"}
_RUNS = 10


def status(home: Home) -> dict[str, Any]:
    """Return the services, the deployments with their schedules, and the last runs, as plain data."""
    reach_directly()
    team = Team.read(home)
    services = {name: _service(name, running) for name, running in team.services.items()} if team else {}
    expected = {PREFECT, WORKER} if home.has_server else {PREFECT, MLFLOW, WORKER}
    up = expected <= services.keys() and all(service["up"] for service in services.values())
    answering = bool(services.get(PREFECT, {}).get("up"))
    deployments, runs = _history(team) if team and answering else ([], [])
    return {"up": up, "home": str(home.root), "services": services, "deployments": deployments, "runs": runs}


def _service(name: str, running: Running) -> dict[str, Any]:
    healthy = running.alive and (name not in _HEALTH or answers(f"{running.url}{_HEALTH[name]}"))
    return {"up": healthy, "pid": running.pid, "url": running.url, "log": str(running.log)}


def _history(team: Team) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import FlowRun, StateType
    from prefect.client.schemas.sorting import FlowRunSort

    from flows.team.runs import client_of

    begun = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=[StateType.SCHEDULED]))
    coming = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    with client_of(team) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        made = client.read_deployments()
        last = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=begun), sort=FlowRunSort.START_TIME_DESC, limit=_RUNS
        )
        waiting: list[FlowRun] = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=coming), sort=FlowRunSort.EXPECTED_START_TIME_ASC
        )
    following: dict[tuple[Any, str], str] = {}
    for run in waiting:
        if run.expected_start_time:
            key = (run.deployment_id, str(run.parameters.get("recipe")))
            following.setdefault(key, run.expected_start_time.isoformat(timespec="seconds"))
    deployments = [
        {
            "name": f"{flows[deployment.flow_id]}/{deployment.name}",
            "pool": deployment.work_pool_name,
            "schedules": [
                _schedule(each, following.get((deployment.id, each.slug or ""))) for each in deployment.schedules
            ],
        }
        for deployment in made
    ]
    return deployments, [_run(run, flows.get(run.flow_id, "")) for run in last]


def _schedule(schedule: Any, following: str | None) -> dict[str, Any]:
    return {
        "recipe": schedule.slug,
        "cron": schedule.schedule.cron,
        "timezone": schedule.schedule.timezone,
        "active": schedule.active,
        "next": following,
    }


def _run(run: Any, flow: str) -> dict[str, Any]:
    return {
        "id": str(run.id),
        "flow": flow,
        "name": run.name,
        "state": run.state_name,
        "message": run.state.message if run.state else None,
        "started": run.start_time.isoformat(timespec="seconds") if run.start_time else None,
        "seconds": round(run.total_run_time.total_seconds(), 1),
        "scheduled": run.auto_scheduled,
    }
