"""Rows of a checkpoint's embeddings: how many there are, and new ones that start as the mean of all."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from steps.lm.checkpoint import safetensors_headers, text_settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_SHORT = 1e-3
"""A row shorter than this share of the usual length was never trained: Llama 3's base models have such ones
(https://github.com/unslothai/unsloth/issues/1066 and others)."""
_ALIKE, _OTHERS = 0.9, 3
"""Cosine from which two rows are alike, and rows alike (itself among them) beyond which one was never trained. In
Gemma 3 270M and SmolLM2 words have at most one such other, unused tokens dozens or thousands."""


def embedding_rows(directory: Path) -> int:
    """Return how many tokens a checkpoint has an embedding for, as its config says."""
    return int(text_settings(directory).vocab_size)


def untrained(directory: Path, tokens: Sequence[int]) -> set[int]:
    """Return those of some tokens whose row of the embedding was never trained.

    It is nearly nothing, or nearly the same as that of several others: Gemma 3's base models have had no turn in their
    pretraining, and `<start_of_turn>`, `<end_of_turn>` and `<unused86>` are one to them. What is alike the model cannot
    tell apart, nor say one and not the other, whatever else of it is trained.

    Args:
        directory: the checkpoint.
        tokens: their ids; those without a row are passed over.
    """
    import torch

    weight = _embedding(directory)
    wanted = [token for token in tokens if weight is not None and token < len(weight)]
    if weight is None or not wanted:
        return set()
    unit = torch.nn.functional.normalize(weight[wanted].float(), dim=1)
    # In parts: a large vocabulary in single precision takes gigabytes.
    alike = torch.zeros(len(wanted), dtype=torch.long)
    for part in weight.split(16384):
        alike += (unit @ torch.nn.functional.normalize(part.float(), dim=1).T > _ALIKE).sum(dim=1)
    # Each is like itself.
    same = {token for token, count in zip(wanted, alike.tolist(), strict=True) if count > _OTHERS}
    return same | _short(weight, wanted)


def short_rows(directory: Path, tokens: Sequence[int]) -> set[int]:
    """Return those of some tokens whose row of the embedding is nearly nothing."""
    weight = _embedding(directory)
    return set() if weight is None else _short(weight, [token for token in tokens if token < len(weight)])


def _embedding(directory: Path) -> "torch.Tensor | None":
    """Return the input embedding as it is stored; None where no one tensor is it."""
    from safetensors import safe_open

    settings = text_settings(directory)
    shape = [settings.vocab_size, settings.hidden_size]
    names = [name for name, header in safetensors_headers(directory) if header["shape"] == shape]
    # An output layer of its own has the same shape.
    names = [name for name in names if "head" not in name and "out" not in name]
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            if len(names) == 1 and names[0] in stream.keys():  # noqa: SIM118 - it is no mapping
                return stream.get_tensor(names[0])
    return None


def mean_rows(directory: Path, new: Sequence[int], size: int) -> None:
    """Make rows the mean of all others, in both embeddings; the weights are written anew.

    Args:
        directory: the checkpoint.
        new: tokens whose rows mean nothing yet.
        size: rows that are needed; there may be more.
    """
    import torch
    from transformers import AutoModelForCausalLM

    rows = embedding_rows(directory)
    if not new and size <= rows:
        return
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    layers: list[nn.Module] = [model.get_input_embeddings()]
    output: Any = model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    with torch.no_grad():
        for layer in layers:
            _set_mean(layer, rows, {*new}, size)
    _save_weights(model, directory)


def _weight(layer: "nn.Module") -> "torch.Tensor":
    weight: Any = layer.weight
    return weight.data


def _short(weight: "torch.Tensor", tokens: Sequence[int]) -> set[int]:
    lengths = weight.float().norm(dim=1)
    usual = lengths.median()
    return {token for token in tokens if lengths[token] < _SHORT * usual}


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
