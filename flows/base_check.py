"""Whether a step's settings fit the pretrained models that it takes, as far as these lie on this machine already."""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

from flows.graph import Graph, Node
from steps.artifacts import Dataset, Preferences, Samples
from steps.frame import Ref, UserError
from steps.frame.errors import did_you_mean
from steps.lm.chat import NO_TEMPLATE
from steps.lm.checkpoint import chat_template, is_tied, named_templates
from steps.sources import model_at_hand
from steps.sources.chat_templates import NAMES, PREFIX

_SOURCE = "model.source"
_ROWS = (Dataset, Preferences, Samples)
_METADATA = 64 * 2**20
"""Bytes of a GGUF file among which its metadata are."""


def misfit(graph: Graph, node: Node, cache: Path, root: Path) -> str:
    """Return in what a step and the models that it takes do not fit; nothing where they do, or none is here.

    Without this a missing chat template is only found out after the model was fetched and dequantised.
    """
    if why := _template_lacking(graph, node, cache, root):
        return why
    found = dict(_models(graph, node, cache, root))
    has_rows = any(issubclass(kind, _ROWS) for kind in node.given.values())
    for field in node.config.rendering(has_rows=has_rows):
        if field in found:
            source, path = found[field]
            if source.config.model_dump().get("template") is None and not _has_template(path):
                uri = source.config.model_dump()["uri"]
                return str(graph.loaded.error((*node.place, field), f"{uri}: {NO_TEMPLATE}"))
    try:
        node.config.check_tied([field for field, refs in node.edges.items() if _is_tied(graph, refs, found.get(field))])
    except ValueError as error:
        return str(graph.loaded.error(node.place, str(error)))
    return ""


def _template_lacking(graph: Graph, node: Node, cache: Path, root: Path) -> str:
    """Return why a source has no chat template of the name that it is given; nothing where that is not known."""
    settings = node.config.model_dump()
    name = str(settings.get("template") or "").removeprefix(PREFIX)
    if node.kind.name != _SOURCE or settings.get("template") != f"{PREFIX}{name}" or name in NAMES:
        return ""
    path = model_at_hand(settings["uri"], cache, root)
    try:
        own = [] if path is None or not path.is_dir() else [*named_templates(path)]
    except UserError:
        return ""
    if path is None or name in own:
        return ""
    return str(
        graph.loaded.error(node.place, f"template: no chat template `{name}`{did_you_mean(name, [*NAMES, *own])}")
    )


def _is_tied(graph: Graph, refs: Sequence[Ref], found: "tuple[Node, Path] | None") -> bool:
    """Whether it is known that an input gets a model whose embedding is its output layer, too."""
    if any(graph.nodes[ref.step].config.gives_tied for ref in refs):
        return True
    try:
        return found is not None and found[1].is_dir() and is_tied(found[1])
    except UserError:
        # A checkpoint that cannot be read is said by the step that brings it.
        return False


def _models(graph: Graph, node: Node, cache: Path, root: Path) -> Iterator[tuple[str, tuple[Node, Path]]]:
    """Yield the source and the place of each model that comes right from outside, by field."""
    for field, refs in node.edges.items():
        for ref in refs:
            source = graph.nodes[ref.step]
            if source.kind.name == _SOURCE:
                path = model_at_hand(source.config.model_dump()["uri"], cache, root)
                if path is not None:
                    yield field, (source, path)


def _has_template(path: Path) -> bool:
    """Whether a checkpoint, or a GGUF file, has a chat template; one that cannot be read counts as having one."""
    try:
        if path.is_dir():
            return chat_template(path) is not None
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"tokenizer.chat_template", 0, min(len(content), _METADATA)) >= 0
    except (UserError, OSError, ValueError):
        return True
