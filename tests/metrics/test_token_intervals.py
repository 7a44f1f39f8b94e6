"""Intervals of token metrics: drawn over sequences, honest where tokens of one sequence are alike."""

import math

import numpy as np
import pytest
from token_streams import filled, flat, sequences, simulated

from hf_ls.metrics import (
    bootstrap_interval,
    wilson_interval,
)


def coverage(datasets, n_sequences, gap, cluster, repetitions):
    """Return how often the intervals over sequences, and that of nll over tokens, hold the truth, and the mean width ratio."""
    truth = {"accuracy": 0.75 - gap, "nll": 1.0, "brier": 0.5, "perplexity": math.e, "signed_gap": gap, "ece": gap}
    hits, over_tokens, ratio = dict.fromkeys(truth, 0), 0, 0.0
    for seed in range(datasets):
        items, labels = simulated(n_sequences, gap, cluster, (gap > 0, seed))
        state = filled(items, labels, repetitions=repetitions, seed=seed)
        metrics = state.metrics()
        for name, value in truth.items():
            hits[name] += metrics[name]["low"] <= value <= metrics[name]["high"]
        low, high = bootstrap_interval("nll", flat(items), repetitions=200, seed=seed)
        over_tokens += low <= 1.0 <= high
        ratio += (metrics["nll"]["high"] - metrics["nll"]["low"]) / (high - low) / datasets
    return {name: count / datasets for name, count in hits.items()}, over_tokens / datasets, ratio


@pytest.mark.parametrize(
    ("datasets", "repetitions", "margin"), [(60, 200, 0.1), pytest.param(400, 1000, 0.04, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_intervals_over_sequences_cover_the_truth_where_tokens_of_one_are_alike_and_those_over_tokens_do_not(
    datasets, repetitions, margin, gap
):
    hits, over_tokens, ratio = coverage(datasets, 80, gap, 0.1, repetitions)
    for name, share in hits.items():
        assert 0.95 - margin <= share <= 1.0, (name, hits)
    assert over_tokens < 0.6 and ratio > 2.5


def test_without_correlation_the_interval_is_that_over_tokens():
    items, labels = simulated(3000, 0.1, 0.0, 0)
    metrics = filled(items, labels, repetitions=1000).metrics()
    stats = flat(items)
    for name in ("accuracy", "nll", "brier", "ece", "signed_gap"):
        low, high = bootstrap_interval(name, stats, repetitions=1000)
        width = high - low
        assert metrics[name]["low"] == pytest.approx(low, abs=0.2 * width), name
        assert metrics[name]["high"] == pytest.approx(high, abs=0.2 * width), name


def test_whole_sequences_off_in_turn_are_no_evidence_against_calibration_on_average():
    # The null of independent tokens is exceeded far more often than in 5 % of the cases, the one over sequences is not.
    beyond = excluded = 0
    for seed in range(100):
        metrics = filled(*simulated(60, 0.0, 0.1, (2, seed), length=60), repetitions=200, seed=seed).metrics()
        beyond += metrics["ece"]["value"] > metrics["ece"]["null_q95"]
        excluded += metrics["ece"]["low"] > 0
    assert excluded <= 12 < beyond


def test_perplexity_is_exp_of_nll_with_its_interval():
    metrics = filled(*sequences()).metrics()
    for end in ("value", "low", "high"):
        assert metrics["perplexity"][end] == pytest.approx(math.exp(metrics["nll"][end]), rel=1e-14)


@pytest.mark.parametrize("correct", [0.0, 1.0])
def test_an_accuracy_of_0_or_1_keeps_an_interval(correct):
    items = np.tile([0.9, correct, 0.1, 0.1], (12, 50, 1))
    accuracy = filled(items, np.zeros((12, 50), dtype=int)).metrics()["accuracy"]
    low, high = wilson_interval(12 * correct, 12)  # 12 sequences rather than 600 tokens
    assert accuracy == {"value": correct, "low": pytest.approx(low), "high": pytest.approx(high)}


def test_one_sequence_has_no_interval_and_two_have_one():
    items, labels = simulated(2, 0.1, 0.1, 0)
    assert not any("low" in numbers for numbers in filled(items[:1], labels[:1]).metrics().values())
    with_interval = [name for name, numbers in filled(items, labels).metrics().items() if "low" in numbers]
    assert with_interval == ["accuracy", "nll", "perplexity", "brier", "ece", "signed_gap"]


def test_seeds_give_other_replicates_and_the_same_values():
    one, same, other = (filled(*sequences(), seed=seed).metrics() for seed in (3, 3, 4))
    assert one == same
    assert one["nll"]["value"] == other["nll"]["value"] and one["nll"]["low"] != other["nll"]["low"]


# Refusals
