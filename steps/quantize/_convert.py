"""A Hugging Face checkpoint to an unquantized GGUF, by llama.cpp's own converter in a process of its own.

The converter comes with the source of llama-cpp-python, with a `gguf` package that differs from the published one; so
it runs with that package first on its path, as `python -m steps.quantize._convert REQUEST.json`, and leaves
`request.tensors`: which tensor of the checkpoint became which tensor of the file, by the converter's own account.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from steps.frame.errors import UserError
from steps.frame.pinned import check_unedited
from steps.quantize._pre_tokenizer import pre_tokenizer_name
from steps.runtime.death import how_it_ended

_UNKNOWN_PRE_TOKENIZER = 3
_UNKNOWN_ARCHITECTURE = 4


class Request(BaseModel):
    """What the process is to convert."""

    model_config = ConfigDict(frozen=True)

    converter: Path
    """Directory of llama.cpp's converter."""
    model: Path
    """The checkpoint. The last part of this path becomes the model's name in the file."""
    out: Path
    tensors: Path
    """Where the JSON object from checkpoint names to GGUF names is written."""
    file_type: str
    """Member of `gguf.LlamaFileType`."""
    pre_tokenizer: str | None
    """llama.cpp's pre-tokenizer, whatever the converter makes of the tokenizer."""
    likely_pre_tokenizer: str | None
    """The same, for a tokenizer that the converter does not know."""


def converter_directory() -> Path:
    """Return where set-up puts llama.cpp's converter.

    Raises:
        UserError: it is not there.
    """
    path = Path(sys.prefix) / "share" / "posttrain" / "llama.cpp"
    if not (path / "convert_hf_to_gguf.py").exists():
        raise UserError(f"{path}: llama.cpp's converter is not there; run make setup")
    return path


def convert(
    model: Path, work: Path, *, name: str, dtype: str, pre_tokenizer: str | None
) -> tuple[Path, dict[str, str]]:
    """Convert a checkpoint in its own precision; return the file and the GGUF name of each of its tensors.

    Args:
        model: the checkpoint's directory.
        work: an empty directory for the file.
        name: `general.name` in the file. The converter takes it from the directory, which is a digest here.
        dtype: the checkpoint's, e.g. `bfloat16`.
        pre_tokenizer: llama.cpp's name, to overrule what is recognised.

    Raises:
        UserError: llama.cpp knows neither the architecture nor the pre-tokenizer, the converter is not installed, or
            this code was edited while the step ran.
    """
    directory = converter_directory()
    (work / name).symlink_to(model.resolve(), target_is_directory=True)
    request = Request(
        converter=directory,
        model=work / name,
        out=work / "converted.gguf",
        tensors=work / "tensors.json",
        file_type={"float16": "MOSTLY_F16", "float32": "ALL_F32"}.get(dtype, "MOSTLY_BF16"),
        pre_tokenizer=pre_tokenizer,
        likely_pre_tokenizer=pre_tokenizer_name(model),
    )
    spec = work / "request.json"
    spec.write_text(request.model_dump_json())
    path = os.pathsep.join([str(directory / "gguf-py"), str(directory), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"}
    check_unedited("steps.quantize")
    done = subprocess.run([sys.executable, "-m", __name__, str(spec)], env=environment, stdin=subprocess.DEVNULL)
    if done.returncode == _UNKNOWN_PRE_TOKENIZER:
        raise UserError(
            f"{model / 'tokenizer.json'}: llama.cpp has no pre-tokenizer that is known to match this one; name the one "
            "that does in `pre_tokenizer:` (say `llama-bpe`), the tokens are compared afterwards"
        )
    if done.returncode == _UNKNOWN_ARCHITECTURE:
        raise UserError(f"{model / 'config.json'}: llama.cpp's converter does not know this architecture")
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter {how_it_ended(done.returncode)}; its traceback is in the step's log")
    return request.out, json.loads(request.tensors.read_text())


def main() -> None:
    """Convert as the request says; the exit code tells what the converter does not know."""
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    conversion, base, gguf = (importlib.import_module(name) for name in ("conversion", "conversion.base", "gguf"))
    torch = importlib.import_module("torch")
    _supply_pre_tokenizer(base.TextModel, request)
    tensors = _record_names(base.ModelBase)
    hparams = base.ModelBase.load_hparams(request.model, False)
    try:
        architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        model_class = conversion.get_model_class(architecture)
    except NotImplementedError:
        sys.exit(_UNKNOWN_ARCHITECTURE)
    with torch.inference_mode():
        conversion_of = model_class(request.model, gguf.LlamaFileType[request.file_type], request.out)
        if "n_positions" in conversion_of.hparams:
            # GPT-2's own old name, which transformers no longer writes.
            conversion_of.hparams.setdefault("n_ctx", conversion_of.hparams["n_positions"])
        conversion_of.write()
    request.tensors.write_text(json.dumps(tensors, sort_keys=True))


def _supply_pre_tokenizer(text_model: Any, request: Request) -> None:
    """Let the recipe's name overrule the converter, and the recognised one serve where it would give up."""
    known = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        if request.pre_tokenizer:
            return request.pre_tokenizer
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if request.likely_pre_tokenizer is None:
                sys.exit(_UNKNOWN_PRE_TOKENIZER)
            return request.likely_pre_tokenizer

    text_model.get_vocab_base_pre = get_vocab_base_pre


def _record_names(model_base: Any) -> dict[str, str]:
    """Have the converter write down each renaming it makes."""
    names: dict[str, str] = {}
    rename = model_base.map_tensor_name

    def map_tensor_name(self: Any, name: str, *args: Any, **kwargs: Any) -> str:
        names[name] = rename(self, name, *args, **kwargs)
        return names[name]

    model_base.map_tensor_name = map_tensor_name
    return names


if __name__ == "__main__":
    main()
