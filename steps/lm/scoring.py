"""The numbers by which language models are compared: log-probabilities, divergence, answer scores, intervals.

Plain numpy, so that every runtime's logits go through the same arithmetic. Natural logarithms throughout.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Floats = NDArray[np.float32]

# A token that a runtime rules out has the log-probability -inf; this is as good as never and stays a number.
_NEVER = np.float32(-1e4)
_WORD = re.compile(r"[^\W_]+")


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities over the last axis, in float32 and never below -10,000."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.maximum(shifted, _NEVER, out=shifted)


def kl_divergence(reference: NDArray[np.float16], candidate: Floats) -> Floats:
    """Return KL(reference || candidate) in nats at each position.

    Rounding log-probabilities to float16 leaves them summing not quite to one; they are normalised again first, so
    that the result is the divergence of two true distributions: never negative, and wrong only by the square of
    float16's rounding error.

    Args:
        reference: log-probabilities, shape (positions, vocabulary).
        candidate: log-probabilities of the same shape.
    """
    expected = log_softmax(reference.astype(np.float32))
    return np.maximum((np.exp(expected) * (expected - candidate)).sum(axis=-1), 0)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the perplexity per token from each sample's mean negative log-likelihood and number of tokens."""
    return float(np.exp(np.average(nll, weights=tokens)))


def rouge_l(expected: str, answer: str) -> float:
    """Return ROUGE-L's F measure in 0..1 (Lin 2004, https://aclanthology.org/W04-1013/).

    Words are runs of letters and digits in any script; the package's own tokenizer knows only a-z and would score
    every answer in another alphabet as 0.
    """
    return float(_scorer().score(expected, answer)["rougeL"].fmeasure)


def exact_match(expected: str, answer: str) -> float:
    """Return 1.0 where the answers are the same text, white space at both ends aside; else 0.0."""
    return float(expected.strip() == answer.strip())


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share seen in `count` trials (Wilson 1927, https://doi.org/10.2307/2276774).

    Unlike a bootstrap's it has a width where all trials ended alike: of 8 right in 8 it says 68 % to 100 %.
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean of shares, one a task: Wilson's where each is 0 or 1, or all are the same."""
    if set(values) <= {0, 1} or len(set(values)) == 1:
        return wilson_interval(sum(values) / len(values), len(values))
    return bootstrap_interval(values)


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a weighted mean over samples (Efron 1979).

    Args:
        values: one value a sample, at least one.
        weights: one weight a sample; all equal when None.
        draws: resamples with replacement.
        seed: of the resampling, so that equal values give equal intervals.
    """
    sample = np.asarray(values, np.float64)
    weight = np.ones_like(sample) if weights is None else np.asarray(weights, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(sample), (draws, len(sample)))
    means = (sample[picks] * weight[picks]).sum(axis=1) / weight[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class _Words:
    """Tokenizer in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    words: Any = _Words()
    return RougeScorer(["rougeL"], tokenizer=words)
