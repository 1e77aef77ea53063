"""What is up: the file by which `up`, `down`, `status` and every run on this machine find the team's processes."""

from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from registry.home import Home
from steps.artifacts import write_atomic

PREFECT = "prefect"
MLFLOW = "mlflow"
WORKER = "worker"


class Running(BaseModel):
    """One process that `up` started."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pid: int
    """Also the id of its session and process group."""
    created: float
    """When the process began, by which a later one with the same id is told apart; seconds since 1970."""
    url: str = ""
    """Where people and programs reach it; empty for the worker."""
    log: Path

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Team(BaseModel):
    """The processes of one home, by name: `prefect`, `mlflow`, `worker`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    root: Path
    """Directory in which `up` was called: where `recipes/` lies and the worker's flows run."""
    services: dict[str, Running] = {}

    @classmethod
    def read(cls, home: Home) -> "Team | None":
        """Return what the home's state file says; None where there is none."""
        try:
            return cls.model_validate_json(state_file(home).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, home: Home) -> None:
        """Replace the state file in one rename."""
        write_atomic(state_file(home), self.model_dump_json(indent=1).encode())

    @property
    def complete(self) -> bool:
        """Whether the start went to its end and every process still runs."""
        return WORKER in self.services and all(service.alive for service in self.services.values())

    def url(self, service: str) -> str:
        """Return where a service is reached; empty where it does not run."""
        running = self.services.get(service)
        return running.url if running and running.alive else ""


def folder(home: Home) -> Path:
    """Return the directory of the team's state and logs."""
    return home.root / "team"


def state_file(home: Home) -> Path:
    """Return the state file."""
    return folder(home) / "state.json"


def prefect_url(home: Home) -> str:
    """Return the API of the team's Prefect server; empty where none is up."""
    team = Team.read(home)
    url = team.url(PREFECT) if team else ""
    return f"{url}/api" if url else ""


def mlflow_url(home: Home) -> str:
    """Return where MLflow's pages are served: the tracking server, or the team's; empty where there is none."""
    team = Team.read(home)
    return home.tracking_uri.rstrip("/") if home.has_server else team.url(MLFLOW) if team else ""
