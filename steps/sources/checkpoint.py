"""Which files of a model repository are the checkpoint: weights in safetensors, JSON, templates, the tokenizer."""

from collections.abc import Iterable
from pathlib import Path

from steps.frame.errors import UserError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT writes; beside a model transformers would put it on when it opens that."""
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps the templates of a model that are not its default, one file each."""
_TEXTS = (".json", ".jinja")
_TOKENIZERS = {"merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def checkpoint_files(names: Iterable[str], label: str) -> list[str]:
    """Choose the files to take, sorted: never code, never a pickle, and each weight once.

    Args:
        names: POSIX paths below the repository's root; only its top folder counts, and that of more chat templates.
        label: what error messages call the repository.

    Raises:
        UserError: there are no safetensors, or no `config.json`.
    """
    every = list(names)
    top = sorted(name for name in every if "/" not in name)
    if "config.json" not in top and ADAPTER_FILES[0] in top:
        raise UserError(
            f"{label}: this is an adapter ({ADAPTER_FILES[0]}), not a model; name the model that it was trained on, or "
            "a merge of both"
        )
    top = [name for name in top if name not in ADAPTER_FILES]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in top if name.endswith(_PICKLES)]
        if pickles:
            raise UserError(
                f"{label}: the weights are a pickle ({pickles[0]}), which could run code when it is loaded; "
                "give a checkpoint in safetensors"
            )
        raise UserError(f"{label}: no *.safetensors file; a model is a Hugging Face checkpoint or one .gguf file")
    if "config.json" not in top:
        raise UserError(f"{label}: no config.json beside the weights")
    # Some repositories hold the same weights again in their makers' own layout (`consolidated.safetensors`).
    weights = [name for name in weights if name.startswith("model")] or weights
    named = [name for name in every if name.startswith(f"{NAMED_TEMPLATES}/") and name.endswith(".jinja")]
    return sorted([*weights, *(name for name in top if name.endswith(_TEXTS) or name in _TOKENIZERS), *named])


def checkpoint_in(folder: Path) -> list[Path]:
    """Return the files of a directory that make a checkpoint, sorted.

    Raises:
        UserError: as `checkpoint_files`.
    """
    members = [*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*.jinja")]
    inside = (member.relative_to(folder).as_posix() for member in members if member.is_file())
    names = checkpoint_files(inside, str(folder))
    return [folder / name for name in names]
