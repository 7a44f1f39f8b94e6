"""Intervals: parity with SciPy, coverage where the truth is known, determinism, bounded memory."""

import tracemalloc

import numpy as np
import pytest
import relplot
import scipy.ndimage
import scipy.optimize
import scipy.special
import scipy.stats

from hf_ls.metrics import (
    PredictionStatistics,
    aurc,
    bootstrap_interval,
    classwise_interval,
    consistency_band,
    ece,
    ece_equal_mass,
    null_ece,
    reliability_bins,
    wilson_interval,
)
from hf_ls.metrics.intervals import STATISTICS, _smoother


def drawn(n, gap=0.0, seed=0):
    """Binary statistics whose confidence exceeds the probability of being right by `gap`."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5 + gap, 1.0, n)
    correct = rng.random(n) < confidence - gap
    p_label = np.where(correct, confidence, 1 - confidence)
    return PredictionStatistics(confidence, correct, -np.log(p_label), 2 * (1 - p_label) ** 2)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_equals_scipy_and_broadcasts(level):
    successes, n = np.array([0, 1, 7, 50, 50]), np.array([5, 3, 20, 50, 100])
    low, high = wilson_interval(successes, n, level)
    for i in range(5):
        theirs = scipy.stats.binomtest(int(successes[i]), int(n[i])).proportion_ci(level, method="wilson")
        assert (low[i], high[i]) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))
    assert low[0] == 0.0 and high[3] == 1.0


def test_wilson_of_nothing_says_nothing_and_impossible_counts_are_refused():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for successes, n in [(3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(successes, n)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level=95)


@pytest.mark.parametrize("statistic", ["nll", "brier", "accuracy", "signed_gap"])
def test_intervals_of_means_equal_scipy_up_to_sampling(statistic):
    stats = drawn(400, gap=0.1)
    values = {
        "nll": stats.nll,
        "brier": stats.brier,
        "accuracy": stats.correct.astype(float),
        "signed_gap": stats.confidence - stats.correct,
    }[statistic]
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bootstrap_interval(statistic, stats, repetitions=4000)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.05 * width)
    assert high == pytest.approx(theirs.high, abs=0.05 * width)


def test_resamples_are_the_metric_on_resampled_rows():
    stats = drawn(300, gap=0.15)
    stats = PredictionStatistics(np.round(stats.confidence, 2), stats.correct, stats.nll, stats.brier)  # many ties
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 300, (200, 300))
    low, high = np.quantile([aurc(stats.confidence[row], stats.correct[row]) for row in rows], [0.05, 0.95])
    ours = bootstrap_interval("aurc", stats, repetitions=200, level=0.9, seed=5)
    assert ours == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


@pytest.mark.parametrize("statistic", ["ece", "ece_equal_mass"])
def test_far_from_calibration_the_ece_interval_is_that_of_the_signed_gap(statistic):
    # Every bin is over-confident by far more than its error, so that the ECE is the mean gap.
    stats = drawn(20_000, gap=0.3)
    low, high = bootstrap_interval(statistic, stats)
    theirs = bootstrap_interval("signed_gap", stats)
    assert (low, high) == pytest.approx(theirs, abs=0.08 * (theirs[1] - theirs[0]))


def test_ece_intervals_are_nested_in_level_and_do_not_depend_on_the_order_of_rows():
    stats, order = drawn(800, gap=0.05), np.random.default_rng(1).permutation(800)
    shuffled = PredictionStatistics(stats.confidence[order], stats.correct[order], stats.nll[order], stats.brier[order])
    (low_99, high_99), (low_95, high_95), (low_80, high_80) = (
        bootstrap_interval("ece", stats, level=level) for level in (0.99, 0.95, 0.8)
    )
    assert low_99 <= low_95 <= low_80 < high_80 < high_95 < high_99
    assert bootstrap_interval("ece", shuffled) == pytest.approx((low_95, high_95), abs=1e-6)


def test_the_low_end_of_the_ece_is_0_exactly_where_the_consistency_test_passes():
    passed = []
    for seed in range(60):
        stats = drawn(400, gap=0.02, seed=seed)
        consistent = ece(stats.confidence, stats.correct) <= null_ece(stats.confidence, seed=seed)[1]
        passed.append(consistent)
        low, _ = bootstrap_interval("ece", stats, seed=seed)
        assert low == 0.0 if consistent else low >= 0.0
    assert 5 < sum(passed) < 55


def test_ece_intervals_of_degenerate_samples_are_finite_and_ordered():
    for confidence, correct, expected in [
        ([1.0] * 5, [True] * 5, (0.0, 0.0)),
        ([1.0] * 5, [False] * 5, (1.0, 1.0)),
        ([0.7], [True], None),
        ([0.2, 0.9], [True, False], None),
    ]:
        c = np.array(confidence)
        low, high = bootstrap_interval("ece", PredictionStatistics(c, np.array(correct), c, c))
        assert 0.0 <= low <= high
        if expected is not None:
            assert (low, high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("statistic", ["ece", "ece_equal_mass"])
def test_ece_interval_covers_zero_for_a_calibrated_model_and_excludes_it_for_a_bad_one(statistic):
    direct = {"ece": ece, "ece_equal_mass": ece_equal_mass}[statistic]
    covered = 0
    for seed in range(100):
        stats = drawn(500, seed=seed)
        low, high = bootstrap_interval(statistic, stats, repetitions=200, seed=seed)
        assert 0.0 <= low <= high
        assert direct(stats.confidence, stats.correct) > 0  # a percentile interval would cover 0 in no case
        covered += low == 0.0
    assert 88 <= covered <= 99  # nominal 95; 88 is 3 standard deviations below
    bad = [bootstrap_interval(statistic, drawn(500, gap=0.2, seed=seed), repetitions=200) for seed in range(60)]
    assert all(low > 0.05 for low, _ in bad)
    assert sum(low <= 0.2 <= high for low, high in bad) >= 52


def expit(x):
    return 1 / (1 + np.exp(-x))


# P(right | confidence c), and the distribution of confidences: nothing of it comes from the interval.
TRUTHS = {
    "calibrated": lambda c: c,
    "mildly over-confident": lambda c: expit(0.85 * np.log(c / (1 - c))),
    "strongly over-confident": lambda c: expit(0.5 * np.log(c / (1 - c))),
    "mildly under-confident": lambda c: expit(1.2 * np.log(c / (1 - c))),
    "strongly under-confident": lambda c: expit(1.8 * np.log(c / (1 - c)) + 0.2),
    "constant gap": lambda c: c - 0.03,
    "wave": lambda c: np.clip(c + 0.06 * np.sin(25 * c), 0, 1),
}


def confidences(n, rng):
    return 0.3 + 0.7 * rng.beta(4, 1.5, n)


def true_error(statistic, right):
    """The error of confidences without end, by quadrature over their quantiles."""
    c = 0.3 + 0.7 * scipy.stats.beta(4, 1.5).ppf((np.arange(1_500_000) + 0.5) / 1_500_000)
    gap = c - right(c)
    if statistic == "ece":
        return np.abs(np.bincount(np.ceil(15 * c).astype(int) - 1, weights=gap)).sum() / c.size
    if statistic == "rmsce_debiased":
        return np.sqrt((gap.reshape(15, -1).mean(axis=1) ** 2).mean())
    # The width at which the smoothed error is the width; SciPy's kernel, reflected at both ends.
    cells = np.bincount((4000 * c).astype(int), weights=gap, minlength=4000) / c.size

    def excess(width):
        return np.abs(scipy.ndimage.gaussian_filter1d(cells, 4000 * width, mode="reflect", truncate=6)).sum() - width

    return scipy.optimize.brentq(excess, 1e-4, 0.5)


# The equal-mass and the smooth error err on the wide side; of a wave the kernel sees little.
BANDS = {"ece": (0.93, 0.97), "rmsce_debiased": (0.93, 0.99), "smooth_ece": (0.93, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistic", "n"),
    [("ece", 500), ("ece", 2000), ("ece", 10_000), *((s, n) for s in ("rmsce_debiased", "smooth_ece") for n in (300, 2000))],
)
@pytest.mark.parametrize("name", TRUTHS)
def test_coverage_of_the_intervals_of_calibration_errors_over_1000_repetitions(name, statistic, n):
    right = TRUTHS[name]
    truth = 0.0 if name == "calibrated" else true_error(statistic, right)
    inside = above = 0
    for seed in range(1000):
        rng = np.random.default_rng((n, list(TRUTHS).index(name), seed))
        confidence = confidences(n, rng)
        correct = rng.random(n) < right(confidence)
        stats = PredictionStatistics(confidence, correct, confidence, confidence)
        low, high = bootstrap_interval(statistic, stats, repetitions=500, seed=seed)
        inside += low <= truth <= high
        above += low > truth
    print(f"\n{name}, n = {n}: true {statistic} {truth:.4f}, covered {inside / 10:.1f} %, interval above it {above / 10:.1f} %")
    least, most = BANDS[statistic]
    assert least <= inside / 1000 <= most  # 1000 repetitions, since 500 scatter by 1 % and 1000 by 0.7 %


def of_classes(n, k, slope, shift, seed):
    """Probabilities [n, K] of a model, and those with which the labels are drawn: another slope of the logits, and a shift."""
    z = 1.5 * np.random.default_rng(seed).normal(size=(n, k))
    return scipy.special.softmax(z, axis=1), scipy.special.softmax(slope * z + shift * np.arange(k) / k, axis=1)


CLASS_TRUTHS = {
    "calibrated": (1.0, 0.0),
    "mildly over-confident": (0.8, 0.0),
    "strongly over-confident": (0.5, 0.0),
    "mildly under-confident": (1.2, 0.0),
    "strongly under-confident": (1.8, 0.0),
    "a class too rare": (1.0, 0.4),
}


def covered_classwise(name, k, n, repetitions, draws):
    """How many intervals hold the true classwise ECE, and how many are above it."""
    p, q = of_classes(1_000_000 // k, k, *CLASS_TRUTHS[name], 99)
    cell = np.ceil(15 * p).astype(int) - 1 + 15 * np.arange(k)
    truth = 0.0 if name == "calibrated" else np.abs(np.bincount(cell.ravel(), weights=(p - q).ravel())).sum() / len(p) / k
    inside = above = 0
    for seed in range(repetitions):
        p, q = of_classes(n, k, *CLASS_TRUTHS[name], (n, seed))
        labels = (np.random.default_rng(seed).random((n, 1)) > np.cumsum(q, axis=1)[:, :-1]).sum(axis=1)
        low, high = classwise_interval(p, labels, repetitions=draws, seed=seed)
        inside += low <= truth <= high
        above += low > truth
    return inside, above


@pytest.mark.slow
@pytest.mark.parametrize(("k", "n"), [(3, 300), (3, 2000), (10, 300), (10, 2000)])
@pytest.mark.parametrize("name", CLASS_TRUTHS)
def test_coverage_of_the_classwise_interval_over_1000_repetitions(name, k, n):
    inside, above = covered_classwise(name, k, n, 1000, 500)
    print(f"\n{name}, K = {k}, n = {n}: covered {inside / 10:.1f} %, interval above the truth {above / 10:.1f} %")
    assert 0.90 <= inside / 1000 <= 0.99


@pytest.mark.parametrize("name", ["calibrated", "strongly under-confident"])
def test_the_classwise_interval_covers(name):
    inside, _ = covered_classwise(name, 3, 300, 40, 200)
    assert inside >= 34  # nominal 38


def test_the_classwise_interval_of_two_classes_is_that_of_the_probability_of_one():
    p, q = of_classes(1500, 2, 0.6, 0.0, 4)
    labels = (np.random.default_rng(4).random(1500) < q[:, 1]).astype(int)
    low, high = classwise_interval(p, labels)
    theirs = bootstrap_interval("ece", PredictionStatistics(p[:, 1], labels == 1, p[:, 1], p[:, 1]))
    assert (low, high) == pytest.approx(theirs, abs=0.1 * (theirs[1] - theirs[0]))


@pytest.mark.parametrize("statistic", ["rmsce_debiased", "smooth_ece"])
def test_intervals_of_other_calibration_errors_cover(statistic):
    covered = sum(bootstrap_interval(statistic, drawn(500, seed=seed), repetitions=200)[0] == 0.0 for seed in range(30))
    bad = [bootstrap_interval(statistic, drawn(500, gap=0.2, seed=seed), repetitions=200) for seed in range(30)]
    assert covered >= 26 and sum(low <= 0.2 <= high for low, high in bad) >= 26
    assert all(low > 0.05 for low, _ in bad)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.3])
def test_the_kernel_is_the_gaussian_one_reflected_at_both_ends(width):
    points = (np.arange(240) + 0.5) / 240
    images = [points + 2 * k for k in range(-3, 4)] + [2 * k - points for k in range(-3, 4)]
    density = sum(scipy.stats.norm.pdf(points[:, None], image, width) for image in images)
    np.testing.assert_allclose(_smoother(width), density / 240, atol=1e-6 / width)


def test_the_kernel_gives_the_smooth_ece_of_relplot_at_its_own_width():
    stats = drawn(600, gap=0.1)
    value, width = relplot.smECE(stats.confidence, stats.correct.astype(float), return_width=True)
    cell = np.minimum((240 * stats.confidence).astype(int), 239)
    gap = np.bincount(cell, weights=stats.confidence - stats.correct, minlength=240) / 600
    assert np.abs(gap @ _smoother(width)).sum() == pytest.approx(value, rel=0.01)


def test_bins_of_one_example_say_nothing_of_the_debiased_error():
    c = np.array([0.9, 0.6, 0.7])
    assert bootstrap_interval("rmsce_debiased", PredictionStatistics(c, c > 0.65, c, c)) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 500, 2000])
@pytest.mark.parametrize("gap", [0.0, 0.15])
def test_coverage_of_the_nll_interval_over_500_repetitions(n, gap):
    c = 0.5 + gap + (0.5 - gap) * (np.arange(1_000_000) + 0.5) / 1_000_000
    truth = -((c - gap) * np.log(c) + (1 - c + gap) * np.log1p(-c)).mean()
    inside = 0
    for seed in range(500):
        low, high = bootstrap_interval("nll", drawn(n, gap=gap, seed=(n, seed)), repetitions=500, seed=seed)
        inside += low <= truth <= high
    print(f"\nn = {n}, gap {gap}: true NLL {truth:.4f}, covered {inside / 5:.1f} %")
    assert 0.93 <= inside / 500 <= 0.97


def test_null_ece_is_what_calibrated_outcomes_give():
    confidence = np.random.default_rng(0).beta(5, 2, 800)
    rng = np.random.default_rng(1)
    simulated = [ece(confidence, rng.random(800) < confidence) for _ in range(2000)]
    mean, q95 = null_ece(confidence, repetitions=2000)
    assert mean == pytest.approx(np.mean(simulated), rel=0.03)
    assert q95 == pytest.approx(np.quantile(simulated, 0.95), rel=0.05)


def test_null_ece_of_certain_predictions_is_zero_and_falls_with_n():
    assert null_ece(np.ones(100)) == (0.0, 0.0)
    small, large = (null_ece(np.random.default_rng(0).uniform(0.5, 1, n))[0] for n in (500, 8000))
    assert large == pytest.approx(small / 4, rel=0.1)


def test_binomial_draws_per_cell_have_the_spread_of_single_draws():
    # 50,000 rows share few cells: the grouped draw must still give Σ p (1 − p).
    confidence = np.random.default_rng(0).uniform(0.9990, 0.9995, 50_000)
    low, high = consistency_band(confidence, n_bins=1, repetitions=4000, level=0.6826894921)
    sigma = np.sqrt((confidence * (1 - confidence)).sum()) / confidence.size
    assert (high[0] - low[0]) / 2 == pytest.approx(sigma, rel=0.1)
    assert (high[0] + low[0]) / 2 == pytest.approx(confidence.mean(), abs=0.1 * sigma)


def test_consistency_band_holds_calibrated_accuracy_and_is_nan_where_empty():
    inside = total = 0
    for seed in range(20):
        stats = drawn(1000, seed=seed)
        low, high = consistency_band(stats.confidence, repetitions=300, seed=seed)
        bins = reliability_bins(stats.confidence, stats.correct)
        np.testing.assert_array_equal(np.isnan(low), bins.count == 0)
        used = bins.count > 0
        inside += ((low <= bins.accuracy) & (bins.accuracy <= high))[used].sum()
        total += used.sum()
    assert 0.92 < inside / total < 0.99


def test_same_seed_same_interval_and_another_seed_another():
    stats = drawn(200, gap=0.1)
    for statistic in STATISTICS:
        first = bootstrap_interval(statistic, stats, repetitions=100, seed=3)
        assert first == bootstrap_interval(statistic, stats, repetitions=100, seed=3)
        assert first != bootstrap_interval(statistic, stats, repetitions=100, seed=4)
    assert null_ece(stats.confidence, seed=3) == null_ece(stats.confidence, seed=3)
    assert null_ece(stats.confidence, seed=3) != null_ece(stats.confidence, seed=4)


@pytest.mark.parametrize("statistic", ["nll", "ece", "ece_equal_mass", "aurc"])
def test_memory_does_not_grow_with_the_number_of_repetitions(statistic):
    stats = drawn(100_000, gap=0.1)
    peaks = []
    for repetitions in (30, 120):
        tracemalloc.start()
        try:
            bootstrap_interval(statistic, stats, repetitions=repetitions)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_statistics_without_a_sound_interval_are_refused():
    for statistic in ("mce", "e_aurc", "ECE"):
        with pytest.raises(ValueError, match="expected a statistic of"):
            bootstrap_interval(statistic, drawn(10))
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval("nll", drawn(10), level=1.0)
    infinite = PredictionStatistics.from_probabilities([[1.0, 0.0], [0.5, 0.5]], [1, 0])
    with pytest.raises(ValueError, match="finite nll"):
        bootstrap_interval("nll", infinite)
