"""`quantize.gguf`: a checkpoint as one GGUF file for llama.cpp, template and stop tokens kept and proven."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steps.artifacts import Dataset, Documents, Draft, Model, Quantized, QuantizedFacts
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.frame.errors import ProofFailed
from steps.lm.checkpoint import chat_template, load_model, load_tokenizer, positions_within
from steps.lm.turn_end import turn_end
from steps.quantize._calibration import calibration_ids, calibration_texts
from steps.quantize._convert import convert, converter_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from steps.lm.llama_cpp import GgufModel

Scheme = Literal[
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
    "Q4_0", "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
]  # fmt: skip
_UNWEIGHTED = ("F16", "BF16", "Q8_0")
"""Schemes whose rounding no importance matrix changes."""
_NEEDS_WEIGHTS = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")
"""Schemes that llama.cpp refuses to make without an importance matrix."""

_SENTENCES = (
    "Hello, world!\n\nIt's 10:45 on 2024-02-29, and I'd say they've paid $1,234.56 for 007.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # πr²\n\n\tif x == 1000000:\n\t\tpass\n",
    "Größe, façade, naïve; Ελληνικά, русский, العربية, हिन्दी, 日本語, 한국어. 🙂👩\u200d🔬 end  of   text ",
)
_PROVEN_TOKENS = 128
"""Of each text on which the converted file is compared with its checkpoint."""
_MOST_DIVERGENCE = 0.05
"""Nats a token; a checkpoint in bfloat16 and its file in llama.cpp lie some 0.001 apart, two models 0.1 and more."""


class QuantizeGguf(StepConfig):
    """Convert a model to one GGUF file for llama.cpp, weighing its rounding by the run's own rows."""

    model: Input[Model]
    calibration: Input[Dataset | Documents] | None = None
    """Conversations for the importance matrix; without them every weight counts the same."""
    scheme: Scheme = "Q4_K_M"
    calibration_rows: int = Field(default=64, ge=1)
    """Most rows of the calibration data to use, evenly spread over it."""
    calibration_tokens: int = Field(default=512, ge=16)
    """Most tokens of each row."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for the tokenizer's pre-tokenizer, where it is not recognised (`gpt-2`, `llama-bpe`, ...)."""
    name: str = Field(default="model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the model in the file, and of the file: `NAME-SCHEME.gguf`."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """llama.cpp quantizes, and proves what it wrote."""
        return ("llama.cpp",)

    @property
    def opened_by(self) -> tuple[str, ...]:
        """llama.cpp."""
        return ("llama.cpp",)

    @property
    def scheme_made(self) -> tuple[Literal["gguf"], str]:
        """llama.cpp's name of it."""
        return "gguf", self.scheme


@step(
    "quantize.gguf",
    produces=Quantized,
    reference="https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
    libraries=("llama-cpp-python", "torch", "transformers"),
    preload=("torch", "transformers.models.llama"),
    resources=Resources(cpus=0),
)
def quantize_gguf(config: QuantizeGguf, job: Job) -> Draft:
    """Convert, measure importance, quantize, then open the written file and prove that it is the same model."""
    from steps.lm.device import granted_device
    from steps.lm.llama_cpp import GgufModel
    from steps.quantize._gguf_file import MOST_STOPS, quantize_file
    from steps.quantize._importance import importance_matrix

    _check(config)
    model = config.model
    tokenizer = load_tokenizer(model.path)
    texts = calibration_texts(config.calibration, tokenizer, config.calibration_rows) if config.calibration else []
    work = job.scratch / "gguf"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with _timed(job, "convert"):
        dtype = model.facts.dtype
        converted, names = convert(model.path, work, name=config.name, dtype=dtype, pre_tokenizer=config.pre_tokenizer)
    importance = {}
    if texts and config.scheme not in _UNWEIGHTED:
        with _timed(job, "importance"):
            rows = calibration_ids(texts, tokenizer, positions_within(model.path, config.calibration_tokens))
            source: Any = load_model(model.path, "bfloat16")
            source.to(granted_device(job.resources))
            importance = importance_matrix(
                source, rows, names, lambda done, total: job.progress(done, total, "rows of the importance matrix")
            )
            del source
    with GgufModel(converted, context=_PROVEN_TOKENS, threads=job.cpus) as plain:
        unmarked = unknown_stops(plain, model, tokenizer)
        with _timed(job, "compare"):
            check_same_model(plain, model, tokenizer, [*_SENTENCES, *texts[:4]], granted_device(job.resources))
    out = job.output()
    target = out / f"{config.name}-{config.scheme}.gguf"
    with _timed(job, "quantize"):
        outcome = quantize_file(
            converted,
            target,
            config.scheme,
            importance=importance,
            stop_token_ids=unmarked[:MOST_STOPS],
            threads=job.cpus,
        )
    shutil.rmtree(work)
    left_out = tuple(unmarked[MOST_STOPS:])
    if left_out:
        words = ", ".join(tokenizer.convert_ids_to_tokens(list(left_out)))
        job.note(f"llama.cpp by itself will not stop at {words}: a GGUF has no room for so many stop tokens")
    if outcome.fallbacks:
        job.note(
            f"{outcome.fallbacks} tensors are stored in another type than {config.scheme}'s own: their rows do not "
            "divide into its blocks of 256"
        )
    if importance and outcome.unweighed:
        job.note(f"no importance was measured for {', '.join(outcome.unweighed)}")
    with _timed(job, "verify"):
        bits = verify_gguf(target, model, tokenizer, [*_SENTENCES, *texts[:16]], job.cpus, left_out)
    job.log_metrics({"size_bytes": target.stat().st_size, "bits_per_weight": bits, "fallbacks": outcome.fallbacks})
    form, scheme = config.scheme_made
    facts = QuantizedFacts(
        format=form,
        scheme=scheme,
        bits_per_weight=bits,
        template_sha256=model.facts.template_sha256,
        stop_token_ids=model.facts.stop_token_ids,
        architecture=model.facts.architecture,
        parameters=model.facts.parameters,
        fallbacks=outcome.fallbacks,
        unmarked_stop_token_ids=left_out,
    )
    return Quantized.draft(out, facts)


def unknown_stops(converted: "GgufModel", model: Model, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the stop tokens that llama.cpp does not find by itself, those that end a turn or any text first."""
    first = (turn_end(tokenizer, model.facts.stop_token_ids), tokenizer.eos_token_id)
    unknown = set(model.facts.stop_token_ids) - converted.stop_token_ids
    return sorted(unknown, key=lambda token: (token not in first, token))


def check_same_model(
    converted: "GgufModel", model: Model, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], device: str
) -> None:
    """Prove that the converted file, from which all schemes are quantized, is the checkpoint: by what both predict.

    Raises:
        ProofFailed: their distributions diverge by more than two runtimes' rounding does.
    """
    import numpy as np
    import torch

    from steps.lm.chat import token_ids
    from steps.lm.scoring import kl_divergence, log_softmax

    dtype = "float32" if model.facts.dtype == "float32" else "bfloat16"
    net: Any = load_model(model.path, dtype).to(device).eval()  # pyright: ignore[reportArgumentType]
    most = positions_within(model.path, _PROVEN_TOKENS)
    found = []
    for text in texts:
        ids = token_ids(tokenizer, text)[:most]
        with torch.inference_mode():
            ours = net(input_ids=torch.tensor([ids], device=net.device), use_cache=False).logits[0].float()
        theirs = converted.logits(ids)
        width = min(ours.shape[1], theirs.shape[1])
        expected = log_softmax(ours[:, :width].cpu().numpy()).astype(np.float16)
        found.append(kl_divergence(expected, log_softmax(theirs[:, :width])))
    divergence = float(np.concatenate(found).mean())
    if not divergence <= _MOST_DIVERGENCE:
        raise ProofFailed(
            f"the converted file is not the model: its predictions diverge by {divergence:.3g} nats a token, where "
            f"{_MOST_DIVERGENCE} are the most that two runtimes' rounding explains"
        )


def verify_gguf(
    path: Path,
    model: Model,
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str],
    threads: int,
    left_out: Sequence[int] = (),
) -> float:
    """Prove what a GGUF must have kept of its checkpoint; return its bits per weight.

    Args:
        path: the file.
        model: the checkpoint.
        tokenizer: the checkpoint's.
        texts: what both must tokenise alike.
        threads: cores to use.
        left_out: stop tokens for which the file has no room.

    Raises:
        ProofFailed: the chat template differs, a stop token would not stop, a text becomes other tokens, or the
            logits are not finite.
    """
    import numpy as np

    from steps.lm.chat import token_ids
    from steps.lm.llama_cpp import GgufModel

    most = positions_within(model.path, 512)
    with GgufModel(path, context=most, threads=threads) as gguf:
        if gguf.template != chat_template(model.path):
            raise ProofFailed(f"{path.name}: the chat template is not the checkpoint's")
        if missing := sorted(set(model.facts.stop_token_ids) - gguf.stop_token_ids - {*left_out}):
            words = ", ".join(tokenizer.convert_ids_to_tokens(missing))
            raise ProofFailed(f"{path.name}: llama.cpp would not stop at {words}, where the checkpoint does")
        for text in texts:
            ours, theirs = token_ids(tokenizer, text), gguf.tokenize(text)
            if ours != theirs:
                raise ProofFailed(f"{path.name}: {_difference(tokenizer, ours, theirs)}; set `pre_tokenizer:`")
        for text in texts[:4]:
            if not np.isfinite(gguf.logits(gguf.tokenize(text)[:most])).all():
                raise ProofFailed(f"{path.name}: the logits are not finite; is the scheme too coarse for this model?")
        return gguf.bits_per_weight


def _difference(tokenizer: "PreTrainedTokenizerFast", ours: list[int], theirs: list[int]) -> str:
    """Say where two tokenisations part."""
    pairs = zip(ours, theirs, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    left, right = (tokenizer.convert_ids_to_tokens(ids[max(0, at - 1) : at + 3]) for ids in (ours, theirs))
    return f"the checkpoint's tokenizer gives {left} where llama.cpp gives {right}"


def _check(config: QuantizeGguf) -> None:
    """Refuse at once what would fail after minutes."""
    converter_directory()
    if config.scheme in _NEEDS_WEIGHTS and config.calibration is None:
        raise UserError(f"scheme: {config.scheme} needs an importance matrix; give `calibration:` a data step's output")


@contextmanager
def _timed(job: Job, part: str) -> Iterator[None]:
    """Say which part runs, and log how long it took."""
    parts = ("convert", "importance", "compare", "quantize", "verify")
    job.progress(parts.index(part), len(parts), part)
    began = time.perf_counter()
    yield
    job.log_metrics({f"seconds_{part}": time.perf_counter() - began})
