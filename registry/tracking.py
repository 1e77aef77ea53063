"""The one open MLflow client of a process, and where it keeps things."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import Lost, RegistryError, refusal
from registry.home import Home
from registry.importing import importing
from registry.index import Index
from registry.location import LocalLocation, Location, location_at

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_KEY = re.compile(r"[0-9a-f]{64}")
_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")


class Tracking:
    """Opens MLflow at first use (import 1.5 s, a new database 2 to 7 s more) and may be shared by threads."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._lock = threading.RLock()
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    @property
    def client(self) -> "MlflowClient":
        """The client, opened by the first to ask.

        Raises:
            RegistryError: the tracking server does not answer, or the URI is of a kind that keeps no models.
        """
        with self._lock:
            if self._client is None:
                self._client = _open(self.home)
            return self._client

    @property
    def may_exist(self) -> bool:
        """Whether there is anything to ask: a server, or a database that an earlier run made."""
        return not self.home.embedded or Path(self.home.tracking_uri.removeprefix("sqlite:///")).is_file()

    def experiment(self, name: str) -> str:
        """Return the id of the experiment with this name; made, or restored from the bin, where need be."""
        with importing():
            from mlflow.exceptions import MlflowException

        with self._lock:
            if name in self._experiments:
                return self._experiments[name]
            found = self.client.get_experiment_by_name(name)
            if found is None:
                folder = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "experiment"
                location = None if self.home.has_server else (self.home.mlruns / folder).as_uri()
                try:
                    self._experiments[name] = self.client.create_experiment(name, artifact_location=location)
                except MlflowException:
                    # Another process made it between the question and now.
                    found = self.client.get_experiment_by_name(name)
                    if found is None:
                        raise
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
            return self._experiments[name]

    def runs(self, condition: str, *, limit: int | None = None) -> "Iterator[Run]":
        """Yield the runs of all experiments that meet a condition, the last to start first."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        token = None
        while experiments:
            page = self.client.search_runs(
                experiments,
                condition,
                max_results=limit or 1000,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token or limit:
                return

    def finished(self, key: str) -> "Run | None":
        """Return the last finished run of the step with this key."""
        if not _KEY.fullmatch(key):
            raise RegistryError(f"`{key}` is no step key (64 hex digits)")
        return next(self.runs(f"tags.`posttrain.key` = '{key}' AND attributes.status = 'FINISHED'", limit=1), None)

    def of_run(self, run: "Run") -> Location:
        """Return where a run's files lie."""
        return self._checked(str(run.info.artifact_uri))

    def of_model(self, model_id: str, digest: str) -> Location:
        """Return where the files of a model artifact lie.

        MLflow's embedded store takes any path as a model's source, so the id, the digest and the place are checked.

        Raises:
            RegistryError: there is no such model, it is another artifact, or it lies outside the home.
        """
        with importing():
            from mlflow.exceptions import MlflowException

        if not _MODEL_ID.fullmatch(model_id):
            raise RegistryError(f"`{model_id}` is no MLflow model id")
        try:
            model = self.client.get_logged_model(model_id)
        except MlflowException as error:
            raise refusal(error)(f"MLflow no longer holds model {model_id} of artifact {digest[:12]}") from error
        if model.tags.get("posttrain.digest") != digest:
            raise RegistryError(f"MLflow's model {model_id} is not artifact {digest[:12]}")
        return self._checked(model.artifact_location)

    def _checked(self, uri: str) -> Location:
        location = location_at(uri, self.home.tracking_uri)
        if isinstance(location, LocalLocation) and not self.home.has_server:
            resolved = location.root.resolve()
            if not resolved.is_relative_to(self.home.mlruns.resolve()):
                raise Lost(f"MLflow names {location.root}, which lies outside {self.home.mlruns}")
        return location

    @contextmanager
    def as_global(self) -> Iterator[None]:
        """Make this tracking URI MLflow's global one for a while.

        `SqlAlchemyStore.create_model_version` looks its source up at the global URI, not at the client's.
        """
        with importing():
            import mlflow

        self.client  # noqa: B018 - opening it first keeps the environment silent
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.home.tracking_uri)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before


def _open(home: Home) -> "MlflowClient":
    uri = home.tracking_uri
    if home.has_server:
        _probe(uri)
    elif not re.match(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:", uri):
        raise RegistryError(
            f"MLFLOW_TRACKING_URI is `{uri}`; "
            "name a server (http://HOST:PORT) or a database (sqlite:////PATH/mlflow.db)"
        )
    home.root.mkdir(parents=True, exist_ok=True)

    # The client's making imports, too.
    with importing():
        from mlflow import MlflowClient

        # After the import, which sets them itself: the migrations of a new database are no news.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Two processes that both find no database must not both make its tables.
        with Index(home.index).lock("database"):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _probe(uri: str) -> None:
    """Ask the server for its health once: MLflow's own client would retry for minutes."""
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=10).raise_for_status()
    except requests.RequestException as error:
        raise RegistryError(
            f"the tracking server at {uri} does not answer ({type(error).__name__}); "
            "start it or unset MLFLOW_TRACKING_URI"
        ) from error
