"""Calibration of any number of predictions in constant memory, mergeable across batches and processes.

Owns `StreamingCalibration`. Does not own the definitions of the metrics (`core`) nor any communication
between processes: gather the `state_dict()`s and add them up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_ls.metrics.core import CELLS, PredictionStatistics, bin_index
from hf_ls.metrics.ties import equal_mass_sums
from hf_ls.metrics.validation import check_confidence, check_count


class StreamingCalibration:
    """Counts and sums of predictions in 15·1024 cells of confidence (a, b], 369 kB whatever the number of
    rows.

    Cell edges are k / 15360 in float64, so that the cells of one of 15 (or any divisor of 15360) bins are
    exactly those of the direct definition, for confidences on an edge too.

    Attributes: count, correct: int64 [15360]; confidence: float64 [15360] sums; nll, brier: float sums.
    """

    def __init__(self) -> None:
        """Start with no predictions."""
        self.count = np.zeros(CELLS, dtype=np.int64)
        self.confidence = np.zeros(CELLS)
        self.correct = np.zeros(CELLS, dtype=np.int64)
        self.nll = 0.0
        self.brier = 0.0

    def __len__(self) -> int:
        """Return the number of predictions added so far."""
        return int(self.count.sum())

    def update(self, confidence: Any, correct: Any, nll: Any, brier: Any) -> None:
        """Add predictions: confidence [n] from 0 to 1, correct [n], nll [n] in nats, brier [n]; n may be 0.

        Raises:
            TypeError: not numeric.
            ValueError: different lengths, NaN, infinite nll, or confidence outside 0 to 1; nothing is then
            added.
        """
        nats, squares = np.asarray(nll, dtype=np.float64), np.asarray(brier, dtype=np.float64)
        shapes = {np.shape(confidence), np.shape(correct), nats.shape, squares.shape}
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
        self.confidence += np.bincount(cell, weights=values, minlength=CELLS)
        self.correct += np.bincount(cell[hits], minlength=CELLS)
        self.nll += float(nats.sum())
        self.brier += float(squares.sum())

    def update_statistics(self, stats: PredictionStatistics) -> None:
        """Add the predictions of one `PredictionStatistics`."""
        self.update(stats.confidence, stats.correct, stats.nll, stats.brier)

    def __add__(self, other: StreamingCalibration) -> StreamingCalibration:
        """Return the state of both sets of predictions together."""
        if not isinstance(other, StreamingCalibration):
            return NotImplemented
        merged = StreamingCalibration()
        for name in ("count", "confidence", "correct", "nll", "brier"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        return merged

    def compute(self, n_bins: int = 15) -> dict[str, float]:
        """Return n, nll (nats), brier (0 to 2), accuracy, ece, ece_equal_mass and signed_gap as Python
        numbers.

        `ece` equals the direct one up to summation order; `ece_equal_mass` treats confidences within one cell
        (1/15360 wide) as equal.

        Raises:
            ValueError: nothing was added yet, or n_bins does not divide 15360.
        """
        n_bins = check_count(n_bins, "n_bins")
        if CELLS % n_bins:
            raise ValueError(f"expected n_bins that divides {CELLS}, got {n_bins}; use for example 5, 10, 15, 20 or 30")
        n = len(self)
        if n == 0:
            raise ValueError("expected at least one prediction, got none; call update() first")
        gap = (self.confidence - self.correct).reshape(n_bins, -1).sum(axis=1)
        used = self.count > 0
        _, total, right = equal_mass_sums(self.count[used], self.confidence[used], self.correct[used], n_bins)
        return {
            "n": n,
            "nll": self.nll / n,
            "brier": self.brier / n,
            "accuracy": float(self.correct.sum() / n),
            "ece": float(np.abs(gap).sum() / n),
            "ece_equal_mass": float(np.abs(total - right).sum() / n),
            "signed_gap": float((self.confidence.sum() - self.correct.sum()) / n),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state as NumPy arrays and floats, additive across processes key by key."""
        return {
            "count": self.count.copy(),
            "confidence": self.confidence.copy(),
            "correct": self.correct.copy(),
            "nll": self.nll,
            "brier": self.brier,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> StreamingCalibration:
        """Rebuild a state from `state_dict()`.

        Raises:
            ValueError: keys or shapes differ from those of `state_dict()`.
        """
        restored = cls()
        if set(state) != set(restored.state_dict()):
            raise ValueError(
                f"expected the keys {sorted(restored.state_dict())}, got {sorted(state)}; pass a state_dict() unchanged"
            )
        for name in ("count", "confidence", "correct"):
            own = getattr(restored, name)
            given = np.asarray(state[name])
            if given.shape != own.shape:
                raise ValueError(f"expected {name} of shape [{CELLS}], got {list(given.shape)}; pass a state_dict() unchanged")
            own += given.astype(own.dtype)
        restored.nll, restored.brier = float(state["nll"]), float(state["brier"])
        return restored
