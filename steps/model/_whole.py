"""Whether a checkpoint is whole: every weight there, of the config's shape, and a row of the embedding for each token.

transformers begins weights that are missing, or of another shape, with random numbers, and only a log line says so.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError
from steps.lm.checkpoint import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_INDEX = "model.safetensors.index.json"
_EXAMPLES = 3


def check_whole(directory: Path, shown: str, note: Callable[[str], None]) -> None:
    """Open a checkpoint without its weights' content, and compare it with its config, index and tokenizer.

    Args:
        directory: the checkpoint.
        shown: what error messages call it.
        note: told what is odd but does no harm.

    Raises:
        UserError: it is not whole, or of an architecture that is not known here.
    """
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"{shown}: no tokenizer.json; posttrain needs a fast tokenizer beside the weights")
    _check_index(directory, shown)
    rows = _check_weights(directory, shown, note)
    _check_tokenizer(load_tokenizer(directory), rows, shown, note)


def _check_index(directory: Path, shown: str) -> None:
    """Check that every file that the index names is there.

    Raises:
        UserError: naming what is missing, or that the index is none.
    """
    index = directory / _INDEX
    # Where all weights are in one file, that is what is read, whatever lies beside it.
    if not index.exists() or (directory / "model.safetensors").exists():
        return
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        files = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{shown}: {_INDEX} is no index of weights; fetch the checkpoint anew") from None
    if lost := [name for name in files if not (directory / name).is_file()]:
        raise UserError(
            f"{shown}: {_INDEX} names {len(files)} files of weights, and {_some(lost)} "
            f"{'is' if len(lost) == 1 else 'are'} missing; fetch the checkpoint anew"
        )


def _check_weights(directory: Path, shown: str, note: Callable[[str], None]) -> int:
    """Compare the weights with what the config asks for; return how many rows the embedding has.

    Raises:
        UserError: a file is damaged, or a weight missing or of another shape.
    """
    from transformers import AutoModelForCausalLM, logging

    before = logging.get_verbosity()
    # Its report of the same is many lines long.
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    # What the libraries raise at damaged files and unknown architectures is of many kinds.
    except Exception as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{shown}: transformers cannot open it ({told[:300]})") from error
    finally:
        logging.set_verbosity(before)
    model, told = loaded
    _judge(told, shown, note)
    return int(model.get_input_embeddings().weight.shape[0])


def _judge(told: Mapping[str, Iterable[Any]], shown: str, note: Callable[[str], None]) -> None:
    if lost := sorted(map(str, told["missing_keys"])):
        raise UserError(f"{shown}: {len(lost)} weights that its config asks for are missing: {_some(lost)}")
    other = sorted((str(name), tuple(found), tuple(wanted)) for name, found, wanted in told["mismatched_keys"])
    if other:
        name, found, wanted = other[0]
        raise UserError(
            f"{shown}: {len(other)} weights are of another shape than its config says: {name} is {_shape(found)}, "
            f"config.json asks for {_shape(wanted)}"
        )
    if unused := sorted(map(str, told["unexpected_keys"])):
        note(f"{len(unused)} tensors are no weights of this architecture, and left out: {_some(unused)}")


def _check_tokenizer(tokenizer: "PreTrainedTokenizerFast", rows: int, shown: str, note: Callable[[str], None]) -> None:
    """Compare the tokens with the embedding's rows; special ones beyond it are those that text cannot mean.

    Raises:
        UserError: ordinary text, or where it ends, has tokens without a row.
    """
    added = tokenizer.added_tokens_decoder
    beyond = {number: text for text, number in tokenizer.get_vocab().items() if number >= rows}
    ends: Any = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    needed = [number for number in sorted(beyond) if number in ends or not (number in added and added[number].special)]
    if needed:
        raise UserError(
            f"{shown}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows: {beyond[needed[0]]!r} "
            f"({needed[0]}) has none; the tokenizer is another model's, or the embedding was not resized with it"
        )
    if beyond:
        texts = [beyond[number] for number in sorted(beyond)]
        note(f"{len(texts)} special tokens have no row in the embedding, no text may spell them: {_some(texts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + (f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else "")


def _shape(sizes: Iterable[int]) -> str:
    return " × ".join(map(str, sizes)) or "a number"
