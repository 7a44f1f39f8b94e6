"""Token calibration: exact sums in constant memory, intervals over sequences, groups."""

import copy
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_streams import COUNTS, EOS, V, filled, flat, sequences, simulated

from hf_ls.metrics import (
    TokenCalibration,
    aurc,
    ece,
    ece_equal_mass,
    mce,
    null_ece,
    reliability_bins,
    signed_gap,
)
from hf_ls.metrics.core import CELLS
from hf_ls.trainer.evaluation import item_statistics


def same_within(one, two, tolerance=1e-12):
    assert one.keys() == two.keys()
    for name, numbers in one.items():
        assert numbers == pytest.approx(two[name], rel=tolerance, abs=tolerance, nan_ok=True), name


def same_groups(one, two):
    assert [(group["kind"], group["name"]) for group in one] == [(group["kind"], group["name"]) for group in two]
    for group, other in zip(one, two, strict=True):
        numbers = group.keys() - {"kind", "name"}
        same_within({name: group[name] for name in numbers}, {name: other[name] for name in numbers})


# Values


def test_metrics_are_those_of_the_flat_tokens():
    items, labels = sequences(200)
    stats, state = flat(items), filled(items, labels)
    assert filled(items, labels, cuts=(1, 90)).label_counts.tolist() == np.bincount(labels[labels >= 0]).tolist()
    metrics = state.metrics()
    pair = (stats.confidence, stats.correct)
    exact = {
        "accuracy": stats.correct.mean(),
        "nll": stats.nll.mean(),
        "perplexity": math.exp(stats.nll.mean()),
        "brier": stats.brier.mean(),
        "ece": ece(*pair),
        "signed_gap": signed_gap(*pair),
        "mce": mce(*pair),
    }
    for name, value in exact.items():
        assert metrics[name]["value"] == pytest.approx(value, abs=1e-12), name
    # Confidences within one cell count as equal.
    assert metrics["ece_equal_mass"]["value"] == pytest.approx(ece_equal_mass(*pair), abs=1e-3)
    assert metrics["aurc"]["value"] == pytest.approx(aurc(*pair), abs=1e-3)
    assert len(state) == len(stats) and state.sequences == (labels != -100).any(1).sum() == 171
    null = null_ece(stats.confidence, repetitions=4000, seed=1)
    many = filled(items, labels, repetitions=4000).metrics()["ece"]
    assert (many["null"], many["null_q95"]) == (pytest.approx(null[0], rel=0.03), pytest.approx(null[1], rel=0.04))
    assert {type(number) for numbers in metrics.values() for number in numbers.values()} == {float}


def test_reliability_and_histogram_are_those_of_the_flat_tokens():
    items, labels = sequences(200)
    stats, state = flat(items), filled(items, labels)
    for n_bins in (15, 10):
        ours, bins = state.reliability(n_bins), reliability_bins(stats.confidence, stats.correct, n_bins)
        for name in ("edges", "count", "confidence", "accuracy"):
            np.testing.assert_allclose(ours[name], getattr(bins, name), atol=1e-13)
        low, high, used = np.array(ours["band_low"]), np.array(ours["band_high"]), bins.count > 0
        np.testing.assert_array_equal(np.isnan(low), ~used)
        # The mean confidence lies inside what a calibrated model shows.
        assert (low <= bins.confidence)[used].all() and (bins.confidence <= high)[used].all()
    correct, incorrect = state.histogram(20)
    np.testing.assert_array_equal(correct, np.histogram(stats.confidence[stats.correct], 20, (0, 1))[0])
    np.testing.assert_array_equal(incorrect, np.histogram(stats.confidence[~stats.correct], 20, (0, 1))[0])
    assert {type(count) for count in correct + incorrect + ours["count"]} == {int}


def test_groups_are_the_metrics_of_their_tokens():
    items, labels = sequences(120, length=20)
    kept = ~np.isnan(items).any(-1)
    rank = np.where(kept, np.cumsum(kept, 1), 0)
    count = np.where(kept, COUNTS[labels % V], -1)
    members = {
        ("end_of_sequence", "end of sequence"): kept & (labels == EOS),
        ("end_of_sequence", "other tokens"): kept & (labels != EOS),
    }
    members |= {("frequency", "0"): count == 0, ("frequency", "1-9"): (count >= 1) & (count <= 9)}
    members |= {("frequency", f"{low}-{10 * low - 1}"): (count >= low) & (count < 10 * low) for low in (10, 100, 1000, 10**6)}
    members |= {("position", "1"): rank == 1}
    members |= {("position", f"{low}-{2 * low - 1}"): (rank >= low) & (rank < 2 * low) for low in (2, 4, 8, 16)}
    groups = {(group["kind"], group["name"]): group for group in filled(items, labels).groups()}
    assert list(groups) == [key for key, mask in members.items() if mask.any()]
    for key, group in groups.items():
        stats = flat(items[members[key]])
        expected = {"n": len(stats), "accuracy": stats.correct.mean(), "nll": stats.nll.mean(), "brier": stats.brier.mean()}
        expected |= {"perplexity": math.exp(stats.nll.mean()), "ece": ece(stats.confidence, stats.correct)}
        expected |= {"signed_gap": signed_gap(stats.confidence, stats.correct)}
        assert {name: group[name] for name in expected} == pytest.approx(expected, abs=1e-12), key
        assert {type(group[name]) for name in expected} == {int, float}
    for kind in ("end_of_sequence", "frequency", "position"):
        assert sum(group["n"] for group in groups.values() if group["kind"] == kind) == kept.sum()
    plain = TokenCalibration()
    plain.update(items, labels)
    assert {group["kind"] for group in plain.groups()} == {"position"}


# Splits, padding, merging, saving


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 600), max_size=8), left=st.integers(0, 3), right=st.integers(0, 3))
def test_no_split_into_batches_and_no_padding_changes_a_number(cuts, left, right):
    items, labels = sequences(600, length=5)  # 514 with tokens: two whole blocks and a part
    padded = np.pad(items, ((0, 0), (left, right), (0, 0)), constant_values=np.nan)
    padded_labels = np.pad(labels, ((0, 0), (left, right)), constant_values=-100)
    whole, split = filled(items, labels), filled(padded, padded_labels, cuts)
    one, two = whole.metrics(), split.metrics()
    same_within(one, two)
    for name, numbers in one.items():
        for end in numbers.keys() - {"value"}:
            assert numbers[end] == two[name][end], (name, end)  # bit for bit
    same_within(whole.reliability(), split.reliability())
    assert whole.histogram() == split.histogram()
    same_groups(whole.groups(), split.groups())


# Precision and memory


@pytest.mark.parametrize(
    ("n", "kind"), [(10_000_000, "constant"), (400_000, "skewed"), pytest.param(10_000_000, "skewed", marks=pytest.mark.slow)]
)
def test_ece_of_a_long_stream_is_exact_and_memory_constant(n, kind):
    rng = np.random.default_rng(0)
    # Equal confidences round the same way each time: plain sums drift fastest there.
    confidence = np.full(n, 0.9999371) if kind == "constant" else rng.beta(5, 0.1, n)
    correct = rng.random(n) < confidence - 0.01
    nll = rng.exponential(size=n)
    state, size = TokenCalibration(repetitions=4), 50 * 200
    items = np.empty((50, 200, 4))
    labels = np.zeros((50, 200), dtype=np.int64)
    early = 0
    tracemalloc.start()
    try:
        for start in range(0, n, size):
            rows = slice(start, start + size)
            for column, values in enumerate((confidence, correct, nll, confidence)):
                items[..., column] = values[rows].reshape(50, 200)
            state.update(items, labels)
            early = early or tracemalloc.get_traced_memory()[0]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < early + 100_000 and peak < 8e6
    assert (
        sum(value.nbytes for value in [*vars(state).values(), *vars(state._cells).values()] if isinstance(value, np.ndarray))
        < 5e5
    )

    bins = np.maximum(np.ceil(confidence * 15).astype(int) - 1, 0)
    sums = [abs(math.fsum(confidence[bins == b]) - int(correct[bins == b].sum())) for b in range(15)]
    metrics = state.metrics()
    assert abs(metrics["ece"]["value"] - math.fsum(sums) / n) < 1e-13
    assert abs(metrics["nll"]["value"] - math.fsum(nll) / n) < 1e-13
    assert len(state) == n and state.sequences == n // 200


def test_one_token_at_a_time_is_as_exact():
    state = TokenCalibration(repetitions=1)
    rng = np.random.default_rng(0)
    nll = rng.exponential(size=2000) * 10.0 ** rng.integers(-8, 8, 2000)
    for value in nll:
        state.update([[[0.1, 0.0, value, 0.3]]], [[0]])
    assert state.metrics()["nll"]["value"] == pytest.approx(math.fsum(nll) / 2000, rel=3e-16)
    assert state.metrics()["ece"]["value"] == pytest.approx(0.1, abs=1e-16)


def test_statistics_of_a_vocabulary_of_32k_need_no_logits():
    state, g = TokenCalibration(repetitions=20), torch.Generator().manual_seed(0)
    confidence, correct, peaks = [], [], []
    for _ in range(6):
        logits, labels = torch.randn(2, 20, 32_000, generator=g) * 3, torch.randint(0, 32_000, (2, 20), generator=g)
        labels[0, :10] = logits[0, :10].argmax(-1)
        items = item_statistics(logits, labels).numpy()
        p = logits.double().softmax(-1).max(-1)
        confidence.append(p.values.flatten())
        correct.append((p.indices == labels).flatten())
        tracemalloc.start()
        state.update(items, labels.numpy())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 2e6  # a batch of logits has 10 MB in float64
    direct = ece(torch.cat(confidence).numpy(), torch.cat(correct).numpy())
    assert state.metrics()["ece"]["value"] == pytest.approx(direct, abs=1e-12)


def test_aurc_of_many_tokens_needs_no_table_of_their_number():
    items = np.tile([[0.3, 0.0, 1.0, 0.5], [0.6, 1.0, 1.0, 0.5], [0.9, 0.0, 1.0, 0.5], [0.9, 1.0, 1.0, 0.5]], (1, 1, 1))
    state = TokenCalibration(repetitions=1)
    state.update(items, np.zeros((1, 4), dtype=int))
    for array in (state._groups, state._cells.count, state._cells.correct, state._cells.offset):
        array *= 2**21  # as if they had come so often
    n, cells = len(state), state._cells
    tracemalloc.start()
    ours = state.metrics()["aurc"]["value"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 4 * 2**21 and peak < 40e6
    right, wrong = (cells.correct[cells.count > 0][::-1], (cells.count - cells.correct)[cells.count > 0][::-1])
    rate = np.repeat(wrong / (right + wrong), right + wrong)
    assert ours == pytest.approx((np.cumsum(rate) / np.arange(1, n + 1)).mean(), abs=1e-12)


# Intervals


def test_nothing_added_has_no_result():
    state = TokenCalibration(eos_token_id=EOS)
    state.update(np.full((3, 4, 4), np.nan), np.full((3, 4), -100))
    state.update(np.empty((0, 4, 4)), np.empty((0, 4), dtype=int))
    assert len(state) == state.sequences == 0 and state.groups() == []
    for call in (state.metrics, state.reliability):
        with pytest.raises(ValueError, match=r"expected at least one (token|prediction), got none; call update\(\)"):
            call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda items, labels: (items[0], labels), ValueError, r"expected items \[S, T, 4\]"),
        (lambda items, labels: (items[:, :-1], labels), ValueError, r"shift and pad the labels"),
        (lambda items, labels: (items, labels.astype(float)), TypeError, "integer labels"),
        (lambda items, labels: (items.astype(str), labels), TypeError, "float items"),
        (lambda items, labels: (items, np.full_like(labels, -100)), ValueError, r"labels in \[0, 40\) .* got -100"),
        (lambda items, labels: (items, np.full_like(labels, V)), ValueError, "got 40; shift the labels"),
        (lambda items, labels: (items * [1, 1, 1, np.nan], labels), ValueError, "partly NaN"),
        (lambda items, labels: (items * [1, 1, np.inf, 1], labels), ValueError, "finite nll"),
        (lambda items, labels: (items * [2, 1, 1, 1], labels), ValueError, "confidence from 0 to 1"),
        (lambda items, labels: (np.add(items, [0, 0.5, 0, 0]), labels), ValueError, "True and False"),
    ],
)
def test_wrong_batches_are_refused_whole(change, error, message):
    items, labels = simulated(6, 0.1, 0.1, 0)
    state = filled(items, labels)
    before = copy.deepcopy([vars(state), vars(state._cells)])
    with pytest.raises(error, match=message):
        state.update(*change(items, labels))
    for now, then in zip([vars(state), vars(state._cells)], before, strict=True):
        for name in (name for name, value in now.items() if isinstance(value, np.ndarray | float | int)):
            np.testing.assert_array_equal(now[name], then[name])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eos_token_id": 1.5}, TypeError, "integer eos_token_id"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id of at least 0"),
        ({"token_counts": [0.5]}, TypeError, "integer token_counts"),
        ({"token_counts": [[1]]}, ValueError, r"token_counts \[V\]"),
        ({"token_counts": [1, -1]}, ValueError, r"token_counts \[V\]"),
        ({"repetitions": 0}, ValueError, "repetitions of at least 1"),
        ({"seed": -1}, ValueError, "seed of at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TokenCalibration(**settings)


def test_bins_that_do_not_divide_the_cells_are_refused():
    state = filled(*sequences())
    for call in (state.reliability, state.histogram):
        with pytest.raises(ValueError, match=f"divides {CELLS}, got 7"):
            call(7)
