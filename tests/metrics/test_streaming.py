"""Streaming statistics reproduce the direct metrics exactly, whatever the batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ls.metrics import PredictionStatistics, StreamingCalibration, ece, ece_equal_mass, signed_gap
from hf_ls.metrics.core import CELLS, bin_edges


def statistics(n=2000, num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return PredictionStatistics.from_logits(rng.normal(size=(n, num_classes)) * 2, rng.integers(0, num_classes, n))


def streamed(stats, sizes):
    state = StreamingCalibration()
    for part in np.split(np.arange(len(stats)), np.cumsum(sizes)[:-1]):
        state.update(stats.confidence[part], stats.correct[part], stats.nll[part], stats.brier[part])
    return state


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 100))
def test_any_split_into_batches_gives_the_whole(cuts, seed):
    stats = statistics(300, seed=seed)
    bounds = [0, *sorted(cuts), 300]
    result = streamed(stats, np.diff(bounds)).compute()
    assert result["n"] == 300
    assert result["nll"] == pytest.approx(stats.nll.mean(), rel=1e-12)
    assert result["brier"] == pytest.approx(stats.brier.mean(), rel=1e-12)
    assert result["accuracy"] == stats.correct.mean()
    assert result["ece"] == pytest.approx(ece(stats.confidence, stats.correct), abs=1e-13)
    assert result["signed_gap"] == pytest.approx(signed_gap(stats.confidence, stats.correct), abs=1e-13)


@pytest.mark.parametrize("n_bins", [1, 3, 5, 10, 15, 20, 15 * 1024])
def test_coarse_bins_are_unions_of_cells_for_confidences_on_edges_too(n_bins):
    rng = np.random.default_rng(n_bins)
    cells = bin_edges(CELLS)
    np.testing.assert_array_equal(cells[:: CELLS // n_bins], bin_edges(n_bins))
    near = np.concatenate([bin_edges(15), bin_edges(20), cells])
    near = np.concatenate([near, np.nextafter(near, 2), np.nextafter(near, -1)])
    confidence = rng.choice(near[(near >= 0) & (near <= 1)], 20_000)
    correct = rng.random(confidence.size) < confidence**2
    state = StreamingCalibration()
    state.update(confidence, correct, np.ones(confidence.size), np.ones(confidence.size))
    assert state.compute(n_bins)["ece"] == pytest.approx(ece(confidence, correct, n_bins), abs=1e-13)


def test_equal_mass_is_exact_where_cells_hold_one_confidence_and_close_otherwise():
    rng = np.random.default_rng(0)
    confidence = rng.choice((np.arange(CELLS) + 0.5) / CELLS, 5000)
    correct = rng.random(5000) < confidence - 0.1
    state = StreamingCalibration()
    state.update(confidence, correct, np.ones(5000), np.ones(5000))
    assert state.compute()["ece_equal_mass"] == pytest.approx(ece_equal_mass(confidence, correct), abs=1e-13)
    stats = statistics(20_000)
    direct = ece_equal_mass(stats.confidence, stats.correct)
    assert streamed(stats, [20_000]).compute()["ece_equal_mass"] == pytest.approx(direct, abs=2e-4)


def test_memory_is_constant():
    state = streamed(statistics(10_000), [10_000])
    arrays = [value for value in vars(state).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 3 * 8 * CELLS == 368_640


def test_results_are_python_numbers():
    assert {type(value) for value in streamed(statistics(50), [50]).compute().values()} == {int, float}


def test_an_empty_batch_adds_nothing_and_an_empty_state_has_no_result():
    state = StreamingCalibration()
    state.update(np.empty(0), np.empty(0, dtype=bool), np.empty(0), np.empty(0))
    assert len(state) == 0
    with pytest.raises(ValueError, match="at least one prediction"):
        state.compute()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (([0.5, 0.5], [True], [1.0], [1.0]), "one shape"),
        (([[0.5]], [[True]], [[1.0]], [[1.0]]), "one shape"),
        (([float("nan")], [True], [1.0], [1.0]), "from 0 to 1"),
        (([1.2], [True], [1.0], [1.0]), "from 0 to 1"),
        (([0.5], [True], [float("inf")], [1.0]), "finite nll"),
        (([0.5], [True], [1.0], [float("nan")]), "finite nll"),
        (([0.5], [3], [1.0], [1.0]), "True and False"),
    ],
)
def test_wrong_batches_are_refused_whole(batch, message):
    state = StreamingCalibration()
    with pytest.raises(ValueError, match=message):
        state.update(*batch)
    assert len(state) == 0 and state.nll == 0.0


def test_bins_which_do_not_divide_the_cells_are_refused():
    with pytest.raises(ValueError, match="divides 15360, got 7"):
        streamed(statistics(10), [10]).compute(7)
