"""Published variants of a model for tests: the same checkpoint with some of its files changed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps.artifacts import Manifest, Model, Store, digest_tree, link_or_copy
from steps.lm.checkpoint import model_facts

_numbers = itertools.count()


def variant(store: Store, model: Model, change: Callable[[Path], None], licence: str | None = None) -> Model:
    """Copy a checkpoint, let `change` work on the copy's directory, publish it."""
    staging = store.root / f".variant-{next(_numbers)}"
    for name in model.manifest.files:
        link_or_copy(model.path / name, staging / name)
    change(staging)
    tree = digest_tree(staging)
    facts = model_facts(staging, licence=licence, origin=model.facts.origin)
    manifest = Manifest(
        kind="Model",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test.variant",
        output="",
        key=tree.sha256,
        config={},
        libraries={},
        facts=facts.as_plain(),
    )
    published: Any = store.publish(staging, manifest)
    return published


def replace(path: Path, content: str) -> None:
    """Give a linked file new content; the bytes that it shares stay as they are."""
    path.unlink(missing_ok=True)
    path.write_text(content, encoding="utf-8")


def scale_noise(share: float) -> Callable[[Path], None]:
    """Return a change that adds Gaussian noise to every matrix, `share` of its own deviation."""

    def change(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        path = directory / "model.safetensors"
        generator = torch.Generator().manual_seed(0)
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * share
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return change
