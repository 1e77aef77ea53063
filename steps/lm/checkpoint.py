"""Hugging Face checkpoints on disk: their facts, read without torch, and how they are loaded and saved."""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steps.artifacts import ModelFacts, digest_file
from steps.frame.errors import UserError
from steps.lm.chat import control_tokens
from steps.lm.whole import loaded_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Dtype = Literal["bfloat16", "float16", "float32"]

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def model_facts(directory: Path, *, origin: str | None = None, licence: str | None = None) -> ModelFacts:
    """Read the facts of a checkpoint from its headers and JSON files.

    Raises:
        UserError: a part is missing, or the weights are a pickle.
    """
    check_safetensors(directory)
    config = _read_json(directory / "config.json")
    text_config = text_settings(directory)
    tensors = dict(safetensors_headers(directory))
    counts: dict[str, int] = {}
    for header in tensors.values():
        counts[header["dtype"]] = counts.get(header["dtype"], 0) + _elements(header["shape"])
    commonest = max(counts, key=lambda dtype: counts[dtype])
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.exists():
        raise UserError(f"{directory}: no tokenizer.json; posttrain needs a fast tokenizer beside the weights")
    return ModelFacts(
        architecture=(config.get("architectures") or ["unknown"])[0],
        parameters=sum(counts.values()),
        dtype=_DTYPES.get(commonest, commonest.lower()),
        hidden_size=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        tied_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
        tokenizer_sha256=digest_file(tokenizer).sha256,
        template_sha256=template_sha256(directory),
        # One beyond the vocabulary is another model's: no answer ever ends in it.
        stop_token_ids=tuple(stop for stop in stop_token_ids(directory) if stop < text_config.vocab_size),
        licence=licence,
        origin=origin,
    )


def text_settings(directory: Path) -> Any:
    """Return the settings of a checkpoint's language model under the library's own names (GPT-2's `n_embd` is another).

    Raises:
        UserError: the architecture is not known here, or its settings are none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    # Settings are checked by each architecture in its own way.
    except Exception as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{directory}: transformers does not know what config.json describes ({told[:300]})") from error


def is_tied(directory: Path) -> bool:
    """Whether `config.json` says that a model's output layer is its embedding; what it leaves out counts as no."""
    config = _read_json(directory / "config.json")
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings")))


def positions_within(directory: Path, most: int) -> int:
    """Return how many tokens a model takes at once, at most `most`; learned positions (GPT-2) end where they end."""
    return min(most, getattr(text_settings(directory), "max_position_embeddings", None) or most)


def check_safetensors(directory: Path) -> None:
    """Refuse a checkpoint without safetensors: loading a pickle would run whatever code is in it.

    Raises:
        UserError: there are no safetensors files.
    """
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory}: the weights are a pickle ({pickles[0]}), which could run code when it is loaded; "
            "convert them to safetensors first"
        )
    raise UserError(f"{directory}: no *.safetensors file; a model is a Hugging Face checkpoint in safetensors")


def safetensors_headers(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and header (`dtype`, `shape`, `data_offsets`) of every tensor, without reading its data."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")


def chat_template(directory: Path) -> str | None:
    """Return the chat template's text, from `chat_template.jinja` or `tokenizer_config.json`.

    The latter may list several by name, for tools or for retrieval: the one named `default` is meant where no other is
    asked for.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return named_templates(directory).get("default")


def named_templates(directory: Path) -> dict[str, str]:
    """Return the chat templates of a tokenizer by name: of `tokenizer_config.json`, and those in files of their own."""
    config = directory / "tokenizer_config.json"
    found = _read_json(config).get("chat_template") if config.exists() else None
    listed = found if isinstance(found, list) else [{"name": "default", "template": found}]
    named = (each for each in listed if isinstance(each, dict))
    inside = {str(each.get("name")): text for each in named if isinstance(text := each.get("template"), str)}
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return inside | {file.stem: file.read_text(encoding="utf-8") for file in files}


def template_sha256(directory: Path) -> str | None:
    """Return the sha256 of the chat template's text; None where there is none."""
    import hashlib

    template = chat_template(directory)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def stop_token_ids(directory: Path) -> tuple[int, ...]:
    """Return the ids at which generation ends: `generation_config.json`, else `config.json`; sorted."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.exists() and (ids := _read_json(path).get("eos_token_id")) is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Load a checkpoint's tokenizer; never runs code from the checkpoint.

    Raises:
        UserError: its files are not a tokenizer's.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # The tokenizers library raises bare exceptions.
    except Exception as error:
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def give_padding(
    tokenizer: "PreTrainedTokenizerFast", stop_token_ids: Sequence[int], vocabulary: int, *, by_length: bool = True
) -> None:
    """Give a tokenizer a padding token, where it has none that the model has an embedding for.

    A special token that ends nothing serves everyone. Where there is none, whoever knows how long each row is pads with
    the end token. Who looks for the last token that is no padding, as classifiers and reward models do, would then look
    before the end of an answer, and not tell one that was cut off from a whole: they get an ordinary token instead, the
    last, which in most vocabularies is the rarest.

    Args:
        tokenizer: of the model; it must name its end token, or be padded otherwise than by length.
        stop_token_ids: where the model stops.
        vocabulary: rows of the model's embedding; a tokenizer may have tokens beyond (Gemma 3's of images).
        by_length: whether the lengths of the padded rows are known.
    """
    own: Any = tokenizer.pad_token_id
    if own is not None and own < vocabulary:
        return
    end: Any = tokenizer.eos_token_id
    ends = {*stop_token_ids, end}
    free = [token for token in sorted(control_tokens(tokenizer)) if token not in ends and token < vocabulary]
    if not free and by_length:
        free = [end]
    ordinary = (token for token in reversed(range(min(len(tokenizer), vocabulary))) if token not in ends)
    tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(free[0] if free else next(ordinary)))


def load_model(directory: Path, dtype: Dtype) -> "PreTrainedModel":
    """Load a causal language model in `dtype`; safetensors only, never runs code from the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    check_safetensors(directory)
    with loaded_whole():
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Save weights, config, generation config, tokenizer and chat template."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def name_tokens_as(model: "PreTrainedModel", directory: Path) -> None:
    """Let a model's settings name the beginning, end and padding tokens that a checkpoint's do, or none as these.

    Trainers set them to their own tokenizer's. A padding token that stays behind would be taken for no text from then
    on, and a stop that stays out is not known any more. Where the checkpoint names no end, what was learned as one is.
    """
    from transformers import AutoConfig, GenerationConfig

    before = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    pairs: list[tuple[Any, Any]] = [(model.config.get_text_config(), before.get_text_config())]
    if getattr(model, "generation_config", None) is not None:
        named = (directory / "generation_config.json").exists()
        own = GenerationConfig.from_pretrained(directory) if named else GenerationConfig.from_model_config(before)
        pairs.append((model.generation_config, own))
    for ours, theirs in pairs:
        for name in _TOKEN_IDS:
            if (token := getattr(theirs, name, None)) is not None or name != "eos_token_id":
                setattr(ours, name, token)


def _elements(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}; a model is a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
