"""How far a finite sample can be trusted: bootstrap and Wilson intervals, and what calibration looks like.

Owns everything that resamples. Does not own the definitions of the metrics (`core`). Every function is a pure
function of its arguments and `seed`; memory stays bounded for any n and number of repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_ls.metrics.core import CELLS, PredictionStatistics, bin_index, row_chunks
from hf_ls.metrics.ties import aurc_from_groups, equal_mass_index, equal_mass_sums, tie_groups
from hf_ls.metrics.validation import Floats, Integers, check_confidence, check_count

STATISTICS = ("accuracy", "nll", "brier", "signed_gap", "aurc", "ece", "ece_equal_mass")


def _check_level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"expected level between 0 and 1, got {level}; 0.95 is usual")
    return float(level)


def wilson_interval(successes: Any, n: Any, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the Wilson score interval (low, high) of the proportion successes / n; arrays broadcast.

    (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n). n = 0 gives (0, 1): no information.
    Source: Wilson 1927.

    Raises:
        ValueError: successes outside 0 to n, or level outside 0 to 1.
    """
    hits, size = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64))
    if not ((hits >= 0) & (hits <= size)).all():
        raise ValueError("expected 0 <= successes <= n, got counts outside; give the number correct and the number in all")
    z2 = NormalDist().inv_cdf(0.5 + _check_level(level) / 2) ** 2
    centre = hits + z2 / 2
    spread = np.sqrt(z2) * np.sqrt(hits * (size - hits) / np.maximum(size, 1.0) + z2 / 4)
    # At 0 and n the ends are 0 and 1 exactly; rounding must not pass them.
    return np.maximum((centre - spread) / (size + z2), 0.0), np.minimum((centre + spread) / (size + z2), 1.0)


def _calibrated_hits(confidence: Floats, index: Integers, n_bins: int, repetitions: int, seed: int) -> Integers:
    """Draw correct_i ~ Bernoulli(confidence_i) and return the hits per bin [repetitions, n_bins].

    Draws one binomial per (bin, cell of width 1/15360): within a cell the probabilities differ so little
    that the variance is off by a factor below 1 + 1e-4, and the cost no longer grows with n.
    """
    key, group, count = np.unique(index * CELLS + bin_index(confidence, CELLS), return_inverse=True, return_counts=True)
    p = np.minimum(np.bincount(group, weights=confidence) / count, 1.0)
    used, starts = np.unique(key // CELLS, return_index=True)
    hits = np.zeros((repetitions, n_bins), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for rows in row_chunks(repetitions, key.size):
        draws = rng.binomial(count, p, size=(rows.stop - rows.start, key.size))
        hits[rows, used] = np.add.reduceat(draws, starts, axis=1)
    return hits


def _null_distribution(confidence: Floats, index: Integers, n_bins: int, repetitions: int, seed: int) -> Floats:
    """Return `repetitions` values that the ECE over the bins `index` takes when calibration is perfect."""
    total = np.bincount(index, weights=confidence, minlength=n_bins)
    hits = _calibrated_hits(confidence, index, n_bins, repetitions, seed)
    return np.abs(total - hits).sum(axis=1) / confidence.size


def null_ece(confidence: Any, n_bins: int = 15, repetitions: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return (mean, 95 % quantile) of the ECE of a perfectly calibrated model with this confidence [n].

    Outcomes are resampled as correct_i ~ Bernoulli(confidence_i). An ECE below the quantile is consistent
    with perfect calibration at the 5 % level. Source: Bröcker and Smith 2007; Vaicenavicius et al. 2019.
    """
    values = check_confidence(confidence, np.zeros(np.shape(confidence), dtype=bool))[0]
    n_bins, repetitions = check_count(n_bins, "n_bins"), check_count(repetitions, "repetitions")
    draws = _null_distribution(values, bin_index(values, n_bins), n_bins, repetitions, seed)
    return float(draws.mean()), float(np.quantile(draws, 0.95))


def consistency_band(
    confidence: Any, n_bins: int = 15, repetitions: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Floats, Floats]:
    """Return the (low [B], high [B]) accuracy per equal-width bin that perfect calibration would show.

    Central interval at `level`, keeping the confidences and resampling outcomes from them; NaN in an empty
    bin. Source: Bröcker and Smith 2007.
    """
    values = check_confidence(confidence, np.zeros(np.shape(confidence), dtype=bool))[0]
    n_bins, repetitions = check_count(n_bins, "n_bins"), check_count(repetitions, "repetitions")
    tail = (1.0 - _check_level(level)) / 2
    index = bin_index(values, n_bins)
    count = np.bincount(index, minlength=n_bins)
    hits = _calibrated_hits(values, index, n_bins, repetitions, seed)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the documented NaN
        low, high = np.quantile(hits, [tail, 1.0 - tail], axis=0) / count
    return low, high


def _statistic_of_rows(statistic: str, stats: PredictionStatistics, n_bins: int) -> Callable[[Integers], Floats]:
    """Return the function from row indices [r, n] of r resamples to the statistic of each [r]."""
    n = len(stats)
    if statistic in ("accuracy", "nll", "brier", "signed_gap"):
        values = {
            "accuracy": stats.correct.astype(np.float64),
            "nll": stats.nll,
            "brier": stats.brier,
            "signed_gap": stats.confidence - stats.correct,
        }[statistic]
        return lambda rows: values[rows].mean(axis=1)

    if statistic == "ece":
        index, gap = bin_index(stats.confidence, n_bins), stats.confidence - stats.correct

        def binned(rows: Integers) -> Floats:
            cell = (index[rows] + n_bins * np.arange(len(rows))[:, None]).ravel()
            sums = np.bincount(cell, weights=gap[rows].ravel(), minlength=len(rows) * n_bins)
            return np.abs(sums).reshape(len(rows), n_bins).sum(axis=1) / n

        return binned

    level, _, _, group = tie_groups(stats.confidence, stats.correct)

    def grouped(rows: Integers) -> Floats:
        """Count per group of equal confidence [r, G]: sorting once serves every resample."""
        size = len(rows) * level.size
        cell = (group[rows] + level.size * np.arange(len(rows))[:, None]).ravel()
        count = np.bincount(cell, minlength=size).reshape(len(rows), -1)
        right = np.bincount(cell[stats.correct[rows].ravel()], minlength=size).reshape(len(rows), -1)
        if statistic == "aurc":
            return aurc_from_groups(count[:, ::-1], (count - right)[:, ::-1])
        _, total, hits = equal_mass_sums(count, level * count, right, n_bins)
        return np.abs(total - hits).sum(axis=1) / n

    return grouped


def bootstrap_interval(
    statistic: str,
    stats: PredictionStatistics,
    *,
    n_bins: int = 15,
    repetitions: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a bootstrap interval (low, high) for one of `STATISTICS`, resampling rows with replacement.

    Percentile interval for accuracy, nll, brier, signed_gap and aurc. For `ece` and `ece_equal_mass`, which
    are biased upward, the basic interval (2·value − q_high, 2·value − q_low) clipped at 0, and low = 0
    whenever the value is consistent with perfect calibration at `level` (the test of `null_ece`), because the
    percentile interval would never cover a true ECE of 0. It is an interval for the true error, so that it
    may lie below the biased value.

    Raises:
        ValueError: unknown statistic, infinite nll, or level outside 0 to 1.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"expected a statistic of {', '.join(STATISTICS)}, got {statistic!r}; no other has a sound one")
    if statistic == "nll" and not np.isfinite(stats.nll).all():
        raise ValueError("expected finite nll, got inf; build the statistics from logits rather than probabilities")
    n, n_bins, level = len(stats), check_count(n_bins, "n_bins"), _check_level(level)
    resample = _statistic_of_rows(statistic, stats, n_bins)
    rng = np.random.default_rng(seed)
    values = np.empty(check_count(repetitions, "repetitions"))
    for rows in row_chunks(values.size, n):
        values[rows] = resample(rng.integers(0, n, size=(rows.stop - rows.start, n)))
    low, high = (float(q) for q in np.quantile(values, [(1.0 - level) / 2, (1.0 + level) / 2]))
    if not statistic.startswith("ece"):
        return low, high

    value = float(resample(np.arange(n)[None, :])[0])
    index = bin_index(stats.confidence, n_bins)
    if statistic == "ece_equal_mass":
        _, count, _, group = tie_groups(stats.confidence, stats.correct)
        index = equal_mass_index(count, n_bins)[group]
    null = _null_distribution(stats.confidence, index, n_bins, values.size, seed)
    consistent = value <= np.quantile(null, level)
    return 0.0 if consistent else max(0.0, 2 * value - high), max(0.0, 2 * value - low)
