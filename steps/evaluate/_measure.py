"""What is measured of one model, inside its own process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from steps.artifacts import Model, Quantized
from steps.evaluate._process import Report
from steps.evaluate._runtimes import Generation, Runtime, open_runtime
from steps.evaluate._samples import Sample
from steps.frame import UserError
from steps.lm.checkpoint import Dtype
from steps.lm.scoring import kl_divergence, log_softmax

# Positions whose log-probabilities are in memory at once: 12 MB for a vocabulary of 49,152.
_CHUNK = 64


@dataclass(frozen=True)
class Contender:
    """A model that takes part, under the name it has in the report."""

    name: str
    artifact: Model | Quantized

    @property
    def size_bytes(self) -> int:
        """Bytes of its weights files."""
        return sum(
            entry.size
            for path, entry in self.artifact.manifest.files.items()
            if path.endswith((".safetensors", ".gguf"))
        )


@dataclass(frozen=True)
class Plan:
    """What is asked of every contender alike."""

    samples: Sequence[Sample]
    vocabulary: int
    """Tokens over which distributions are compared; padding rows of a wider output layer are left out."""
    generate_rows: int
    new_tokens: int
    dtype: Dtype
    threads: int
    log_probabilities: Path
    """The reference's, float16, all scored positions of all samples in order: (positions, vocabulary)."""


@dataclass(frozen=True)
class Measured:
    """A contender's figures, one entry a sample."""

    nll: list[float]
    """Mean over the answer's tokens, in nats."""
    kl: list[float] | None
    """Mean KL(reference || contender) over the answer's tokens, in nats; None for the reference itself."""
    choices: list[NDArray[np.int32]]
    """Most probable token at each scored position."""
    generation: Generation
    """For the first `generate_rows` samples."""
    more_stops: tuple[int, ...] = ()
    """Tokens at which the runtime by itself would stop, too."""


def measure(contender: Contender, plan: Plan, *, is_reference: bool, report: Report) -> Measured:
    """Load the model, score every sample's answer, generate answers.

    The reference writes its log-probabilities to `plan.log_probabilities`; every other contender is compared with
    them.

    Raises:
        UserError: the model's own tokenizer gives other token ids, or its vocabulary is smaller.
        RuntimeError: its logits are not numbers.
    """
    context = max(max(sample.end for sample in plan.samples), _longest_prompt(plan) + plan.new_tokens)
    runtime = open_runtime(contender.artifact, dtype=plan.dtype, context=context, threads=plan.threads)
    _check_tokens(contender.name, runtime, plan)
    nll: list[float] = []
    kl: list[float] = []
    choices: list[NDArray[np.int32]] = []
    with plan.log_probabilities.open("wb" if is_reference else "rb") as stream:
        compare = _writer(stream) if is_reference else _reader(stream)
        for done, sample in enumerate(plan.samples):
            report(done / (len(plan.samples) + plan.generate_rows))
            found = _score(contender.name, runtime, sample, plan.vocabulary, compare)
            nll.append(float(found[0].mean()))
            kl.append(float(found[1].mean()))
            choices.append(found[2])
    prompts = [sample.prompt_ids for sample in plan.samples[: plan.generate_rows]]
    generation = runtime.generate(prompts, plan.new_tokens) if prompts else Generation([], None)
    report(1.0)
    return Measured(nll, None if is_reference else kl, choices, generation, runtime.more_stops)


Compare = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Takes log-probabilities (positions, vocabulary), returns the divergence at each position."""


def _writer(stream: BinaryIO) -> Compare:
    def write(found: NDArray[np.float32]) -> NDArray[np.float32]:
        stream.write(found.astype(np.float16).tobytes())
        return np.zeros(len(found), np.float32)

    return write


def _reader(stream: BinaryIO) -> Compare:
    def read(found: NDArray[np.float32]) -> NDArray[np.float32]:
        # Read, not mapped: mapped pages would count as this model's memory.
        expected = np.frombuffer(stream.read(found.size * 2), np.float16).reshape(found.shape)
        return kl_divergence(expected, found)

    return read


def _score(
    name: str, runtime: Runtime, sample: Sample, vocabulary: int, compare: Compare
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    """Return negative log-likelihood, divergence and most probable token at each position of the answer."""
    answer = np.asarray(sample.answer_ids)
    logits = runtime.logits(sample.ids[: sample.end - 1], sample.start - 1)
    nll, kl, choices = [], [], []
    for at in range(0, len(answer), _CHUNK):
        found = log_softmax(logits[at : at + _CHUNK, :vocabulary])
        wanted = answer[at : at + _CHUNK, None]
        nll.append(-np.take_along_axis(found, wanted, axis=1)[:, 0])
        kl.append(compare(found))
        choices.append(found.argmax(axis=1).astype(np.int32))
    if not np.isfinite(np.concatenate(nll)).all():
        raise RuntimeError(f"{name}: its logits on sample {sample.id} are not numbers; the weights are damaged")
    return np.concatenate(nll), np.concatenate(kl), np.concatenate(choices)


def _check_tokens(name: str, runtime: Runtime, plan: Plan) -> None:
    if runtime.vocabulary < plan.vocabulary:
        raise UserError(
            f"evaluate.compare: `{name}` knows {runtime.vocabulary} tokens, the reference {plan.vocabulary}; "
            "compare models of one tokenizer"
        )
    for sample in plan.samples:
        found, ours = runtime.tokenize(sample.text), sample.ids[sample.skipped :]
        if found != ours:
            at = next((i for i, pair in enumerate(zip(found, ours, strict=False)) if pair[0] != pair[1]), -1)
            where = f"from token {at} on" if at >= 0 else "in length"
            raise UserError(
                f"evaluate.compare: `{name}` tokenises sample {sample.id} otherwise than the reference ({where}); "
                "compare models of one tokenizer"
            )


def _longest_prompt(plan: Plan) -> int:
    return max((sample.start for sample in plan.samples[: plan.generate_rows]), default=0)
