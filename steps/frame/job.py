"""The job: what a step's function may ask of the world."""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from steps.frame.config import Resources
from steps.frame.errors import PartDone
from steps.frame.scale import threads
from steps.frame.spec import METRICS_NAME, PLOTS_NAME, PROGRESS_NAME, RESULT_NAME, InputSpec, StepSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Job:
    """Directories, logger, metrics, progress and resources of one running step."""

    def __init__(self, spec: StepSpec, rank: int = 0) -> None:
        self.name = spec.name
        self.key = spec.key
        self.resources: Resources = spec.resources
        self.cache = spec.cache
        """Downloads, shared by all steps; write into it atomically."""
        self.resolved: Mapping[str, InputSpec] = spec.resolved
        """Registry sources by URI, fetched before the step began."""
        self.log = logging.getLogger(f"posttrain.{spec.name}")
        self.rank = rank
        """Number of this process among those that share the step (`resources`); only the main one, 0, is heard."""
        self._work = spec.work
        self._last_progress = 0.0
        self._last_metrics: dict[str, float] = {}
        self._notes: dict[str, None] = {}
        self._metrics = (spec.work / METRICS_NAME if rank == 0 else Path(os.devnull)).open("a", encoding="utf-8")

    @property
    def scratch(self) -> Path:
        """A directory that survives a restart: checkpoints go here."""
        path = self._work / "scratch"
        path.mkdir(exist_ok=True)
        return path

    @property
    def cpus(self) -> int:
        """Cores granted to this process."""
        return threads(self.resources)

    @property
    def is_ended(self) -> bool:
        """Whether another process of this step has said how it ends: refused, or failed."""
        return (self._work / RESULT_NAME).exists()

    def output(self, name: str = "") -> Path:
        """Return a fresh directory for one output; its content is published when the step returns.

        Of several processes (`resources`) only the main one comes back from here: what all take part in, the training
        and the gathering of what they hold, must be done before.
        """
        if self.rank:
            raise PartDone
        path = self._work / "staging" / (name or "output")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics; `step` is the x axis of a curve. A later value at the same step replaces an earlier one."""
        values = {name: float(value) for name, value in metrics.items()}
        self._last_metrics.update(values)
        line = {"step": step, "time": time.time(), "values": values}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    @property
    def last_metrics(self) -> dict[str, float]:
        """Last value of every metric that was logged."""
        return dict(self._last_metrics)

    def note(self, sentence: str) -> None:
        """Say what a person must know of the result (rows left out, and why): on the terminal, in report and MLflow.

        It is said again whenever the result is taken from the cache; the same sentence counts once.

        Args:
            sentence: without full stop and without the step's name, which is put before it.
        """
        self._notes[sentence] = None
        self.log.warning("%s", sentence)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted, in order."""
        return tuple(self._notes)

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Keep a matplotlib figure as `NAME.png` and `NAME.svg` among the step's plots."""
        if self.rank:
            return
        folder = self._work / PLOTS_NAME
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=144)
        # The layout stands; to find it again takes as long as to draw.
        figure.set_layout_engine("none")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})

    def progress(self, done: float, total: float, what: str = "") -> None:
        """Say how far the step is; shown on the terminal and in Prefect. Written at most five times a second."""
        now = time.monotonic()
        if self.rank or (done < total and now - self._last_progress < 0.2):
            return
        self._last_progress = now
        path = self._work / PROGRESS_NAME
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"done": done, "total": total, "what": what}))
        partial.replace(path)
