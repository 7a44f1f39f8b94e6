"""hf_ls.metrics.core against independent implementations, by properties, and on bin edges."""

import itertools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from hf_ls.metrics import (
    PredictionStatistics,
    aurc,
    brier,
    e_aurc,
    ece,
    ece_classwise,
    ece_equal_mass,
    full_ece,
    mce,
    nll,
    reliability_bins,
    rmsce_debiased,
    signed_gap,
    smooth_ece,
)
from hf_ls.metrics.core import direction

TOP_LABEL = [ece, ece_equal_mass, mce, rmsce_debiased, signed_gap, aurc, e_aurc]


def predictions(n, num_classes, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, num_classes)) * scale, rng.integers(0, num_classes, n)


def gaps_by_mask(confidence, correct, n_bins):
    """(n_b, |Σ confidence − Σ correct|) of every bin (a, b], with exact sums and correctly rounded edges."""
    edges = [float(Fraction(k, n_bins)) for k in range(n_bins + 1)]
    for k in range(n_bins):
        inside = (confidence > edges[k]) & (confidence <= edges[k + 1])
        if k == 0:
            inside |= confidence == 0.0
        yield int(inside.sum()), abs(math.fsum(confidence[inside]) - int(correct[inside].sum()))


def edge_confidences(n, num_classes, rng, n_bins=15):
    """Confidences from just above 1/K to 1, two thirds of them on a bin edge or one float beside it."""
    lowest = 1 / num_classes + 1e-9  # at 1/K itself the other classes may round to more
    values = rng.uniform(lowest, 1, n)
    edges = np.arange(n_bins + 1) / n_bins
    near = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -1), [1.0]])
    near = near[(near >= lowest) & (near <= 1)]
    chosen = rng.random(n) < 2 / 3
    values[chosen] = rng.choice(near, chosen.sum())
    return values


@pytest.mark.parametrize("num_classes", [2, 3, 150])
def test_ece_of_a_million_rows_agrees_to_1e_9_with_masks_and_exact_sums(num_classes):
    rng = np.random.default_rng(num_classes)
    confidence = edge_confidences(1_000_000, num_classes, rng)
    labels = (rng.random(confidence.size) > confidence * 0.9).astype(int)  # class 0 is right where this is 0
    parts = []
    for rows in np.array_split(np.arange(confidence.size), 20):  # 1e6 × 150 at once would be 1.2 GB
        matrix = np.repeat(((1 - confidence[rows]) / (num_classes - 1))[:, None], num_classes, axis=1)
        matrix[:, 0] = confidence[rows]
        parts.append(PredictionStatistics.from_probabilities(matrix, labels[rows]))
    values = np.concatenate([part.confidence for part in parts])
    correct = np.concatenate([part.correct for part in parts])
    np.testing.assert_array_equal(values, confidence)
    np.testing.assert_array_equal(correct, labels == 0)
    expected = sum(gap for _, gap in gaps_by_mask(confidence, labels == 0, 15)) / confidence.size
    assert ece(values, correct) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.01  # the comparison is not of two zeros


@pytest.mark.parametrize("n_bins", [1, 2, 5, 7, 10, 15, 20, 100])
def test_a_confidence_on_an_edge_closes_the_bin_below(n_bins):
    for k in range(1, n_bins + 1):
        edge = k / n_bins
        assert reliability_bins([edge], [True], n_bins).count[k - 1] == 1
        if k < n_bins:
            assert reliability_bins([np.nextafter(edge, 1)], [True], n_bins).count[k] == 1
    assert reliability_bins([0.0], [True], n_bins).count[0] == 1


def test_reliability_bins_hold_means_and_nan_where_empty():
    bins = reliability_bins([0.3, 0.35, 0.9], [True, False, True], n_bins=4)
    np.testing.assert_array_equal(bins.count, [0, 2, 0, 1])
    np.testing.assert_allclose(bins.confidence, [np.nan, 0.325, np.nan, 0.9])
    np.testing.assert_allclose(bins.accuracy, [np.nan, 0.5, np.nan, 1.0])
    assert bins.count.dtype == np.int64


def test_ece_and_mce_of_a_case_worked_by_hand():
    confidence, correct = [0.3, 0.35, 0.9, 0.7], [True, False, True, False]
    # bins of width 1/4: {.3, .35} gap |.65 − 1| = .35; {.7} gap .7; {.9} gap .1
    assert ece(confidence, correct, 4) == pytest.approx((0.35 + 0.7 + 0.1) / 4)
    assert mce(confidence, correct, 4) == pytest.approx(0.7)
    assert signed_gap(confidence, correct) == pytest.approx(2.25 / 4 - 0.5)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_ece_and_mce_equal_torchmetrics(num_classes):
    logits, labels = predictions(5000, num_classes)
    stats = PredictionStatistics.from_logits(logits, labels)
    for norm, metric, tolerance in [("l1", ece, 1e-6), ("max", mce, 5e-6)]:  # they sum in float32
        theirs = multiclass_calibration_error(
            torch.tensor(logits).softmax(-1), torch.tensor(labels), num_classes, n_bins=15, norm=norm
        )
        assert metric(stats.confidence, stats.correct) == pytest.approx(theirs.item(), abs=tolerance)


def test_brier_equals_scikit_learn_which_halves_it_for_two_classes():
    for num_classes, factor in [(2, 2.0), (3, 1.0), (7, 1.0)]:
        logits, labels = predictions(400, num_classes)
        p = softmax(logits, axis=1)
        theirs = brier_score_loss(labels, p if num_classes > 2 else p[:, 1], labels=list(range(num_classes)))
        assert brier(p, labels) == pytest.approx(factor * theirs, rel=1e-12)
        assert PredictionStatistics.from_logits(logits, labels).brier.mean() == pytest.approx(brier(p, labels), rel=1e-12)


def test_nll_equals_scikit_learn_log_loss():
    logits, labels = predictions(400, 5)
    p = softmax(logits, axis=1)
    assert nll(logits, labels) == pytest.approx(log_loss(labels, p, labels=range(5)), rel=1e-12)
    assert PredictionStatistics.from_probabilities(p, labels).nll.mean() == pytest.approx(nll(logits, labels), rel=1e-12)


def test_nll_is_never_clipped():
    assert nll([[0.0, 5000.0]], [0]) == 5000.0
    assert PredictionStatistics.from_probabilities([[0.0, 1.0]], [0]).nll[0] == np.inf
    tiny = nll([[40.0, 0.0]], [0])
    assert tiny == pytest.approx(math.log1p(math.exp(-40)), abs=1e-15)


def test_masked_classes_count_for_nothing_but_may_not_be_the_label():
    masked = np.array([[1.0, -np.inf, 0.5], [0.2, 0.1, -np.inf]])
    ours = PredictionStatistics.from_logits(masked, [0, 1])
    bare = [PredictionStatistics.from_logits([[1.0, 0.5]], [0]), PredictionStatistics.from_logits([[0.2, 0.1]], [1])]
    for field in ("confidence", "correct", "nll", "brier"):
        np.testing.assert_allclose(getattr(ours, field), [getattr(row, field)[0] for row in bare], rtol=1e-14)
    with pytest.raises(ValueError, match="must not be masked"):
        PredictionStatistics.from_logits(masked, [1, 1])


def test_statistics_do_not_depend_on_the_precision_of_storage_or_on_chunks(monkeypatch):
    logits, labels = predictions(300, 7)
    half = logits.astype(np.float16)
    whole = PredictionStatistics.from_logits(half, labels)
    widened = PredictionStatistics.from_logits(half.astype(np.float64), labels)
    monkeypatch.setattr("hf_ls.metrics.core._CHUNK_ELEMENTS", 50)
    chunked = PredictionStatistics.from_logits(half, labels)
    z = half.astype(np.float64)
    for stats in (whole, widened, chunked):
        np.testing.assert_allclose(stats.nll, logsumexp(z, axis=1) - z[np.arange(300), labels], rtol=1e-12)
        np.testing.assert_allclose(stats.confidence, softmax(z, axis=1).max(1), rtol=1e-12)
        np.testing.assert_array_equal(stats.correct, z.argmax(1) == labels)
        assert {stats.confidence.dtype, stats.nll.dtype, stats.brier.dtype} == {np.dtype(np.float64)}
    assert len(whole) == 300


def test_float32_probabilities_one_rounding_above_1_stay_within_range():
    p = np.array([[1.0000001, 0.0]], dtype=np.float32)
    stats = PredictionStatistics.from_probabilities(p, [0])
    assert stats.confidence[0] == 1.0 and stats.nll[0] == 0.0
    assert ece(stats.confidence, stats.correct) == 0.0


def test_equal_mass_bins_without_ties_are_those_of_sorting_and_splitting():
    rng = np.random.default_rng(3)
    confidence = rng.permutation(np.linspace(0.2, 0.99, 15 * 40))
    correct = rng.random(confidence.size) < 0.6
    order = np.argsort(confidence)
    expected = sum(abs((confidence[part] - correct[part]).sum()) for part in np.split(order, 15)) / confidence.size
    assert ece_equal_mass(confidence, correct) == pytest.approx(expected, abs=1e-14)


def test_equal_mass_never_splits_equal_confidences():
    # Splitting these ties as an unstable sort would gives |.5 − 1| and |.5 − 0| in two bins, hence 0.5.
    confidence, correct = np.full(100, 0.5), np.arange(100) < 50
    assert ece_equal_mass(confidence, correct, 2) == 0.0
    assert ece_equal_mass(confidence, correct[::-1], 15) == 0.0


@pytest.mark.parametrize("metric", TOP_LABEL)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0.2, 1 / 3, 0.4, 0.6, 11 / 15, 0.9, 1.0]), st.booleans()), min_size=1),
    seed=st.integers(0, 1000),
)
def test_no_metric_depends_on_the_order_of_the_rows(metric, rows, seed):
    confidence, correct = np.array([c for c, _ in rows]), np.array([hit for _, hit in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    assert metric(confidence[order], correct[order]) == pytest.approx(metric(confidence, correct), abs=1e-12)


def test_rmsce_debiased_equals_the_published_formula_bin_by_bin():
    rng = np.random.default_rng(0)
    confidence = np.sort(rng.uniform(0.3, 1, 300))
    correct = rng.random(300) < confidence - 0.15
    total = 0.0
    for part in np.split(np.arange(300), 15):
        accuracy = correct[part].mean()
        variance = accuracy * (1 - accuracy) / (len(part) - 1)
        total += len(part) / 300 * ((confidence[part].mean() - accuracy) ** 2 - variance)
    assert total > 0
    assert rmsce_debiased(confidence, correct) == pytest.approx(math.sqrt(total), rel=1e-12)


def test_rmsce_debiased_removes_the_bias_of_a_calibrated_model():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.4, 1, (200, 500))
    correct = rng.random(confidence.shape) < confidence
    zeros = sum(rmsce_debiased(c, hit) == 0.0 for c, hit in zip(confidence, correct, strict=True))
    assert 60 < zeros < 160  # an unbiased estimate of 0 is negative, so clipped, about half of the time
    assert min(ece(c, hit) for c, hit in zip(confidence, correct, strict=True)) > 0.005


def test_bins_of_one_example_add_nothing_to_rmsce_debiased():
    assert rmsce_debiased([0.9, 0.8], [False, False], 15) == 0.0


def test_ece_classwise_equals_a_loop_and_counts_classes_absent_from_the_labels():
    logits, labels = predictions(500, 6)
    labels = labels % 4  # classes 4 and 5 never occur
    p = softmax(logits, axis=1)
    p[:50] = np.eye(6)[labels[:50]] * 0.4 + 0.1  # 0.5 and 0.1: the latter is an edge of 10 bins
    for n_bins in (10, 15):
        expected = np.mean([sum(g for _, g in gaps_by_mask(p[:, k], labels == k, n_bins)) / len(p) for k in range(6)])
        assert ece_classwise(p, labels, n_bins) == pytest.approx(expected, abs=1e-13)
    assert ece_classwise([[0.5, 0.2, 0.3]], [0]) == pytest.approx((0.5 + 0.2 + 0.3) / 3)


def test_full_ece_equals_a_loop_over_the_bins_of_all_probabilities():
    logits, labels = predictions(500, 6)
    p = softmax(logits, axis=1)
    p[:50] = np.eye(6)[labels[:50]] * 0.4 + 0.1
    for n_bins in (10, 15):
        expected = sum(gap for _, gap in gaps_by_mask(p.ravel(), np.eye(6)[labels].ravel(), n_bins)) / len(p)
        assert full_ece(p, labels, n_bins) == pytest.approx(expected, abs=1e-12)
        assert full_ece(p, labels, n_bins) <= 6 * ece_classwise(p, labels, n_bins) + 1e-12
    assert full_ece([[0.5, 0.2, 0.3]], [0]) == pytest.approx(1.0)  # 0.3 and 0.2 lie in other bins
    assert full_ece(np.eye(3), [1, 2, 0]) == pytest.approx(2.0)


def test_ece_classwise_is_the_same_in_chunks(monkeypatch):
    logits, labels = predictions(333, 4)
    p = softmax(logits, axis=1)
    whole = ece_classwise(p, labels)
    monkeypatch.setattr("hf_ls.metrics.core._CHUNK_ELEMENTS", 64)
    assert ece_classwise(p, labels) == pytest.approx(whole, abs=1e-14)


def test_aurc_is_the_mean_over_all_orders_of_ties():
    confidence = np.array([0.9, 0.7, 0.7, 0.7, 0.4, 0.4])
    correct = np.array([True, False, True, False, False, True])
    areas = []
    for order in itertools.permutations(range(6)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum(~correct[list(order)])
            areas.append(np.mean(wrong / np.arange(1, 7)))
    assert len(areas) == 12
    assert aurc(confidence, correct) == pytest.approx(np.mean(areas), rel=1e-13)


def test_e_aurc_is_zero_for_the_best_ranking_and_largest_for_the_worst():
    correct = np.arange(40) >= 10
    best, worst = np.linspace(0.3, 0.9, 40), np.linspace(0.9, 0.3, 40)
    assert e_aurc(best, correct) == pytest.approx(0.0, abs=1e-15)
    assert aurc(best, correct) > 0
    assert e_aurc(worst, correct) == pytest.approx(aurc(worst, correct) - aurc(best, correct))


def test_smooth_ece_of_one_confidence_is_its_gap():
    assert smooth_ece(np.full(1000, 0.8), np.arange(1000) < 500) == pytest.approx(0.3, abs=5e-3)


def test_smooth_ece_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "relplot", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_ls\[scripts\]'"):
        smooth_ece([0.5], [True])


WRONG_CONFIDENCE = [
    ([], [], ValueError, "at least one"),
    ([0.5, 0.6], [True], ValueError, "one shape"),
    ([[0.5]], [[True]], ValueError, "one shape"),
    ([1.5], [True], ValueError, "from 0 to 1"),
    ([-0.1], [True], ValueError, "from 0 to 1"),
    ([float("nan")], [True], ValueError, "from 0 to 1"),
    ([0.5], [2], ValueError, "True and False"),
    ([0.5], [float("nan")], ValueError, "True and False"),
    (["0.5"], [True], TypeError, "float confidence"),
]


@pytest.mark.parametrize("metric", [*TOP_LABEL, smooth_ece, reliability_bins])
@pytest.mark.parametrize(("confidence", "correct", "error", "message"), WRONG_CONFIDENCE)
def test_wrong_confidences_are_refused(metric, confidence, correct, error, message):
    with pytest.raises(error, match=message):
        metric(confidence, correct)


@pytest.mark.parametrize("n_bins", [0, -1, 2.0, "15", True])
def test_a_wrong_number_of_bins_is_refused(n_bins):
    for metric in (ece, mce, ece_equal_mass, rmsce_debiased):
        with pytest.raises((TypeError, ValueError), match="n_bins"):
            metric([0.5], [True], n_bins)
    with pytest.raises((TypeError, ValueError), match="n_bins"):
        ece_classwise([[0.5, 0.5]], [0], n_bins)


GOOD = [[0.5, 0.5], [0.1, 0.9]]
WRONG_PREDICTIONS = [
    ([[2.0, -1.0], [0.3, 0.7]], [0, 1], ValueError, "look like logits"),
    ([[0.9, 0.9], [0.3, 0.7]], [0, 1], ValueError, r"sum to 1 within 0.001.*row 0"),
    ([[0.5, 0.498], [0.3, 0.7]], [0, 1], ValueError, "sum to 1 within"),
    ([[float("nan"), 1.0], [0.3, 0.7]], [0, 1], ValueError, "NaN"),
    ([[0.5, 0.5], [1.0]], [0, 1], ValueError, "ragged"),
    ([[None, 1.0], [0.3, 0.7]], [0, 1], TypeError, "numeric"),
    ([["a", "b"], ["c", "d"]], [0, 1], TypeError, "numeric"),
    ([0, 1], [0, 1], ValueError, r"shape \[n, K\]"),
    ([[1.0], [1.0]], [0, 0], ValueError, "at least 2 classes"),
    ([], [], ValueError, "at least one"),
    (GOOD, [0, -100], ValueError, "ignore_index"),
    (GOOD, [0, -1], ValueError, r"\[0, 2\), got -1"),
    (GOOD, [0, 2], ValueError, r"\[0, 2\), got 2"),
    (GOOD, [0.0, 1.0], TypeError, "integer labels"),
    (GOOD, ["0", "1"], TypeError, "integer labels"),
    (GOOD, [False, True], TypeError, "integer labels"),
    (GOOD, [[0, 1], [1, 0]], ValueError, "one hard class"),
    (GOOD, [0], ValueError, "one label per prediction"),
    (GOOD, [], ValueError, "at least one"),
]


@pytest.mark.parametrize(("probabilities", "labels", "error", "message"), WRONG_PREDICTIONS)
def test_wrong_predictions_and_labels_are_refused_by_name(probabilities, labels, error, message):
    for metric in (PredictionStatistics.from_probabilities, brier, ece_classwise):
        with pytest.raises(error, match=message):
            metric(probabilities, labels)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[np.nan, 0.0]], "NaN"),
        ([[np.inf, 0.0]], "overflow"),
        ([[-np.inf, -np.inf]], "not all"),
        ([], "at least one"),
        ([1.0, 2.0], "shape"),
    ],
)
def test_wrong_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        PredictionStatistics.from_logits(logits, [0])


@pytest.mark.parametrize(
    ("names", "way"),
    [
        (
            ["eval_nll", "eval_test_ece", "phoneme_error_rate", "eval_phoneme_error_rate", "wer", "perplexity", "smooth_ece"],
            "lower",
        ),
        (["bleu", "eval_chrf", "exact_match", "accuracy", "f1", "twice", "snowler", ""], "higher"),
        (["signed_gap", "eval_signed_gap"], "zero"),
    ],
)
def test_the_way_a_metric_is_better_is_in_the_end_of_its_name(names, way):
    assert {direction(name) for name in names} == {way}
