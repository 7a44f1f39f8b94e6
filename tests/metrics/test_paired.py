"""Paired differences: parity with plain resampling and SciPy, coverage over examples and seeds, clusters, Holm."""

import numpy as np
import pytest
import scipy.stats

from hf_ls.metrics import PredictionStatistics, TokenCalibration, aurc, bootstrap_interval, e_aurc, ece
from hf_ls.metrics.paired import (
    COMPARED,
    RESAMPLED,
    Difference,
    Resamples,
    differences,
    draws_as_arrays,
    draws_from_arrays,
    draws_of_examples,
    draws_of_tokens,
    holm,
    ranking_influence,
    seed_difference,
    seed_interval,
)
from hf_ls.metrics.text import draws_of_texts


def model(n=400, sharpness=1.0, noise=0.0, seed=0, examples=0):
    """Statistics of a model of four classes on examples which depend on `examples` alone."""
    rng = np.random.default_rng(examples)
    z = 1.5 * rng.normal(size=(n, 4))
    labels = (z + rng.gumbel(size=z.shape)).argmax(1)
    z = sharpness * (z + noise * np.random.default_rng((1, seed)).normal(size=z.shape))
    return PredictionStatistics.from_logits(z, labels)


def values(stats):
    return {
        "accuracy": stats.correct.mean(),
        "nll": stats.nll.mean(),
        "brier": stats.brier.mean(),
        "signed_gap": (stats.confidence - stats.correct).mean(),
        "aurc": aurc(stats.confidence, stats.correct),
        "e_aurc": e_aurc(stats.confidence, stats.correct),
        "ece": ece(stats.confidence, stats.correct),
    }


def rows_of(stats, rows):
    return PredictionStatistics(stats.confidence[rows], stats.correct[rows], stats.nll[rows], stats.brier[rows])


def test_values_are_the_metrics_and_draws_spread_as_resampling_rows_does():
    one, two = model(), model(noise=0.8, seed=1)
    resamples = Resamples([one, two], None, repetitions=1000, seed=0)
    rng = np.random.default_rng(3)
    plain = {name: [] for name in RESAMPLED}
    for _ in range(600):
        rows = rng.integers(0, len(one), len(one))
        mine, theirs = values(rows_of(one, rows)), values(rows_of(two, rows))
        for name in RESAMPLED:
            plain[name].append((mine[name], mine[name] - theirs[name]))
    for column, name in enumerate(RESAMPLED):
        assert resamples.values[:, column] == pytest.approx([values(one)[name], values(two)[name]], abs=1e-12), name
        drawn = resamples.draws[:, :, column]
        spread = np.std(plain[name], axis=0)
        assert [drawn[0].std(), (drawn[0] - drawn[1]).std()] == pytest.approx(spread, rel=0.15), name


def test_per_seed_interval_is_the_paired_bootstrap_of_scipy():
    one, two = model(), model(noise=0.5, seed=1)
    difference = Resamples([one, two], None, repetitions=4000, seed=0).difference([0], [1], "nll", 0.95)
    theirs = scipy.stats.bootstrap(
        (one.nll - two.nll,), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    ours = difference.per_seed_low[0], difference.per_seed_high[0]
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * (theirs.high - theirs.low))
    assert difference.per_seed[0] == difference.value == pytest.approx((one.nll - two.nll).mean(), abs=1e-12)
    assert (difference.seed_low, difference.seed_high) == (None, None)


def test_pairing_makes_the_interval_of_alike_models_narrow():
    one, two = model(), model(noise=0.05, seed=1)
    difference = Resamples([one, two], None, repetitions=500, seed=0).difference([0], [1], "nll", 0.95)
    low, high = bootstrap_interval("nll", one)
    assert difference.high - difference.low < 0.3 * (high - low)


def test_equal_models_differ_by_exactly_nothing():
    resamples = Resamples([model(), model()], None, repetitions=200, seed=0)
    for name in RESAMPLED:
        difference = resamples.difference([0], [1], name, 0.95)
        assert (difference.value, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)


def test_influence_is_what_one_more_row_adds():
    rng = np.random.default_rng(0)
    confidence = np.round(rng.uniform(0.3, 1, 60), 1)  # ties
    correct = rng.random(60) < confidence
    many = np.tile(confidence, 200), np.tile(correct, 200)
    for of, metric in zip(ranking_influence(confidence, correct), (aurc, e_aurc), strict=True):
        assert of.sum() == pytest.approx(0.0, abs=1e-12)
        added = [metric(np.append(many[0], confidence[j]), np.append(many[1], correct[j])) - metric(*many) for j in range(60)]
        assert np.array(added) * many[0].size == pytest.approx(of, abs=0.02)


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_has_finite_intervals_in_range(right):
    c = np.linspace(0.4, 0.9, 30)
    stats = PredictionStatistics(c, np.full(30, right), c, c)
    resamples = Resamples([stats], None, repetitions=200, seed=0)
    for name in RESAMPLED:
        low, high = resamples.interval(0, name, 0.95)
        assert np.isfinite([low, high]).all() and low <= high, name
    low, high = resamples.interval(0, "accuracy", 0.95)
    assert high - low > 0.05


def test_rows_of_one_cluster_are_drawn_together():
    stats, other = model(300), model(300, noise=0.5, seed=1)
    ten = [
        PredictionStatistics(*(np.repeat(column, 10) for column in (s.confidence, s.correct, s.nll, s.brier)))
        for s in (stats, other)
    ]
    once = Resamples([stats, other], None, repetitions=300, seed=0)
    cluster = np.repeat(np.random.default_rng(0).permutation(300) + 7, 10)  # neither consecutive from 0 nor in order
    together = Resamples(ten, cluster, repetitions=2000, seed=0)
    assert together.units == once.units == 300
    for name in ("nll", "accuracy", "ece", "aurc"):
        a, b, apart = (
            r.difference([0], [1], name, 0.95) for r in (once, together, Resamples(ten, None, repetitions=300, seed=0))
        )
        assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.2), name
        assert b.high - b.low > 2 * (apart.high - apart.low), name


def test_blocks_of_weights_do_not_show():
    """More examples than one block: the interval still has the width of σ / sqrt(n)."""
    one, two = model(9000), model(9000, noise=0.5, seed=1)
    difference = Resamples([one, two], None, repetitions=1000, seed=0).difference([0], [1], "nll", 0.95)
    half = 1.96 * (one.nll - two.nll).std() / np.sqrt(9000)
    assert (difference.high - difference.low) / 2 == pytest.approx(half, rel=0.08)


def test_same_seed_same_numbers_and_another_seed_others():
    cells = [model(), model(noise=0.5, seed=1)]
    one, same, other = (Resamples(cells, None, repetitions=100, seed=s).difference([0], [1], "ece", 0.95) for s in (3, 3, 4))
    assert one == same and one.per_seed == other.per_seed and one.low != other.low


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_combined_interval_covers_the_truth_over_examples_and_seeds(seeds):
    """Difference of seed s on example i: 0.3 + a_s + b_i + noise. The t interval over seeds alone misses the examples."""
    covered = over_seeds = 0
    for repetition in range(300):
        rng = np.random.default_rng((seeds, repetition))
        shared = 0.8 * rng.normal(size=60)
        run = (0.1 if seeds > 1 else 0.0) * rng.normal(size=seeds)
        c, zero = np.full(60, 0.5), np.zeros(60)
        cells = [PredictionStatistics(c, zero > 1, 0.3 + a + shared + 0.2 * rng.normal(size=60), zero) for a in run]
        cells += [PredictionStatistics(c, zero > 1, zero, zero)] * seeds
        resamples = Resamples(cells, None, repetitions=300, seed=repetition)
        difference = resamples.difference(range(seeds), range(seeds, 2 * seeds), "nll", 0.95)
        covered += difference.low <= 0.3 <= difference.high
        assert (difference.p <= 0.05) == (difference.low > 0 or difference.high < 0)
        over_seeds += seeds > 1 and difference.seed_low <= 0.3 <= difference.seed_high
    assert 0.915 <= covered / 300 <= 0.985
    assert seeds < 5 or over_seeds / 300 < 0.85


def test_seed_interval_equals_scipy_and_one_seed_has_none():
    numbers = [0.2, 0.5, 0.3, 0.35]
    theirs = scipy.stats.ttest_1samp(numbers, 0.0)
    low, high = seed_interval(numbers, 0.9)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval(0.9)))
    assert seed_interval([0.2], 0.9) == (None, None)
    difference = seed_difference("f1", [1.2, 1.5, 1.3, 1.35], [1.0] * 4, 0.95)
    assert difference.p == pytest.approx(theirs.pvalue) and difference.per_seed == pytest.approx(numbers)
    alone = seed_difference("f1", [1.2], [1.0], 0.95)
    assert (alone.low, alone.high, alone.p) == (None, None, None)


def test_holm_equals_its_definition_and_leaves_none_alone():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_models_which_are_equally_good_are_seldom_called_different():
    called = dict.fromkeys(RESAMPLED, 0)
    for repetition in range(200):
        cells = [model(500, sharpness=1.5, noise=0.5, seed=(repetition, s), examples=(2, repetition)) for s in (0, 1)]
        resamples = Resamples(cells, None, repetitions=300, seed=repetition)
        for name in called:
            called[name] += resamples.difference([0], [1], name, 0.95).p <= 0.05
    assert all(count <= 20 for count in called.values()), called  # nominal 10; 20 is 3 standard deviations above
    assert sum(called.values()) > 20


def known(found, metric):
    return next(d for d in found if d.metric == metric)


def test_runs_measured_apart_and_read_back_are_paired_as_those_measured_together(tmp_path):
    one, two, labels = model(), model(noise=0.5, seed=1), np.arange(400)
    np.savez(tmp_path / "one.npz", **draws_as_arrays({"baseline": [draws_of_examples(one, labels, repetitions=300)]}))
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        rows = draws_from_arrays(arrays)
    found = differences(rows | {"smoothed": [draws_of_examples(two, labels, repetitions=300)]})
    together = Resamples([one, two], None, repetitions=300, seed=0)
    assert [d.metric for d in found] == list(COMPARED)
    for d in found:
        expected = together.difference([1], [0], d.metric, 0.95)
        assert (d.row, d.against) == ("smoothed", "baseline")
        assert (d.value, d.low, d.high) == pytest.approx((expected.value, expected.low, expected.high), abs=1e-12), d.metric
        assert d.finding == expected.finding


def test_a_paired_difference_is_found_where_the_two_intervals_overlap():
    """As on the embedded default: two fits of one quality class differ on the same examples by less than they vary over them."""
    one = model(2000)
    two = PredictionStatistics(one.confidence, one.correct, one.nll - 0.0056 + 0.04 * np.sin(np.arange(2000)), one.brier)
    (low, high), (other_low, other_high) = bootstrap_interval("nll", two), bootstrap_interval("nll", one)
    assert low < other_high and other_low < high
    rows = {name: [draws_of_examples(stats, one.correct)] for name, stats in (("baseline", one), ("smoothed", two))}
    d = known(differences(rows), "nll")
    half = 1.96 * (one.nll - two.nll).std() / np.sqrt(2000)
    assert d.finding == "better" and (d.low, d.high) == pytest.approx((d.value - half, d.value + half), abs=0.15 * half)


def test_other_examples_or_another_order_are_not_paired():
    one, labels = model(), np.arange(400)
    rows = {"a": [draws_of_examples(one, labels, repetitions=50)], "b": [draws_of_examples(one, labels[::-1], repetitions=50)]}
    assert differences(rows) == []
    assert differences({**rows, "b": [draws_of_examples(one, labels, repetitions=50, seed=1)]}) == []
    assert differences({"a": rows["a"]}) == []


def test_tokens_are_paired_by_whole_sequences():
    """Against the plain paired bootstrap of sequences; batches and padding may differ between the two models."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 300)
    shared = rng.normal(size=300)[:, None] * 0.5 + rng.gumbel(size=(300, 8))
    items = []
    for shift in (0.0, 0.06):
        nll = np.abs(shared) + shift + 0.3 * rng.random((300, 1))
        item = np.stack([np.full((300, 8), 0.6), (nll < 0.7).astype(float), nll, np.full((300, 8), 0.4)], -1)
        item[np.arange(8) >= lengths[:, None]] = np.nan
        items.append(item)
    streams = []
    for item, size in zip(items, (300, 7), strict=True):
        stream = TokenCalibration()
        for start in range(0, 300, size):
            stream.update(item[start : start + size], np.ones((300, 8), dtype=int)[start : start + size])
        streams.append([draws_of_tokens(stream)])
    found = known(differences(dict(zip("ab", streams, strict=True))), "nll")
    sums = [np.nansum(item[..., 2], axis=1) for item in items]
    rows = np.random.default_rng(1).integers(0, 300, (2000, 300))
    plain = (sums[1] - sums[0])[rows].sum(1) / lengths[rows].sum(1)
    assert found.value == pytest.approx((sums[1] - sums[0]).sum() / lengths.sum())
    assert found.high - found.low == pytest.approx(2 * 1.96 * plain.std(), rel=0.12)
    fewer = TokenCalibration()
    fewer.update(items[0][:299], np.ones((299, 8), dtype=int))
    assert differences({"a": streams[0], "b": [draws_of_tokens(fewer)]}) == []


def test_texts_are_paired_by_sentences():
    references = [f"a b c {i}" for i in range(60)]
    worse = [text if i % 3 else "a b" for i, text in enumerate(references)]
    metrics = ("exact_match", "word_error_rate", "bleu", "chrf")
    rows = {"a": [draws_of_texts(references, references, metrics)], "b": [draws_of_texts(worse, references, metrics)]}
    found = differences(rows)
    assert [(d.metric, d.finding) for d in found] == [(metric, "worse") for metric in metrics]
    assert known(found, "exact_match").value == pytest.approx(-1 / 3)
    half = 1.96 * np.sqrt(2 / 9 / 59)
    assert known(found, "exact_match").high == pytest.approx(-1 / 3 + half, abs=0.02)
    assert all(d.finding == "none" and d.value == 0 for d in differences({"a": rows["a"], "b": rows["a"]}))


@pytest.mark.parametrize(
    ("metric", "low", "high", "finding"),
    [
        ("nll", -0.2, -0.1, "better"),
        ("nll", 0.1, 0.2, "worse"),
        ("accuracy", 0.1, 0.2, "better"),
        ("phoneme_error_rate", -0.2, -0.1, "better"),
        ("nll", -0.1, 0.0, "none"),
        ("nll", None, None, "none"),
        ("signed_gap", -0.2, -0.1, "none"),
    ],
)
def test_one_rule_of_measurably_better(metric, low, high, finding):
    assert Difference(metric, "row", "against", -0.1, low, high).finding == finding
