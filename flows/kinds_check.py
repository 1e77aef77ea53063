"""Whether what each step takes is of a kind that it can take, before anything runs."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flows.recipe import LoadedRecipe
from flows.rounds import written
from steps.artifacts import Artifact
from steps.frame import Like, Ref

if TYPE_CHECKING:
    from flows.graph import Node


def check_kinds(loaded: LoadedRecipe, node: "Node", nodes: Mapping[str, "Node"]) -> None:
    """Refuse an input of a kind that the step does not take, and inputs of several kinds where it gives what it takes.

    Raises:
        UserError: one sentence that names both ends, and the last step before this one that would fit.
    """
    for name, refs in node.edges.items():
        wanted = node.kind.edges[name].kinds
        for ref in refs:
            given = nodes[ref.step].outputs[ref.output]
            if not issubclass(given, wanted):
                names = " or ".join(kind.named() for kind in wanted)
                raise loaded.error(
                    (*node.place, name),
                    f"{node.kind.name} takes {names} here, `{ref}` ({nodes[ref.step].kind.name}) gives {given.named()}"
                    f"{_fitting(loaded, node, wanted, nodes)}",
                )
    for declared in node.kind.produces.values():
        if isinstance(declared, Like):
            _check_alike(loaded, node, declared.field, nodes)


def _check_alike(loaded: LoadedRecipe, node: "Node", name: str, nodes: Mapping[str, "Node"]) -> None:
    """Refuse inputs of several kinds where one of them is what the step gives."""
    first, *others = node.edges.get(name, ())
    for ref in others:
        found, wanted = nodes[ref.step].outputs[ref.output], node.given[name]
        if found is not wanted:
            raise loaded.error(
                (*node.place, name),
                f"`{first}` gives {wanted.named()}, `{ref}` {found.named()}; name steps of one kind",
            )


def _fitting(
    loaded: LoadedRecipe, node: "Node", wanted: tuple[type[Artifact[Any]], ...], nodes: Mapping[str, "Node"]
) -> str:
    """Name the last step before this one whose output would fit."""
    fits = [
        str(Ref(written(loaded, each, node.group), output))
        for each in itertools.takewhile(lambda other: other.name != node.name, nodes.values())
        for output, kind in each.outputs.items()
        if issubclass(kind, wanted)
    ]
    return f"; `{fits[-1]}` would fit" if fits else ""
