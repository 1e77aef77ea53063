"""MLflow's import: its modules need each other in circles, and two threads that begin it at once end in half of one."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from registry.home import silence_telemetry

_LOCK = threading.RLock()


@contextmanager
def importing() -> Iterator[None]:
    """Hold off all other threads that import from MLflow. Every import from it in the registry stands within this.

    The first takes 1.5 s. MLflow reads the environment then, and later, where somebody else has imported it.
    """
    with _LOCK:
        silence_telemetry()
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        yield
