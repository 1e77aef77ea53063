"""The paired bootstrap: how far two means may lie apart, by the samples that both were measured on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
SEED = 17


def paired_bootstrap(
    values: "np.ndarray", weights: "np.ndarray", confidence: float, *, exponential: bool = False
) -> tuple[float, float, float, float]:
    """Bound the difference of two weighted means, resampling the samples of both together.

    Args:
        values: (samples, 2), candidate and champion.
        weights: (samples, 2).
        confidence: of each bound, one-sided.
        exponential: compare the exponentials of the means (perplexity from nll).

    Returns:
        The candidate's value, the champion's, and the lower and upper bound of their difference.
    """
    import numpy as np

    def means(counts: "np.ndarray") -> "np.ndarray":
        found = (counts @ (values * weights)) / (counts @ weights)
        return np.exp(found) if exponential else found

    # What no number can hold becomes infinite, which the caller looks for.
    with np.errstate(over="ignore", invalid="ignore"):
        random = np.random.default_rng(SEED)
        count = len(values)
        chunk = max(1, min(RESAMPLES, 1_000_000 // count))
        differences = []
        for start in range(0, RESAMPLES, chunk):
            size = min(chunk, RESAMPLES - start)
            # How often each sample is drawn says all there is to know of a resample: (size, samples).
            drawn = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
            ours, theirs = means(counts.astype(np.float64)).T
            differences.append(ours - theirs)
        ours, theirs = means(np.ones(count))
        low, high = np.quantile(np.concatenate(differences), [1 - confidence, confidence])
        return float(ours), float(theirs), float(low), float(high)
