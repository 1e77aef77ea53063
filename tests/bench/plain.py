"""A plain script: the same libraries in the same order, imported once, no keys, digests, Prefect or MLflow.

Each step runs in a fork of the script, because the evaluation forks in turn and torch must not have computed by then.

`python -m tests.bench.plain RECIPE DIRECTORY` prints the seconds of each step as JSON.
"""

import importlib
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from flows.graph import Node, build_graph
from flows.prepare import recipe_path
from flows.recipe import load_recipe
from steps.artifacts import MANIFEST_NAME, Artifact, Draft, FileDigest, Manifest
from steps.frame import Job, Ref
from steps.frame.keys import plain_config
from steps.frame.runner import limit_threads
from steps.frame.spec import StepSpec


def main(recipe: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Run every step of a recipe in this process; return seconds by step."""
    graph = build_graph(load_recipe(recipe_path(recipe), overrides))
    for name in dict.fromkeys(name for node in graph.nodes.values() for name in node.kind.preload):
        importlib.import_module(name)
    made: dict[Ref, Artifact[Any]] = {}
    seconds = {}
    for node in graph.nodes.values():
        began = time.perf_counter()
        for name, draft in _forked(node, made, folder).items():
            made[Ref(node.name, name)] = _unpublished(node, name, draft)
        seconds[node.name] = time.perf_counter() - began
    return seconds


def _forked(node: Node, made: dict[Ref, Artifact[Any]], folder: Path) -> dict[str, Draft]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(_run(node, made, folder)))
    process.start()
    sender.close()
    drafts = receiver.recv()
    # Threads that a library leaves behind would keep the process; its work is done.
    process.kill()
    process.join()
    return drafts


def _run(node: Node, made: dict[Ref, Artifact[Any]], folder: Path) -> dict[str, Draft]:
    values: dict[str, Any] = plain_config(node.kind, node.config)
    for name, refs in node.edges.items():
        values[name] = [made[ref] for ref in refs] if node.kind.edges[name].many else made[refs[0]]
    work = folder / node.name
    work.mkdir(parents=True)
    spec = StepSpec(
        name=node.name,
        kind=node.kind.name,
        key="",
        config={},
        inputs={},
        work=work,
        store=folder / "artifacts",
        cache=folder / "cache",
        resources=node.resources,
    )
    job = Job(spec)
    limit_threads(job.cpus)
    returned = node.kind.run(node.kind.config.model_validate(values), job)
    return {"": returned} if isinstance(returned, Draft) else dict(returned)


def _unpublished(node: Node, output: str, draft: Draft) -> Artifact[Any]:
    """Hand a draft on as it lies, with a manifest that lists its files and digests nothing."""
    found = {
        path.relative_to(draft.path).as_posix(): path.stat().st_size for path in draft.path.rglob("*") if path.is_file()
    }
    manifest = Manifest(
        kind=draft.kind.kind,
        tree="",
        files={name: FileDigest(size=size, sha256="") for name, size in found.items()},
        parents={},
        step=node.kind.name,
        output=output,
        key=node.name,
        config={},
        libraries={},
        facts=draft.facts.as_plain(),
    )
    (draft.path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return draft.kind(draft.path, manifest)


if __name__ == "__main__":
    (Path(sys.argv[2]) / "cache").mkdir(parents=True, exist_ok=True)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
