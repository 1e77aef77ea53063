"""Which native runtimes a step calls, and whether they work on this machine by the last verdict on them."""

from collections.abc import Callable, Iterable

from flows.graph import Graph, Node
from steps.frame import Like
from steps.runtime.gpus import gpus
from steps.runtime.proof import all_proofs
from steps.runtime.verdicts import is_broken, last_verdict, prove_and_keep

Say = Callable[[str], None]


def needed(graph: Graph, node: Node) -> list[str]:
    """Return the runtimes that a step calls: its kind's and its settings' own, and those that open its inputs."""
    names = list(node.config.runtimes)
    names += [name for name, proof in all_proofs().items() if proof.distribution in node.config.packages]
    if node.kind.opens:
        names += [name for parent in node.parents for name in _opening(graph, graph.nodes[parent])]
    if "torch" in node.kind.libraries:
        names.append("torch")
    if node.resources.gpus:
        names.append("CUDA")
    return list(dict.fromkeys(names))


def imported(node: Node) -> list[str]:
    """Return the runtimes that a step's packages import where they are there, though its settings may not call them.

    What is imported imports more: peft GPTQModel, and that llama.cpp.
    """
    there = {name.lower() for name in node.kind.libraries} | {name.partition(".")[0] for name in node.kind.preload}
    found: list[str] = []
    while True:
        more = [
            name
            for name, proof in all_proofs().items()
            if name not in found and {proof.distribution.lower(), *proof.imported_by} & there
        ]
        if not more:
            return [name for name in found if name != "CUDA" or gpus()]
        found += more
        there |= {all_proofs()[name].distribution.lower() for name in more}


def _opening(graph: Graph, node: Node) -> list[str]:
    """Return the runtimes that open what a step makes; what is only handed on is opened by what opened it before."""
    names = list(node.config.opened_by)
    for declared in node.kind.produces.values():
        if isinstance(declared, Like):
            parents = [graph.nodes[ref.step] for ref in node.edges.get(declared.field, ())]
            names += [name for parent in parents for name in _opening(graph, parent)]
    return names


def prove_unproven(runtimes: Iterable[str], say: Say) -> None:
    """Prove those of the runtimes that were never called on this machine, or were replaced since."""
    for name in dict.fromkeys(runtimes):
        if last_verdict(name) is None:
            say(f"proving {name} on this machine, once")
            prove_and_keep([name])


def fault(runtimes: Iterable[str]) -> str | None:
    """Return why the first runtime that does not work here does not, and what to do; None where all do."""
    for name in runtimes:
        verdict = last_verdict(name)
        if verdict and verdict.status == "broken":
            return (
                f"{name} does not work on this machine: {verdict.reason}; {verdict.advice}, and "
                f"`posttrain doctor {name}` proves it again"
            )
        if verdict and verdict.status == "absent":
            return f"{name} is needed: {verdict.reason}; {verdict.advice or 'see `posttrain doctor`'}"
    return None


def gpu_fault() -> str | None:
    """Return why steps that ask for no GPU compute on the processor though this machine has one; None where they do
    not."""
    if not gpus() or not is_broken("CUDA"):
        return None
    verdict = last_verdict("CUDA")
    return f"computed without the GPU, on which torch does not work{f': {verdict.reason}' if verdict else ''}"


def unproven(runtimes: Iterable[str]) -> list[str]:
    """Return those that were not called on this machine yet."""
    return [name for name in runtimes if last_verdict(name) is None]
