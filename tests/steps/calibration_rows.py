"""A published data set of conversations for tests that calibrate, made from the interpreter's own docstrings."""

import inspect
import statistics
import textwrap
from typing import Any

from steps.artifacts import Dataset, DatasetFacts, Manifest, Store, digest_tree
from steps.lm.rows import write_jsonl


def conversations() -> list[dict[str, Any]]:
    """Questions about functions of two modules, answered by their docstrings."""
    rows = []
    for module in (statistics, textwrap):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if answer := inspect.getdoc(function):
                question = f"What does {module.__name__}.{name} do?"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"id": f"{module.__name__}.{name}", "messages": messages, "source": module.__name__})
    return rows


def publish_conversations(store: Store) -> Dataset:
    """Publish them as a step `data.prepare` would."""
    staging = store.root / ".calibration-rows"
    staging.mkdir(parents=True)
    count = write_jsonl(staging / "rows.jsonl", conversations())
    tree = digest_tree(staging)
    manifest = Manifest(
        kind="Dataset",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="data.prepare",
        output="train",
        key="0" * 64,
        config={},
        libraries={},
        facts=DatasetFacts(rows=count, format="messages").model_dump(mode="json"),
    )
    published = store.publish(staging, manifest)
    assert isinstance(published, Dataset)
    return published
