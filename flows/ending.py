"""How an execution ended: for the terminal, for scripts, and for Prefect."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.execution import Execution, StepState
from registry.members import Release


@dataclass(frozen=True)
class Ending:
    """The outcome of every step, and of the publication."""

    recipe: str
    states: dict[str, StepState]
    seconds: float
    publication: str = ""
    """One sentence on family, release and gates; empty where nothing was published."""
    release: Release | None = None
    """What was published, with the decision of its gates."""
    report: Path | None = None
    table: list[dict[str, Any]] = field(default_factory=list)
    """A row a step, for people."""
    notes: tuple[str, ...] = ()
    """What must be known beside the figures of its reports, a sentence each."""
    picture: bytes | None = None
    """The comparison as a PNG."""
    links: dict[str, str] = field(default_factory=dict)
    """Pages on this run by their name, where a server shows them."""

    @classmethod
    def of(cls, execution: Execution, publication: str = "", release: Release | None = None, **more: Any) -> "Ending":
        """Sum up an execution."""
        seconds = (datetime.now(UTC) - execution.began).total_seconds()
        recipe = execution.plan.graph.loaded.name
        return cls(recipe, execution.states, seconds, publication, release, **more)

    @property
    def ok(self) -> bool:
        """Whether every step is finished or cached."""
        return all(state.outcome in ("finished", "cached") for state in self.states.values())

    @property
    def promoted(self) -> bool:
        """Whether what was published is the champion now."""
        return self.release is not None and "champion" in self.release.aliases

    @property
    def verdict(self) -> str:
        """Say it in a word or two."""
        if not self.ok:
            return "failed"
        return "finished" if self.release is None else "promoted" if self.promoted else "not promoted"

    @property
    def exit_code(self) -> int:
        """0 where all went well, 2 where input was refused, else 1."""
        outcomes = {state.outcome for state in self.states.values()}
        return 0 if self.ok else 2 if "refused" in outcomes and "failed" not in outcomes else 1

    @property
    def sentence(self) -> str:
        """Say it in a sentence or two."""
        counts = {}
        for state in self.states.values():
            counts[state.outcome] = counts.get(state.outcome, 0) + 1
        done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        wrong = [state for state in self.states.values() if state.outcome in ("failed", "refused")]
        why = "".join(f" `{state.planned.name}` {state.outcome}: {state.message}." for state in wrong)
        return f"{self.recipe}: {done}.{why} {self.publication}".strip()

    def summary(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "recipe": self.recipe,
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
            "publication": self.publication,
            "report": str(self.report) if self.report else None,
            "notes": list(self.notes),
            "steps": {name: _step(state) for name, state in self.states.items()},
        }


def _step(state: StepState) -> dict[str, Any]:
    entry = state.entry
    return {
        "outcome": state.outcome,
        "seconds": round(state.seconds, 2),
        "message": state.message,
        "key": state.planned.key,
        "outputs": dict(entry.outputs) if entry else {},
        "run_id": entry.run_id if entry else None,
    }
