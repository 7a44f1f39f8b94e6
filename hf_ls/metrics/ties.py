"""Sums over groups of equal confidence, so that no metric depends on the order in which ties arrive.

Equal-mass bins, and the area under the risk-coverage curve; leading dimensions are independent resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ls.metrics.validation import Booleans, Floats, Integers

_HARMONIC_TABLE = 1 << 20  # 8 MB; beyond it the first terms of the expansion are exact to 1e-16


def tie_groups(confidence: Floats, correct: Booleans) -> tuple[Floats, Integers, Integers, Integers]:
    """Group equal confidences, ascending: (values [G], count [G], Σ correct [G], group of each row [n])."""
    values, group, count = np.unique(confidence, return_inverse=True, return_counts=True)
    return values, count, np.bincount(group[correct], minlength=values.size), group


def equal_mass_index(count: Integers, n_bins: int) -> Integers:
    """Return the equal-mass bin [.., G] of each group of equal confidence, ascending, from count [.., G].

    A group goes whole to bin floor(n_bins · midrank / n), where midrank is the centre of the ranks that it
    takes; integer arithmetic, so that no order of the input and no rounding can move it.
    """
    after = np.cumsum(count, axis=-1)
    n = after[..., -1:]
    return np.minimum(n_bins * (2 * after - count) // (2 * n), n_bins - 1)


def equal_mass_sums(count: Integers, confidence: Floats, correct: Integers, n_bins: int) -> tuple[Integers, Floats, Integers]:
    """Add up (count, Σ confidence, Σ correct) of ascending groups [.., G] per equal-mass bin [.., B]."""
    shape = (*count.shape[:-1], n_bins)
    index = equal_mass_index(count, n_bins).reshape(-1, count.shape[-1])
    cell = (index + n_bins * np.arange(len(index))[:, None]).ravel()

    def per_bin(values: NDArray[Any]) -> Floats:
        return np.bincount(cell, weights=values.ravel(), minlength=len(index) * n_bins).reshape(shape)

    # Counts stay far below 2**53, so that float64 sums of them are exact.
    return per_bin(count).astype(np.int64), per_bin(confidence), per_bin(correct).astype(np.int64)


def _harmonic(n: Integers) -> Floats:
    """Return the harmonic numbers H(n) = Σ_{i ≤ n} 1 / i, in memory which does not grow with n."""
    terms = np.arange(1, min(int(np.max(n)), _HARMONIC_TABLE) + 1)
    value = np.concatenate([[0.0], np.cumsum(1.0 / terms)])[np.minimum(n, terms.size)]
    large = n > _HARMONIC_TABLE
    x = n[large].astype(np.float64)
    value[large] = np.log(x) + np.euler_gamma + 1 / (2 * x) - 1 / (12 * x**2)
    return value


def aurc_from_groups(count: Integers, errors: Integers) -> Floats:
    """Return the AURC of groups of equal confidence in descending order: count, errors [.., G] -> [..].

    Within a group every order is equally likely, so the j-th member adds errors_g / count_g; the sum over j
    of (E + j·r) / (C + j) has the closed form r·c + (E − r·C)·(H(C + c) − H(C)) with harmonic numbers H.
    """
    after = np.cumsum(count, axis=-1)
    before = after - count
    errors_before = np.cumsum(errors, axis=-1) - errors
    rate = errors / np.maximum(count, 1)
    n = after[..., -1]
    area = errors + (errors_before - rate * before) * (_harmonic(after) - _harmonic(before))
    return area.sum(axis=-1) / n
