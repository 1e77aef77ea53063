"""Small clean SVG: escaped elements, scales with nice ticks, axes, lines and points.

Colours and type come from the page's style sheet through classes, so that one drawing serves light and dark.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
LETTER = 7.0
"""Mean width in pixels of a letter at the charts' size of 12 pixels; labels are laid out by it."""


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """Return an element. `class_` is `class`, `stroke_width` is `stroke-width`; text children are escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else _short(value))
        for key, value in attributes.items()
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


def drawing(width: float, height: float, label: str, *children: str, class_: str = "chart", style: str = "") -> Markup:
    """Return an `<svg>` of that size in pixels; `label` is what a screen reader says."""
    view = f"0 0 {_short(width)} {_short(height)}"
    attributes: dict[str, str | float] = {"viewBox": view, "width": width, "height": height} | (
        {"style": style} if style else {}
    )
    return tag("svg", *children, class_=class_, role="img", aria_label=label, **attributes)


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """Return text at its baseline; `anchor` is `start`, `middle` or `end`."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(start: Point, end: Point, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def polyline(points: Iterable[Point], class_: str) -> Markup:
    """Return a line through points."""
    return tag("polyline", points=" ".join(f"{_short(x)},{_short(y)}" for x, y in points), class_=class_)


def dot(at: Point, class_: str, title: str = "", radius: float = 5) -> Markup:
    """Return a filled circle; `title` shows when the pointer rests on it."""
    return tag("circle", *([tag("title", title)] if title else []), cx=at[0], cy=at[1], r=radius, class_=class_)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from data to pixels."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round values within the scale: powers of ten, or steps of 1, 2 or 5 times one."""
        if self.log:
            return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = _nice_step((self.high - self.low) / max(3, abs(self.end - self.start) / 60))
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def linear(values: Iterable[float], start: float, end: float, zero: bool = False) -> Scale:
    """Return a scale that holds the values with a little room; from zero where asked."""
    given = list(values)
    low, high = min(given), max(given)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(0.0 if zero and low >= 0 else low - room, high + room, start, end)


def logarithmic(values: Iterable[float], start: float, end: float, floor: float) -> Scale:
    """Return a scale of whole decades that holds the positive values, none below `floor`."""
    given = [max(value, floor) for value in values] or [floor]
    low = math.floor(math.log10(min(given)) + 1e-9)
    high = max(low + 1, math.ceil(math.log10(max(given)) - 1e-9))
    return Scale(10.0**low, 10.0**high, start, end, log=True)


def horizontal_axis(scale: Scale, y: float, label: str, write: Callable[[float], str], top: float) -> Markup:
    """Return ticks and labels below `y`, grid lines up to `top`, and the axis's name at its right end."""
    parts = [line((scale(tick), y), (scale(tick), top), "grid") for tick in scale.ticks()]
    parts += [text(scale(tick), y + 17, write(tick), "tick", "middle") for tick in scale.ticks()]
    parts += [text(scale.end, y + 34, label, "axis", "end")] if label else []
    return Markup("").join(parts)


def vertical_axis(scale: Scale, x: float, label: str, write: Callable[[float], str], right: float) -> Markup:
    """Return ticks and labels left of `x`, grid lines to `right`, and the axis's name above it."""
    parts = [line((x, scale(tick)), (right, scale(tick)), "grid") for tick in scale.ticks()]
    parts += [text(x - 8, scale(tick) + 4, write(tick), "tick", "end") for tick in scale.ticks()]
    parts.append(text(0, scale.end - 12, label, "axis"))
    return Markup("").join(parts)


def place_labels(points: Sequence[Point], labels: Sequence[str], width: float) -> list[tuple[float, float, str]]:
    """Return x, baseline and anchor for a label beside each point, overlapping as little as can be."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    placed: list[tuple[float, float, str]] = []
    for (x, y), label in zip(points, labels, strict=True):
        length = LETTER * len(label)
        choices = [
            (x + 10, y + 4, "start"),
            (x - 10, y + 4, "end"),
            (x + 8, y - 9, "start"),
            (x + 8, y + 17, "start"),
            (x - 8, y - 9, "end"),
            (x - 8, y + 17, "end"),
        ]
        boxes = [_box(choice, length) for choice in choices]
        costs = [sum(_overlap(box, other) for other in taken) + 9 * _outside(box, width) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        placed.append(choices[best])
    return placed


Box = tuple[float, float, float, float]


def _box(choice: tuple[float, float, str], length: float) -> Box:
    x, y, anchor = choice
    left = x if anchor == "start" else x - length
    return left, y - 10, left + length, y + 3


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down)


def _outside(box: Box, width: float) -> float:
    return max(0.0, -box[0]) + max(0.0, box[2] - width)


def _nice_step(rough: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten (Heckbert, Graphics Gems, 1990)."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next((nice for nice in (1, 2, 5) if rough <= nice * power * 1.0001), 10)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
