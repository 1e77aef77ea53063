"""A model that is the same on every machine: untrained, with words from a text of its own.

A loss after training differs between processors, whose kernels round differently, by far more than rounding; the first
loss of such a model is the same to some 1e-6 everywhere, so it can be written down.
"""

from typing import Any

from steps.artifacts import Manifest, Model, digest_tree
from steps.lm.checkpoint import model_facts, save_model
from steps.lm.turn_end import stop_at_turn_end
from steps.model.pico import PicoModel, new_llama, train_tokenizer

TEXT = ["sort these digits upward, then say what you found", "the answer to each question is a row of digits"]


def untrained(bench: Any, seed: int) -> Model:
    """Publish a Llama of two layers and random weights."""
    import torch

    torch.manual_seed(seed)
    config = PicoModel(hidden=64, layers=2, vocabulary=300, context=64, seed=seed)
    tokenizer = train_tokenizer(TEXT, config.vocabulary, config.context)
    model: Any = new_llama(config, tokenizer)
    staging = bench.root / "made" / f"untrained-{seed}"
    staging.mkdir(parents=True)
    save_model(model.bfloat16(), tokenizer, staging)
    stop_at_turn_end(staging)
    tree = digest_tree(staging)
    manifest = Manifest(
        kind="Model",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test.untrained",
        output="",
        key=tree.sha256,
        config={},
        libraries={},
        facts=model_facts(staging, licence=None, origin="test").as_plain(),
    )
    published: Any = bench.store.publish(staging, manifest)
    return published
