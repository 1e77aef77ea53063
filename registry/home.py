"""The home: the one directory in which everything of this machine lies, and the tracking server it speaks to."""

import os
from dataclasses import dataclass
from pathlib import Path

from registry.errors import RegistryError
from steps.artifacts import Store

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
"""Environment by which MLflow 3.17 (`mlflow.environment_variables`) and Prefect 3.8 send nothing home."""


@dataclass(frozen=True)
class Home:
    """Paths below one root, all absolute.

    `artifacts/<digest>/` holds the artifacts, `mlflow.db` and `mlruns/` are MLflow's own when it runs embedded,
    `index/` answers without MLflow, `work/<key>/` belongs to running steps, `cache/` to downloads.
    """

    root: Path
    tracking_uri: str

    @classmethod
    def at(cls, root: Path, tracking_uri: str | None = None) -> "Home":
        """Return the home at `root`; MLflow is embedded there unless a tracking URI is given."""
        # One home has one name: by it the team's processes are found, and its state by other nodes.
        root = root.expanduser().resolve()
        return cls(root, tracking_uri or f"sqlite:///{root / 'mlflow.db'}")

    @classmethod
    def from_environment(cls, *, writes: bool = False) -> "Home":
        """Return the home that `POSTTRAIN_HOME` (default `.posttrain`) and `MLFLOW_TRACKING_URI` name.

        Args:
            writes: make the directory where it is not there, and refuse one that this user may only read.

        Raises:
            RegistryError: it can be no home.
        """
        named = os.environ.get("POSTTRAIN_HOME") or ".posttrain"
        try:
            home = cls.at(Path(named), os.environ.get("MLFLOW_TRACKING_URI"))
            fault = _fault(home.root)
            if writes and not fault:
                home.root.mkdir(parents=True, exist_ok=True)
                fault = "" if os.access(home.root, os.W_OK) else "this user may not write there"
        except (OSError, RuntimeError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise _no_home(named, why or type(error).__name__) from None
        if fault:
            raise _no_home(named, fault)
        return home

    @property
    def store(self) -> Store:
        """The local store of artifacts."""
        return Store(self.root / "artifacts")

    @property
    def database(self) -> Path:
        """MLflow's embedded database."""
        return self.root / "mlflow.db"

    @property
    def mlruns(self) -> Path:
        """Where embedded MLflow keeps the files of runs and models."""
        return self.root / "mlruns"

    @property
    def index(self) -> Path:
        """Directory of the local index, see `registry.index`."""
        return self.root / "index"

    @property
    def cache(self) -> Path:
        """Downloads shared by all steps."""
        return self.root / "cache"

    def work(self, key: str) -> Path:
        """Return the work directory of the step with this key."""
        return self.root / "work" / key[:16]

    @property
    def has_server(self) -> bool:
        """Whether tracking goes to a server over HTTP."""
        return self.tracking_uri.startswith(("http://", "https://"))

    @property
    def embedded(self) -> bool:
        """Whether MLflow is a SQLite file that only this machine writes, so that the local index knows all of it."""
        return self.tracking_uri.startswith("sqlite:")


def _no_home(named: str, why: str) -> RegistryError:
    return RegistryError(f"{named}: this can be no home: {why}; POSTTRAIN_HOME names another place")


def _fault(root: Path) -> str:
    """Say why a directory, which need not exist, cannot be a home; empty where it can."""
    if "?" in str(root):
        # SQLAlchemy and MLflow take what follows it for options of the database.
        return "its path has a `?`"
    if not root.exists():
        parent = next(path for path in root.parents if path.exists())
        return "" if parent.is_dir() else f"{parent} is no directory"
    if not root.is_dir():
        return "it is no directory"
    return "" if os.access(root, os.R_OK | os.X_OK) else "this user may not read it"


def silence_telemetry() -> None:
    """Turn the telemetry of MLflow and Prefect off, here and in child processes, unless `POSTTRAIN_TELEMETRY=1`."""
    if os.environ.get("POSTTRAIN_TELEMETRY") != "1":
        os.environ.update(TELEMETRY_OFF)
