"""What MLflow calls the data of a run: params, metrics and tags, in the form it accepts."""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_TAG = 8000
"""Characters of a tag's value (`mlflow.utils.validation.MAX_TAG_VAL_LENGTH`)."""


class Point(NamedTuple):
    """One value of a metric's curve; `time` in seconds since the epoch."""

    name: str
    step: int
    time: float
    value: float


def mlflow_name(name: str) -> str:
    """Map a name to what MLflow allows in keys: letters, digits and `_-. :/`.

    >>> mlflow_name("gguf[Q4_K_M]/perplexity")
    'gguf:Q4_K_M/perplexity'
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name.replace("[", ":").replace("]", ""))
    return posixpath.normpath(allowed.lstrip("/."))[:250]


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested config as `adapter.rank: 16` pairs; lists as JSON."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def read_points(path: Path | None) -> list[Point]:
    """Read a step's `metrics.jsonl`; a later value at the same step replaces an earlier one.

    A last line that a kill cut short is left out.
    """
    points: dict[tuple[str, int], Point] = {}
    if path is None or not path.is_file():
        return []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        step = line["step"] or 0
        for name, value in line["values"].items():
            points[name, step] = Point(name, step, line["time"], float(value))
    return list(points.values())


def last_values(points: list[Point]) -> dict[str, Point]:
    """Return each metric's point at its largest step."""
    last: dict[str, Point] = {}
    for point in points:
        if point.name not in last or point.step >= last[point.name].step:
            last[point.name] = point
    return last


def json_tag(value: Any) -> str:
    """Return a tag's value: canonical JSON, or the empty string where it is longer than MLflow keeps."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text if len(text) <= MAX_TAG else ""
