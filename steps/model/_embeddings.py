"""Rows of a checkpoint's embeddings: how many there are, and new ones that start as the mean of all."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from steps.lm.checkpoint import text_settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_UNTRAINED = 1e-3
"""A row shorter than this share of the usual length was never trained: Llama 3's base models have such ones
(https://github.com/unslothai/unsloth/issues/1066 and others)."""


def embedding_rows(directory: Path) -> int:
    """Return how many tokens a checkpoint has an embedding for, as its config says."""
    return int(text_settings(directory).vocab_size)


def mean_rows(directory: Path, tokens: Sequence[int], new: Sequence[int], size: int) -> set[int]:
    """Make rows that were never trained the mean of the others, in both embeddings; return their tokens.

    Weights are written anew, and only where a row changes.

    Args:
        directory: the checkpoint.
        tokens: control tokens, whose rows are looked at.
        new: those of them that are certainly untrained.
        size: rows that are needed; there may be more.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not tokens:
        return set()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    rows = embedding_rows(directory)
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    layers: list[nn.Module] = [model.get_input_embeddings()]
    output: Any = model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    untrained: set[int] = set(new)
    with torch.no_grad():
        for layer in layers:
            untrained |= _short(_weight(layer)[:rows], [token for token in tokens if token < rows])
        for layer in layers:
            _set_mean(layer, rows, untrained, size)
    if untrained or size > rows:
        _save_weights(model, directory)
    return untrained


def _weight(layer: "nn.Module") -> "torch.Tensor":
    weight: Any = layer.weight
    return weight.data


def _short(weight: "torch.Tensor", tokens: Sequence[int]) -> set[int]:
    lengths = weight.float().norm(dim=1)
    usual = lengths.median()
    return {token for token in tokens if lengths[token] < _UNTRAINED * usual}


def _set_mean(layer: "nn.Module", rows: int, untrained: set[int], size: int) -> None:
    """Set the untrained rows, and all new ones, of one embedding (and of its bias) to the mean of the old others."""
    import torch

    bias: Any = getattr(layer, "bias", None)
    for tensor in (_weight(layer), *([bias.data] if isinstance(bias, torch.Tensor) else [])):
        old = torch.ones(rows, dtype=torch.bool)
        old[[token for token in untrained if token < rows]] = False
        # In parts: a large vocabulary in double precision takes gigabytes.
        parts = [part.double().sum(dim=0) for part in tensor[:rows][old].split(4096)]
        mean = (torch.stack(parts).sum(dim=0) / old.sum()).to(tensor.dtype)
        wanted = sorted({*untrained, *range(rows, size)})
        tensor[wanted] = mean


def _save_weights(model: "PreTrainedModel", directory: Path) -> None:
    """Put the weights and the config of a model in the place of a checkpoint's; its other files stay."""
    with TemporaryDirectory(dir=directory.parent) as folder:
        model.save_pretrained(folder)
        for old in directory.glob("*.safetensors*"):
            old.unlink()
        for file in sorted(Path(folder).iterdir()):
            if file.name == "config.json" or ".safetensors" in file.name:
                (directory / file.name).unlink(missing_ok=True)
                shutil.move(file, directory / file.name)
