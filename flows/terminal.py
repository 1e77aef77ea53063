"""What a run shows on the terminal: a live board of steps where there is a terminal, plain lines where not."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from flows.execution import StepState
from flows.plain_table import PlainTable

_COLOURS = {
    "cached": "blue",
    "finished": "green",
    "running": "yellow",
    "waiting": "dim",
    "failed": "red",
    "refused": "red",
    "skipped": "magenta",
}


class Board:
    """The state of every step of a run; updated from several threads."""

    def __init__(self, names: Sequence[str], kinds: Mapping[str, str], console: Console) -> None:
        self.console = console
        self.kinds = kinds
        self._status = dict.fromkeys(names, "waiting")
        self._detail = dict.fromkeys(names, "")
        self._began: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def started(self, name: str) -> None:
        """Mark a step as running."""
        with self._lock:
            self._status[name] = "running"
            self._began[name] = time.monotonic()
        if not self.console.is_terminal:
            self._say(f"{name}: started")

    def progress(self, name: str, shown: Mapping[str, Any]) -> None:
        """Show how far a step is."""
        total = float(shown.get("total") or 0)
        share = float(shown.get("done", 0)) / total if total else 0.0
        filled = int(share * 16)
        bar = "━" * filled + "╌" * (16 - filled)
        with self._lock:
            self._detail[name] = f"{bar} {shown.get('done', 0):g}/{total:g} {shown.get('what', '')}"

    def ended(self, state: StepState) -> None:
        """Mark a step as ended."""
        name = state.planned.name
        with self._lock:
            self._status[name] = state.outcome
            self._seconds[name] = state.seconds
            self._detail[name] = state.message or headline(state)
        if not self.console.is_terminal:
            self._say(f"{name}: {state.outcome} in {state.seconds:.1f} s {self._detail[name]}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, emoji=False)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw the board while the context lasts, where standard output is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, get_renderable=self.render, refresh_per_second=4):
            yield

    def render(self) -> RenderableType:
        """Draw the board."""
        table = PlainTable()
        for title in ("step", "uses", "status", "seconds", ""):
            table.add_column(title, justify="right" if title == "seconds" else "left", no_wrap=title != "")
        with self._lock:
            for name, status in self._status.items():
                running = time.monotonic() - self._began[name] if status == "running" else self._seconds.get(name)
                table.add_row(
                    Text(name, style="bold"),
                    self.kinds[name],
                    Text(status, style=_COLOURS.get(status, "")),
                    "" if running is None else f"{running:.1f}",
                    Text(self._detail[name], style="dim", overflow="ellipsis"),
                )
        return table


def headline(state: StepState) -> str:
    """Say a step's result in a few figures."""
    metrics = state.entry.metrics if state.entry else {}
    chosen = [name for name in metrics if name in _HEADLINES][:3]
    return "  ".join(f"{_HEADLINES[name]} {metrics[name]:.4g}" for name in chosen)


_HEADLINES = {
    "train_loss": "loss",
    "parity/mean_kl": "KL to base + adapter",
    "rows_train": "train rows",
    "rows_eval": "eval rows",
    "bits_per_weight": "bits/weight",
}
