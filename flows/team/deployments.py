"""The deployments of `infra/prefect.yaml`, made on a server with their form, their pool and their schedules."""

import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ConfigDict, ValidationError

from flows.prepare import RECIPES, recipe_names
from flows.recipe import load_recipe
from flows.yaml_file import YamlFile
from steps.frame import UserError

POOL = "local"
NIGHTLY = "nightly"
FILE = Path(__file__).parents[2] / "infra" / "prefect.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Pool(_Part):
    name: str


class Deployment(_Part):
    """One entry of `deployments:`; the keys are those of Prefect's own `prefect.yaml`."""

    name: str
    entrypoint: str
    description: str = ""
    parameters: dict[str, Any] = {}
    tags: list[str] = []
    work_pool: _Pool


class _File(_Part):
    name: str
    deployments: list[Deployment]


def read_deployments() -> list[Deployment]:
    """Read `infra/prefect.yaml`.

    Raises:
        UserError: it is missing, or an entry is wrong.
    """
    try:
        return _File.model_validate(YamlFile.read(FILE).content).deployments
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{FILE}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None


def make_pools(client: SyncPrefectClient, deployments: list[Deployment]) -> None:
    """Make the process pools that the deployments name, where they are not there."""
    for name in {deployment.work_pool.name for deployment in deployments}:
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        except ObjectAlreadyExists:
            continue


def deploy(client: SyncPrefectClient, root: Path) -> dict[str, list[str]]:
    """Make or renew every deployment; return the recipes on each one's schedule.

    Prefect's own `deploy` command is not used: it has put a deployment on its default pool in spite of the file, and
    it knows neither our recipes nor their schedules.

    Args:
        client: of the server.
        root: directory with `recipes/`, in which flows will run.

    Raises:
        UserError: the file or a recipe's schedule is wrong, or the server keeps a deployment on another pool.
    """
    deployments = read_deployments()
    schedules = nightly_schedules()
    make_pools(client, deployments)
    made = {}
    for deployment in deployments:
        flow = _flow_of(deployment)
        own = schedules if deployment.name == NIGHTLY else {}
        deployment_id = client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name=deployment.name,
            description=deployment.description,
            parameters=deployment.parameters,
            tags=deployment.tags,
            entrypoint=deployment.entrypoint,
            path=str(root),
            work_pool_name=deployment.work_pool.name,
            # With a command of our own the worker starts the engine at once, without a supervisor in between.
            job_variables={
                "working_dir": str(root),
                # The worker takes it apart at its spaces.
                "command": shlex.join([sys.executable, "-m", "prefect.engine"]),
            },
            parameter_openapi_schema=form(flow),
            enforce_parameter_schema=True,
            schedules=_kept_paused(client, f"{flow.name}/{deployment.name}", own),
        )
        _check_pool(client.read_deployment(deployment_id).work_pool_name, deployment)
        made[deployment.name] = sorted(own)
    return made


def form(flow: Flow[..., Any]) -> dict[str, Any]:
    """Return the flow's parameters as the JSON Schema behind the UI's form; `recipe` is chosen from a list."""
    schema = parameter_schema(flow).model_dump_for_openapi()
    recipe = schema["properties"]["recipe"]
    recipe["enum"] = recipe_names()
    return schema


def nightly_schedules() -> dict[str, CronSchedule]:
    """Return the schedule of each recipe in `recipes/` that has one.

    Raises:
        UserError: a recipe cannot be read, or its schedule is no cron line or names no time zone.
    """
    found = {}
    for name in recipe_names():
        loaded = load_recipe(RECIPES / f"{name}.yaml")
        if schedule := loaded.recipe.schedule:
            try:
                found[name] = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
            except ValidationError as error:
                first = error.errors()[0]
                message = first["msg"].removeprefix("Value error, ")
                raise loaded.error(("schedule", *map(str, first["loc"])), message) from None
    return found


def _kept_paused(
    client: SyncPrefectClient, name: str, schedules: Mapping[str, CronSchedule]
) -> list[DeploymentScheduleCreate]:
    """Return the schedules to create, each as active as someone left it in the UI."""
    try:
        before = {each.slug: each.active for each in client.read_deployment_by_name(name).schedules}
    except ObjectNotFound:
        before = {}
    return [
        DeploymentScheduleCreate(
            schedule=schedule, slug=recipe, active=before.get(recipe, True), parameters={"recipe": recipe}
        )
        for recipe, schedule in schedules.items()
    ]


def _flow_of(deployment: Deployment) -> Flow[..., Any]:
    module, _, name = deployment.entrypoint.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, Flow):
        raise UserError(f"{FILE}: deployments.{deployment.name}.entrypoint: `{deployment.entrypoint}` is no flow")
    return found


def _check_pool(pool: str | None, deployment: Deployment) -> None:
    if pool != deployment.work_pool.name:
        raise UserError(f"deployment {deployment.name} is on pool {pool}, not on {deployment.work_pool.name}")
