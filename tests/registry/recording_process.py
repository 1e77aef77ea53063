"""A process that records and publishes until it is killed: `python -m tests.registry.recording_process`.

MLflow is imported once; for each line on stdin (`COMMITS HOME`) it forks a child that records three steps, publishes
them, and is killed just before its database commit of that number. It prints how many commits the child came to.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import mlflow  # noqa: F401 - imported before the fork, so that a child starts at once
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry.family import publish
from registry.gates import GateDecision
from registry.home import Home
from registry.index import Entry
from registry.record import Execution, StepRecord
from steps.artifacts import Artifact
from tests.registry.workshop import BEGAN, Workshop

YES = GateDecision(promote=True, sentence="Promoted.")


def steps(workshop: Workshop, curve: Path) -> list[tuple[str, Artifact, StepRecord]]:
    """A model and two quantizations, with a curve long enough for several batches."""
    curve.write_text("".join(f'{{"step": {n}, "time": {n}, "values": {{"loss": {n}}}}}\n' for n in range(1500)))
    model = workshop.model(b"killed")
    made = {"merged": model, "q4": workshop.gguf(model, "Q4_K_M"), "q8": workshop.gguf(model, "Q8_0")}
    return [
        (name, each, workshop.step(name, each, metrics_file=curve, ended=BEGAN + timedelta(seconds=1)))
        for name, each in made.items()
    ]


def record(workshop: Workshop, execution: Execution) -> list[tuple[str, str, Entry]]:
    """Record all steps; return the members they make."""
    made = steps(workshop, workshop.home.root / "metrics.jsonl")
    return [(name, artifact.digest, execution.record(step)) for name, artifact, step in made]


def kill_before_commit(last: int) -> None:
    """Have this process killed, as by `kill -9`, when the database is about to commit for the `last`-th time."""
    left = iter(range(last - 1, -1, -1))

    def count(_connection: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "commit", count)


def work(home: Home) -> None:
    """Record three steps and publish them."""
    workshop = Workshop(home)
    workshop.recorder.warm_up()
    execution = workshop.begin()
    publish(execution, "pico", record(workshop, execution), YES)
    execution.finish()


def main() -> None:
    """Fork a child for each line read; print the signal that ended it, 0 for none."""
    for line in sys.stdin:
        last, _, home = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            kill_before_commit(int(last))
            work(Home.at(Path(home)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
