"""Temperature from sums alone: against the fit on all logits at once, in any split, and its refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest

from hf_ls.calibration import token_temperature as module
from hf_ls.calibration.temperature import NoFiniteTemperature, fit_temperature
from hf_ls.calibration.token_temperature import CrossFittedTemperature, TokenTemperature, temperature_curves


def sampled(n, num_classes, temperature=1.0, seed=0, scale=2.0, kind="normal"):
    """Logits with labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = {"normal": rng.normal, "heavy": lambda size: rng.standard_t(2, size)}[kind](size=(n, num_classes)) * scale
    return torch.tensor(logits), torch.tensor((logits / temperature + rng.gumbel(size=logits.shape)).argmax(1))


def fitted(logits, labels, cuts=()):
    state = TokenTemperature()
    for rows in np.split(np.arange(len(labels)), sorted(cuts)):
        state.update(logits[rows], labels[rows])
    return state.fit()


@settings(deadline=None, max_examples=80)
@given(
    n=st.sampled_from([3, 20, 300]),
    num_classes=st.sampled_from([2, 3, 30, 500]),
    log_scale=st.floats(-1, 2),
    log_temperature=st.floats(-1, 1),
    kind=st.sampled_from(["normal", "heavy"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_fit_on_all_logits(n, num_classes, log_scale, log_temperature, kind, seed):
    logits, labels = sampled(n, num_classes, 10**log_temperature, seed, 10**log_scale, kind)
    try:
        expected = fit_temperature(logits.numpy(), labels.numpy())
    except NoFiniteTemperature:
        expected = 0.0
    if 1 / 31 < expected < 31:
        assert fitted(logits, labels) == pytest.approx(expected, rel=1e-3)
    elif not 1 / 33 < expected < 33:
        with pytest.raises(NoFiniteTemperature):
            fitted(logits, labels)


@pytest.mark.parametrize("truth", [0.04, 0.3, 1.0, 2.0**0.25, 4.0, 25.0])
def test_large_samples_agree_much_better(truth):
    logits, labels = sampled(3000, 20, truth, scale=2 * truth)
    assert fitted(logits, labels) == pytest.approx(fit_temperature(logits.numpy(), labels.numpy()), rel=2e-5)


def test_sums_are_the_nll_and_its_derivatives():
    logits, labels = sampled(40, 7)
    state = TokenTemperature()
    state.update(logits, labels)
    assert len(state) == 40
    for beta, sums in zip(module._GRID, state.sums[3:].reshape(-1, 3), strict=True):
        b = torch.tensor(float(beta), dtype=torch.float64, requires_grad=True)
        nll = torch.nn.functional.cross_entropy(b * logits, labels, reduction="sum")
        (slope,) = torch.autograd.grad(nll, b, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, b)
        torch.testing.assert_close(sums, torch.stack([nll, slope, curvature]).detach(), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 200), max_size=5))
def test_no_split_into_batches_changes_the_result(cuts):
    logits, labels = sampled(200, 5, temperature=1.7)
    assert fitted(logits, labels, cuts) == pytest.approx(fitted(logits, labels), rel=1e-12)


def test_sums_of_two_processes_add_up():
    logits, labels = sampled(200, 5, temperature=1.7)
    first, second = TokenTemperature(), TokenTemperature()
    first.update(logits[:70], labels[:70])
    second.update(logits[70:], labels[70:])
    first.sums = first.sums + second.sums
    assert len(first) == 200
    assert first.fit() == pytest.approx(fitted(logits, labels), rel=1e-12)


def test_token_dimensions_and_ignored_labels():
    logits, labels = sampled(60, 5, temperature=1.7)
    padded = torch.cat([logits.reshape(4, 15, 5), torch.full((4, 3, 5), float("nan"), dtype=torch.float64)], 1)
    padded_labels = torch.cat([labels.reshape(4, 15), torch.full((4, 3), -100)], 1)
    state = TokenTemperature()
    state.update(padded, padded_labels)
    state.update(padded[:, 15:], padded_labels[:, 15:])
    state.update(logits[:0], labels[:0])
    assert len(state) == 60
    assert state.fit() == pytest.approx(fitted(logits, labels), rel=1e-12)


def test_half_precision_is_reduced_in_float64_and_inputs_stay_as_they_were():
    logits, labels = sampled(500, 50, temperature=1.5)
    half = logits.to(torch.bfloat16)
    before = half.clone()
    assert fitted(half, labels) == pytest.approx(fitted(half.double(), labels), rel=1e-13)
    assert half.equal(before)
    single = logits.clone()
    fitted(single, labels)
    assert single.equal(logits)


def test_masked_classes_do_not_matter():
    logits, labels = sampled(400, 3, temperature=1.5)
    padded = torch.cat([logits, torch.full((400, 2), float("-inf"))], 1)
    assert fitted(padded, labels) == pytest.approx(fitted(logits, labels), rel=1e-12)
    with pytest.raises(ValueError, match="must not be masked"):
        fitted(padded, torch.full((400,), 4))


def test_large_logits_do_not_overflow():
    logits, labels = sampled(300, 4, temperature=2.0)
    assert fitted(logits + 1e4, labels) == pytest.approx(fitted(logits, labels), rel=1e-8)
    far = torch.cat([logits, torch.full((300, 1), -1e5, dtype=torch.float64)], 1)
    assert fitted(far, labels) == pytest.approx(fitted(logits, labels), rel=1e-3)


def test_memory_does_not_grow_with_the_number_of_tokens(monkeypatch):
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", 4 * 1000)
    state = TokenTemperature()
    with Largest(torch.float64) as largest:
        state.update(torch.randn(2, 50, 1000), torch.randint(0, 1000, (2, 50)))
    assert largest.elements <= 3 * 4 * 1000
    assert len(state) == 100 and state.sums.numel() == 66


def test_perfectly_separated_and_uninformative_logits_have_no_temperature():
    logits, _ = sampled(100, 3)
    with pytest.raises(NoFiniteTemperature, match=r"misclassified.*larger validation split, or keep T = 1"):
        fitted(logits, logits.argmax(1))
    with pytest.raises(NoFiniteTemperature, match="no better than a uniform guess"):
        fitted(logits, logits.argmin(1))
    with pytest.raises(NoFiniteTemperature, match="no better than a uniform guess"):
        fitted(torch.ones(6, 3), torch.arange(6) % 3)


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_an_optimum_beyond_the_grid_is_refused(factor):
    logits, labels = sampled(200, 3)
    with pytest.raises(NoFiniteTemperature, match=r"between T = 0.03125 and 32, got one beyond; divide the logits"):
        fitted(logits * factor, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.eye(4), torch.tensor([0.0, 1, 2, 3]), TypeError, "integer labels"),
        (torch.eye(4), torch.tensor([0, 1]), ValueError, r"logits \[..., V\] and labels \[...\], got \[4, 4\] and \[2\]"),
        (torch.tensor(1.0), torch.tensor(1), ValueError, "align them"),
        (torch.eye(4), torch.tensor([0, 1, 2, 4]), ValueError, r"labels in \[0, 4\) or -100"),
        (torch.eye(4), torch.tensor([0, 1, 2, -1]), ValueError, r"labels in \[0, 4\) or -100"),
        (torch.full((4, 4), float("nan")), torch.arange(4), ValueError, "finite largest logit"),
        (torch.full((4, 4), float("inf")), torch.arange(4), ValueError, "finite largest logit"),
        (torch.full((4, 4), float("-inf")), torch.arange(4), ValueError, "finite largest logit"),
    ],
)
def test_wrong_batches_are_refused_whole(logits, labels, error, message):
    state = TokenTemperature()
    with pytest.raises(error, match=message):
        state.update(logits, labels)
    assert not state.sums.any()


def test_too_few_tokens_are_refused():
    state = TokenTemperature()
    with pytest.raises(ValueError, match="at least 2 tokens to fit a temperature, got 0"):
        state.fit()
    state.update(torch.eye(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="got 1"):
        state.fit()


def scored(n: int, k: int, seed: int = 0, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k))
    labels = np.array([rng.choice(k, p=np.exp(row) / np.exp(row).sum()) for row in z])
    return scale * z, labels


def mean_nll(z: np.ndarray, labels: np.ndarray) -> float:
    return float((np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), labels]).mean())


@pytest.mark.parametrize("temperature", [1 / 32, 0.3, 1.0, 1.7, 2.9, 32.0])
def test_nll_at_a_temperature(temperature):
    z, labels = scored(400, 7)
    sums = TokenTemperature()
    sums.update(torch.tensor(z), torch.tensor(labels))
    assert sums.nll(temperature) == pytest.approx(mean_nll(z / temperature, labels), abs=1e-5)


def test_curves_add_up_to_the_sums():
    z, labels = (torch.tensor(part) for part in scored(60, 5))
    labels[::7] = -100
    sums = TokenTemperature()
    sums.update(z, labels)
    curves = temperature_curves(z.reshape(12, 5, 5), labels.reshape(12, 5))
    torch.testing.assert_close(curves.sum((0, 1)), sums.sums, rtol=1e-12, atol=1e-12)
    assert not curves.reshape(60, -1)[::7].any()


def test_cross_fitted_nll_equals_fits_on_the_other_parts():
    z, labels = scored(203, 4, scale=4.0)
    crossed = CrossFittedTemperature(folds=5, seed=3)
    curves = temperature_curves(torch.tensor(z), torch.tensor(labels)).numpy()
    for start, stop in ((0, 1), (1, 8), (8, 8), (8, 120), (120, 203)):
        crossed.update(curves[start:stop])
    part = np.concatenate([np.random.default_rng((3, block)).permutation(5) for block in range(41)])[:203]
    total = 0.0
    for fold in range(5):
        here = part == fold
        total += here.sum() * mean_nll(z[here] / fit_temperature(z[~here], labels[~here]), labels[here])
    assert crossed.nll() == pytest.approx(total / 203, abs=1e-6)
    with pytest.raises(ValueError, match="examples which were kept"):
        crossed.by_example()
    kept = CrossFittedTemperature(folds=5, seed=3, keep=True)
    for start in range(0, 203, 29):
        kept.update(curves[start : start + 29])
    count, plain, by_example = kept.by_example()
    assert count.tolist() == [1.0] * 203 and plain.mean() == pytest.approx(mean_nll(z, labels), abs=1e-9)
    for fold in range(5):
        here = part == fold
        own = mean_nll(z[here] / fit_temperature(z[~here], labels[~here]), labels[here])
        assert by_example[here].mean() == pytest.approx(own, abs=1e-6)
    assert by_example.mean() == pytest.approx(crossed.nll(), abs=1e-12)
    assert mean_nll(z / fit_temperature(z, labels), labels) < crossed.nll() < mean_nll(z, labels)


def test_cross_fitting_keeps_t_1_where_the_others_have_none_and_says_nothing_of_too_few():
    z, labels = np.tile([[4.0, 0.0]], (25, 1)), np.zeros(25, dtype=np.int64)
    crossed = CrossFittedTemperature()
    crossed.update(temperature_curves(torch.tensor(z[:4]), torch.tensor(labels[:4])).numpy())
    assert crossed.nll() is None
    crossed.update(temperature_curves(torch.tensor(z[4:]), torch.tensor(labels[4:])).numpy())
    assert crossed.nll() == pytest.approx(mean_nll(z, labels), abs=1e-6)
