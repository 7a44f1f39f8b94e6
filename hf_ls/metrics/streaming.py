"""Calibration of any number of predictions in constant memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_ls.metrics.core import CELLS, ReliabilityBins, bin_edges, bin_index
from hf_ls.metrics.ties import equal_mass_sums
from hf_ls.metrics.validation import Floats, as_array, check_confidence, check_count

# What is added up is the distance from here, at most 1/30720: rounding then stays below 1e-13 of the ECE at 1e7 equal
# confidences, in batches of any size. 0 for the first cell makes every difference exact.
_CENTRES = np.concatenate([[0.0], (np.arange(1, CELLS) + 0.5) / CELLS])


def check_bins(n_bins: int) -> int:
    """Return `n_bins` as an int whose bins are unions of cells.

    Raises:
        TypeError, ValueError: not an integer of at least 1 that divides 15360.
    """
    n_bins = check_count(n_bins, "n_bins")
    if CELLS % n_bins:
        raise ValueError(f"expected n_bins that divides {CELLS}, got {n_bins}; use for example 5, 10, 15, 20 or 30")
    return n_bins


class StreamingCalibration:
    """Counts and sums of predictions in 15·1024 cells of confidence (a, b], 369 kB whatever the number of
    rows.

    Cell edges are k / 15360 in float64, so that the cells of one of 15 (or any divisor of 15360) bins are
    exactly those of the direct definition, for confidences on an edge too.

    Attributes: count, correct: int64 [15360]; offset: float64 [15360] sums of confidence less the cell's centre;
    nll, brier: float sums.
    """

    def __init__(self) -> None:
        """Start with no predictions."""
        self.count = np.zeros(CELLS, dtype=np.int64)
        self.offset = np.zeros(CELLS)
        self.correct = np.zeros(CELLS, dtype=np.int64)
        self.nll = 0.0
        self.brier = 0.0

    def __len__(self) -> int:
        """Return the number of predictions added so far."""
        return int(self.count.sum())

    @property
    def confidence(self) -> Floats:
        """The sums of confidence per cell, float64 [15360]."""
        return self.count * _CENTRES + self.offset

    def update(self, confidence: Any, correct: Any, nll: Any, brier: Any) -> None:
        """Add predictions: confidence [n] from 0 to 1, correct [n], nll [n] in nats, brier [n]; n may be 0.

        Raises:
            TypeError: not numeric.
            ValueError: different lengths, NaN, infinite nll, or confidence outside 0 to 1; nothing is then
            added.
        """
        confidence, correct = as_array(confidence), as_array(correct)
        nats, squares = as_array(nll).astype(np.float64), as_array(brier).astype(np.float64)
        shapes = {confidence.shape, correct.shape, nats.shape, squares.shape}
        if len(shapes) != 1 or nats.ndim != 1:
            raise ValueError(
                f"expected confidence, correct, nll and brier of one shape [n], "
                f"got {sorted(map(list, shapes))}; "
                "flatten the token dimension and drop ignored positions from all four"
            )
        if nats.size == 0:
            return
        values, hits = check_confidence(confidence, correct)
        if not (np.isfinite(nats).all() and np.isfinite(squares).all()):
            raise ValueError(
                "expected finite nll and brier, got NaN or inf; compute them from logits, "
                "since a probability that was rounded to 0 has no finite logarithm"
            )
        cell = bin_index(values, CELLS)
        self.count += np.bincount(cell, minlength=CELLS)
        np.add.at(self.offset, cell, values - _CENTRES[cell])  # one by one, so that no split into batches can be seen
        self.correct += np.bincount(cell[hits], minlength=CELLS)
        self.nll += float(nats.sum())
        self.brier += float(squares.sum())

    def compute(self, n_bins: int = 15) -> dict[str, float]:
        """Return n, nll (nats), brier (0 to 2), accuracy, ece, ece_equal_mass and signed_gap as Python
        numbers.

        `ece` equals the direct one up to summation order; `ece_equal_mass` treats confidences within one cell
        (1/15360 wide) as equal.

        Raises:
            ValueError: nothing was added yet, or n_bins does not divide 15360.
        """
        n_bins, n = check_bins(n_bins), len(self)
        if n == 0:
            raise ValueError("expected at least one prediction, got none; call update() first")
        confidence, used = self.confidence, self.count > 0
        gap = (confidence - self.correct).reshape(n_bins, -1).sum(axis=1)
        _, total, right = equal_mass_sums(self.count[used], confidence[used], self.correct[used], n_bins)
        return {
            "n": n,
            "nll": self.nll / n,
            "brier": self.brier / n,
            "accuracy": float(self.correct.sum() / n),
            "ece": float(np.abs(gap).sum() / n),
            "ece_equal_mass": float(np.abs(total - right).sum() / n),
            "signed_gap": float((confidence.sum() - self.correct.sum()) / n),
        }

    def reliability_bins(self, n_bins: int = 15) -> ReliabilityBins:
        """Return what `core.reliability_bins` gives for the same predictions, NaN means where a bin is empty.

        Raises:
            ValueError: n_bins does not divide 15360.
        """
        n_bins = check_bins(n_bins)
        count, confidence, correct = (
            cells.reshape(n_bins, -1).sum(axis=1) for cells in (self.count, self.confidence, self.correct)
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the documented NaN
            return ReliabilityBins(bin_edges(n_bins), count, confidence / count, correct / count)
