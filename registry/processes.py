"""Which process began a run of MLflow's, told by a tag: whether it may still be at work on it."""

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Run

_FOREIGN_TIMEOUT = 24 * 3600
"""Seconds after which a run that another machine began and never ended counts as dead."""


def own_tags() -> dict[str, str]:
    """Return the tags of a run that this process begins."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown"
    return {"mlflow.user": user, "mlflow.source.name": "posttrain", "posttrain.process": process_name()}


def process_name(pid: int | None = None) -> str:
    """Name a process so that no later one has the same name: host, id, start time."""
    import psutil

    process = psutil.Process(pid)
    return f"{socket.gethostname()}/{process.pid}/{process.create_time():.2f}"


def is_alive(run: "Run") -> bool:
    """Whether the process that began a run may still be at work on it."""
    import psutil

    host, _, rest = run.data.tags.get("posttrain.process", "").rpartition("/")[0].rpartition("/")
    if host != socket.gethostname():
        return time.time() - run.info.start_time / 1000 < _FOREIGN_TIMEOUT
    try:
        return process_name(int(rest)) == run.data.tags["posttrain.process"]
    except (psutil.NoSuchProcess, ValueError):
        return False
