"""What is made of the predictions of one cell: cross-fitted temperature, which ε is clearly worse."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ls.compare.cells import Cell
from hf_ls.compare.results import Predictions, clearly_worse


def predictions(epsilon, scale, shift=0.0, n=600, seed=0):
    """Logits of a calibrated model over 4 classes, times `scale`; `shift` makes it worse."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, 4)) * 2
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    labels = np.array([random.choice(4, p=row) for row in p])
    z = scale * (z + shift * random.normal(size=z.shape))
    return Predictions(
        Cell("smoothed", "smoothed_ce", None, epsilon, seed), {"validation": z, "test": z}, {"validation": labels, "test": labels}
    )


def test_the_cross_fitted_nll_is_no_optimist():
    found = predictions(0.1, 3.0)
    raw, crossed = found.nll(tempered=False), found.nll(tempered=True)
    tempered = found.results()[1]
    assert tempered.temperature == pytest.approx(3.0, rel=0.15)
    fitted_on_itself = tempered.statistics["test"].nll.mean()  # here test is validation
    assert fitted_on_itself < crossed.mean() < raw.mean()
    assert tempered.validation_nll == crossed.mean() and found.results()[0].validation_nll == raw.mean()


def test_no_finite_temperature_leaves_the_logits_alone():
    found = predictions(0.1, 1.0)
    right = {name: 9.0 * np.eye(4)[labels] for name, labels in found.labels.items()}
    raw, tempered = Predictions(found.cell, right, found.labels).results()
    assert tempered.temperature == 1.0 and tempered.validation_nll == raw.validation_nll


def test_only_what_is_clearly_worse_is_dropped():
    """0.3 is over-confident too, but a temperature mends that; 0.2 is worse in itself."""
    found = {
        0.0: [predictions(0.0, 1.0)],
        0.1: [predictions(0.1, 1.0, 0.02)],
        0.2: [predictions(0.2, 1.0, 1.0)],
        0.3: [predictions(0.3, 4.0)],
    }
    dropped = clearly_worse(found)
    assert list(dropped) == [0.2]
    assert 0 < dropped[0.2][1] < dropped[0.2][0]


def test_the_best_epsilon_above_0_is_never_dropped():
    found = {0.0: [predictions(0.0, 1.0)], 0.1: [predictions(0.1, 1.0, 1.0)], 0.2: [predictions(0.2, 1.0, 2.0)]}
    assert list(clearly_worse(found)) == [0.2]
