"""A small layered layout for step graphs (after Sugiyama, Tagawa and Toda, 1981).

Each step stands in the column of its longest path from a root. A step whose children lie further right is continued
through the columns between by one thin slot per column, which all its edges share: a trunk with branches instead of
a bundle of lines across the boxes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Slot = tuple[str, int]
"""A step's name and a column: the column of its own box, or one that its trunk passes."""
Link = tuple[Slot, Slot]


@dataclass(frozen=True)
class Layout:
    """Where everything stands: centres from top to bottom in pixels, columns from left to right."""

    column: Mapping[str, int]
    """Column of each step's box."""
    centre: Mapping[Slot, float]
    """Vertical centre of each box and of each slot of a trunk."""
    links: Sequence[Link]
    """Connections between neighbouring columns."""
    columns: int
    height: float


def layered(parents: Mapping[str, Iterable[str]], box: float, gap: float) -> Layout:
    """Lay out a graph without cycles, given as each step's parents, for boxes `box` pixels high and `gap` apart."""
    column = _columns(parents)
    links = _links(parents, column)
    layers: list[list[Slot]] = [[] for _ in range(max(column.values(), default=-1) + 1)]
    for slot in dict.fromkeys([*column.items(), *(slot for link in links for slot in link)]):
        layers[slot[1]].append(slot)
    layers = _untangle(layers, links)
    # A trunk takes a quarter of a box.
    half = {slot: (box if column[slot[0]] == slot[1] else box / 4) / 2 for layer in layers for slot in layer}
    centre = _settle(layers, links, half, gap)
    top = min((centre[slot] - half[slot] for slot in centre), default=0.0)
    centre = {slot: at - top for slot, at in centre.items()}
    height = max((centre[slot] + half[slot] for slot in centre), default=0.0)
    return Layout(column, centre, links, len(layers), height)


def _columns(parents: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return each step's longest distance from a root; parents that are no steps of the graph do not count."""
    column: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in column:
            column[name] = max((depth(parent) + 1 for parent in parents[name] if parent in parents), default=0)
        return column[name]

    for name in parents:
        depth(name)
    return {name: column[name] for name in parents}


def _links(parents: Mapping[str, Iterable[str]], column: Mapping[str, int]) -> list[Link]:
    links: list[Link] = []
    for child, names in parents.items():
        for parent in (name for name in names if name in column):
            path = [(parent, index) for index in range(column[parent], column[child])]
            links += [*pairwise(path), (path[-1], (child, column[child]))]
    return list(dict.fromkeys(links))


def _untangle(layers: list[list[Slot]], links: Sequence[Link]) -> list[list[Slot]]:
    """Order each column by the mean place of its neighbours, sweeping to and fro; keep what crosses least."""
    best, fewest = layers, _crossings(layers, links)
    for sweep in range(12):
        forward = sweep % 2 == 0
        layers = [list(layer) for layer in layers]
        inner = range(1, len(layers)) if forward else range(len(layers) - 2, -1, -1)
        for index in inner:
            other = {slot: place for place, slot in enumerate(layers[index - 1 if forward else index + 1])}
            own = {slot: float(place) for place, slot in enumerate(layers[index])}
            wanted = {slot: _mean([other[near] for near in _near(slot, links, forward)], own[slot]) for slot in own}
            layers[index].sort(key=wanted.__getitem__)
        if (crossings := _crossings(layers, links)) < fewest:
            best, fewest = layers, crossings
    return best


def _crossings(layers: Sequence[Sequence[Slot]], links: Sequence[Link]) -> int:
    place = {slot: index for layer in layers for index, slot in enumerate(layer)}
    count = 0
    for index, (a, b) in enumerate(links):
        for c, d in links[:index]:
            count += a[1] == c[1] and (place[a] - place[c]) * (place[b] - place[d]) < 0
    return count


def _settle(
    layers: Sequence[Sequence[Slot]], links: Sequence[Link], half: Mapping[Slot, float], gap: float
) -> dict[Slot, float]:
    """Give every slot a centre near the mean of its neighbours' centres, keeping order and distances."""
    centre: dict[Slot, float] = {}
    for layer in layers:
        centre |= _spread(layer, dict.fromkeys(layer, 0.0), half, gap)
    for sweep in range(16):
        forward = sweep % 2 == 0
        for layer in layers if forward else reversed(layers):
            wanted = {
                slot: _mean([centre[near] for near in _near(slot, links, forward)], centre[slot]) for slot in layer
            }
            centre |= _spread(layer, wanted, half, gap)
    return centre


def _spread(
    layer: Sequence[Slot], wanted: Mapping[Slot, float], half: Mapping[Slot, float], gap: float
) -> dict[Slot, float]:
    """Return centres near the wanted ones that do not overlap: the mean of pushing all down and pushing all up.

    Both keep the distances, so their mean keeps them too.
    """
    down: dict[Slot, float] = {}
    up: dict[Slot, float] = {}
    for at, before in zip(layer, [None, *layer], strict=False):
        room = down[before] + half[before] + gap + half[at] if before else wanted[at]
        down[at] = max(wanted[at], room)
    backward = list(reversed(layer))
    for at, after in zip(backward, [None, *backward], strict=False):
        room = up[after] - half[after] - gap - half[at] if after else wanted[at]
        up[at] = min(wanted[at], room)
    return {slot: (down[slot] + up[slot]) / 2 for slot in layer}


def _near(slot: Slot, links: Sequence[Link], forward: bool) -> list[Slot]:
    return [a for a, b in links if b == slot] if forward else [b for a, b in links if a == slot]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
