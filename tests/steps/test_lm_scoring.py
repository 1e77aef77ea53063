"""The arithmetic of comparison, against values worked out by hand or by definition."""

import math

import numpy as np
import pytest

from steps.lm.scoring import bootstrap_interval, exact_match, kl_divergence, log_softmax, perplexity, rouge_l


def test_log_softmax_sums_to_one_and_survives_tokens_that_are_ruled_out() -> None:
    logits = np.array([[1000.0, 1000.0, -np.inf], [0.0, 1.0, 2.0]], np.float32)
    found = log_softmax(logits)
    assert np.isfinite(found).all()
    assert np.exp(found).sum(axis=1) == pytest.approx([1, 1])
    assert found[0, 0] == pytest.approx(math.log(0.5))


def test_kl_of_known_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)).astype(np.float16)
    candidate = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    found = kl_divergence(reference, candidate)
    assert found[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-3)
    assert found[1] == pytest.approx(0, abs=1e-6)


def test_kl_to_itself_is_zero_to_the_square_of_float16() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, 5000)).astype(np.float32)
    exact = log_softmax(logits)
    found = kl_divergence(exact.astype(np.float16), exact)
    assert (found >= 0).all()
    assert found.max() < 2e-5


def test_perplexity_weighs_samples_by_their_tokens() -> None:
    assert perplexity([math.log(2), math.log(8)], [3, 1]) == pytest.approx(2 ** (6 / 4))


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat the mat": 4 of 6 expected words, 4 of 5 given.
    assert rouge_l("the cat sat on the mat", "the cat lay, the mat!") == pytest.approx(
        2 * (4 / 6) * (4 / 5) / (22 / 15)
    )
    assert rouge_l("кошка сидит дома", "кошка дома") == pytest.approx(0.8)
    assert rouge_l("some words", "") == 0


def test_exact_match_ignores_only_white_space_at_the_ends() -> None:
    assert exact_match("42", " 42\n") == 1
    assert exact_match("42", "42.") == 0


def test_bootstrap_covers_the_mean_narrows_with_more_samples_and_repeats() -> None:
    values = np.random.default_rng(1).normal(3, 1, 400).tolist()
    low, high = bootstrap_interval(values)
    few_low, few_high = bootstrap_interval(values[:25])
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.2)
    assert few_high - few_low > 2 * (high - low)
    assert bootstrap_interval(values) == (low, high)
