"""How far a finite sample can be trusted: bootstrap and Wilson intervals, and the ECE which a calibrated model shows.

Each function depends on its arguments and `seed` alone; memory stays bounded for any n and number of repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_ls.metrics.core import PredictionStatistics, bin_index, row_chunks
from hf_ls.metrics.ties import aurc_from_groups, equal_mass_index, tie_groups
from hf_ls.metrics.validation import Floats, Integers, as_array, check_confidence, check_count

STATISTICS = ("accuracy", "nll", "brier", "signed_gap", "aurc", "ece", "ece_equal_mass")
_DRAWN = 960  # cells of confidence, each with one binomial draw


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
    hits, size = np.broadcast_arrays(as_array(successes).astype(np.float64), as_array(n).astype(np.float64))
    if not ((hits >= 0) & (hits <= size)).all():
        bad = np.argmin(np.minimum(hits, size - hits))  # NaN first
        raise ValueError(
            f"expected 0 <= successes <= n, got {hits.flat[bad]:g} of {size.flat[bad]:g}; give the number correct and the number "
            "in all"
        )
    z2 = NormalDist().inv_cdf(0.5 + _check_level(level) / 2) ** 2
    centre = hits + z2 / 2
    spread = np.sqrt(z2) * np.sqrt(hits * (size - hits) / np.maximum(size, 1.0) + z2 / 4)
    # At 0 and n the ends are 0 and 1 exactly; rounding must not pass them.
    return np.maximum((centre - spread) / (size + z2), 0.0), np.minimum((centre + spread) / (size + z2), 1.0)


def calibrated_hits(count: Integers, p: Floats, index: Integers, n_bins: int, repetitions: int, seed: int) -> Integers:
    """Draw the hits per bin [repetitions, n_bins] of a calibrated model, from cells [C] of similar confidence.

    hits of a cell ~ Binomial(count, p), where count > 0 and p is its mean confidence, added up over the cells of each
    bin; the bin of each cell, index [C], ascends.
    """
    used, starts = np.unique(index, return_index=True)
    hits = np.zeros((repetitions, n_bins), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for rows in row_chunks(repetitions, count.size):
        draws = rng.binomial(count, p, size=(rows.stop - rows.start, count.size))
        hits[rows, used] = np.add.reduceat(draws, starts, axis=1)
    return hits


def _calibrated_hits(confidence: Floats, index: Integers, n_bins: int, repetitions: int, seed: int) -> Integers:
    """Draw correct_i ~ Bernoulli(confidence_i) and return the hits per bin [repetitions, n_bins].

    Draws one binomial per (bin, cell of width 1/960): within a cell the probabilities differ so little that the variance
    is off by a factor below 1 + 1/960, and the cost no longer grows with n.
    """
    key, group, count = np.unique(index * _DRAWN + bin_index(confidence, _DRAWN), return_inverse=True, return_counts=True)
    p = np.minimum(np.bincount(group, weights=confidence) / count, 1.0)
    return calibrated_hits(count, p, key // _DRAWN, n_bins, repetitions, seed)


def null_gaps(confidence: Floats, index: Integers, n_bins: int, repetitions: int, seed: int) -> Floats:
    """Draw the sum of confidence − correct over n of each bin [repetitions, n_bins] when calibration is perfect."""
    total = np.bincount(index, weights=confidence, minlength=n_bins)
    return (total - _calibrated_hits(confidence, index, n_bins, repetitions, seed)) / confidence.size


def null_ece(confidence: Any, n_bins: int = 15, repetitions: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return (mean, 95 % quantile) of the ECE of a perfectly calibrated model with this confidence [n].

    Outcomes are resampled as correct_i ~ Bernoulli(confidence_i). An ECE below the quantile is consistent
    with perfect calibration at the 5 % level. Source: Bröcker and Smith 2007; Vaicenavicius et al. 2019.
    """
    values = check_confidence(confidence, np.zeros(as_array(confidence).shape, dtype=bool))[0]
    n_bins, repetitions = check_count(n_bins, "n_bins"), check_count(repetitions, "repetitions")
    draws = np.abs(null_gaps(values, bin_index(values, n_bins), n_bins, repetitions, seed)).sum(axis=1)
    return float(draws.mean()), float(np.quantile(draws, 0.95))


def consistency_band(
    confidence: Any, n_bins: int = 15, repetitions: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Floats, Floats]:
    """Return the (low [B], high [B]) accuracy per equal-width bin that perfect calibration would show.

    Central interval at `level`, keeping the confidences and resampling outcomes from them; NaN in an empty
    bin. Source: Bröcker and Smith 2007.
    """
    values = check_confidence(confidence, np.zeros(as_array(confidence).shape, dtype=bool))[0]
    n_bins, repetitions = check_count(n_bins, "n_bins"), check_count(repetitions, "repetitions")
    tail = (1.0 - _check_level(level)) / 2
    index = bin_index(values, n_bins)
    count = np.bincount(index, minlength=n_bins)
    hits = _calibrated_hits(values, index, n_bins, repetitions, seed)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the documented NaN
        low, high = np.quantile(hits, [tail, 1.0 - tail], axis=0) / count
    return low, high


def _tail_above(distance: float, alpha: float) -> float:
    """Return the share of `alpha` that lies above the acceptance region of a mean `distance` ≥ 0 from the boundary.

    The likelihood-ratio region of x ~ N(distance, 1) with a mean known to be at least 0: all of `alpha` at 0, where an x
    too small speaks against no mean at all, and half of it from the two-sided quantile on. Source: Feldman and Cousins
    1998.
    """
    normal = NormalDist()
    if distance >= normal.inv_cdf(1.0 - alpha / 2):
        return alpha / 2
    low, high = alpha / 2, alpha
    for _ in range(40):
        above = (low + high) / 2
        z = normal.inv_cdf(1.0 - above)
        below = normal.cdf(-(distance**2 + z**2) / (2 * distance)) if distance > 0 else 0.0
        low, high = (low, above) if above + below > alpha else (above, high)
    return low


def _directions(gap: Floats, variance: Floats, share: Floats, repetitions: int, seed: int) -> Floats:
    """Draw how the true gap may be spread over the bins [R, B], as signed shares whose absolute values add up to 1.

    Empirical Bayes: the mean gap of each bin, gap / share, is drawn from its posterior: it lies towards the mean gap of
    all bins by as much as its own sampling variance, against the variance between bins of DerSimonian and Laird 1986, makes
    likely. The observed gaps themselves would spread the error too unevenly, because noise is uneven.
    """
    used = share > 0
    level, noise = gap[used] / share[used], np.maximum(variance[used] / share[used] ** 2, 1e-12)
    weight = 1.0 / noise
    centre = (weight * level).sum() / weight.sum()
    spare = weight.sum() - (weight**2).sum() / weight.sum()
    excess = (weight * (level - centre) ** 2).sum() - (used.sum() - 1)
    between = max(0.0, float(excess / spare)) if spare > 1e-9 * weight.sum() else 0.0
    weight = 1.0 / (noise + between)
    centre, of_centre = (weight * level).sum() / weight.sum(), 1.0 / weight.sum()
    kept = between / (between + noise)
    z = np.random.default_rng((seed, 1)).standard_normal((repetitions, 1 + int(used.sum())))
    draws = (1.0 - kept) * (centre + np.sqrt(of_centre) * z[:, :1]) + kept * level + np.sqrt(kept * noise) * z[:, 1:]
    directions = np.zeros((repetitions, gap.size))
    directions[:, used] = share[used] * draws
    return directions / np.abs(directions).sum(axis=1, keepdims=True)


def ece_interval(
    gap: Floats, share: Floats, noise: Floats, null: Floats, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return an interval (low, high) for the true binned calibration error Σ_b |γ_b|, where γ_b = E[(c − a)·1[bin b]].

    gap: estimates of γ [B], mean confidence − correct over all rows, 0 for the rows of other bins. share: of rows per bin
    [B]. noise: draws [R, B] of the sampling error of gap. null: draws [R, B] of gap when calibration is perfect.

    Σ|gap_b| is biased upward, most where the true error is small, so no interval around it covers. Instead a test is
    inverted over one parameter: the error θ spread over the bins as `_directions` finds likely. θ belongs to the
    interval if Σ|gap_b| is not in the tails of Σ|θ·direction_b + error_b|. The error is `noise`; where `null` is the wider
    one, as below an under-confident model, its variance goes from that of `null` at θ = 0 to that of `noise` at the observed
    value. θ = 0 is tested against `null` with the whole of 1 − level above; for the tails near 0 see `_tail_above`.
    """
    alpha = 1.0 - _check_level(level)
    value = float(np.abs(gap).sum())
    null_values = np.abs(null).sum(axis=1)
    if value == 0.0 and not null_values.any():  # certain and always right
        return 0.0, 0.0
    directions = _directions(gap, (noise.var(axis=0) + null.var(axis=0)) / 2, share, len(noise), seed)
    consistent = value <= np.quantile(null_values, level)
    widest = value + 5.0 * float(np.sqrt((noise**2).sum(axis=1).mean())) + float(null_values.mean())

    falling = value > 0 and bool((null**2).sum() > (noise**2).sum())

    def slack(theta: float) -> float:
        """Return by how far the value lies inside the region of θ; below 0 outside."""
        part = min(1.0, theta / value) if falling else 1.0
        error = np.sqrt(1.0 - part) * null + np.sqrt(part) * noise
        draws = np.abs(theta * directions + error).sum(axis=1)
        spread = float(draws.std())
        distance = (float(draws.mean()) - float(null_values.mean())) / spread if spread > 0 else np.inf
        above = _tail_above(max(0.0, distance), alpha)
        low, high = np.quantile(draws, [alpha - above, 1.0 - above])
        return float(min(value - low if alpha - above > 1e-4 else np.inf, high - value))

    grid = np.linspace(0.0, widest, 49)
    slacks = np.array([slack(theta) for theta in grid])
    inside = np.flatnonzero(slacks >= 0)
    if not inside.size:  # less wide than the grid: nothing to resolve
        return (0.0 if consistent else value), value

    def crossing(outside: int, within: int) -> float:
        part = slacks[within] / (slacks[within] - slacks[outside])
        return float(grid[within] + part * (grid[outside] - grid[within]))

    first, last = int(inside[0]), int(inside[-1])
    low = 0.0 if consistent or first == 0 else crossing(first - 1, first)
    return low, float(grid[last]) if last + 1 == grid.size else crossing(last + 1, last)


def _gap_moments(stats: PredictionStatistics, index: Integers, n_bins: int) -> tuple[Floats, Floats, Floats]:
    """Return gap [B], share of rows [B], and the covariance [B, B] of gap over samples of this size."""
    n, difference = len(stats), stats.confidence - stats.correct
    count = np.bincount(index, minlength=n_bins)
    gap = np.bincount(index, weights=difference, minlength=n_bins) / n
    square = np.bincount(index, weights=difference**2, minlength=n_bins) / n
    share = count / n
    mean = gap / np.maximum(share, 1e-300)
    within = np.maximum(square - share * mean**2, 0.0) * count / np.maximum(count - 1, 1)
    return gap, share, (np.diag(within + share * mean**2) - np.outer(gap, gap)) / n


def _statistic_of_rows(statistic: str, stats: PredictionStatistics) -> Callable[[Integers], Floats]:
    """Return the function from row indices [r, n] of r resamples to the statistic of each [r]."""
    if statistic in ("accuracy", "nll", "brier", "signed_gap"):
        values = {
            "accuracy": stats.correct.astype(np.float64),
            "nll": stats.nll,
            "brier": stats.brier,
            "signed_gap": stats.confidence - stats.correct,
        }[statistic]
        return lambda rows: values[rows].mean(axis=1)

    level, _, _, group = tie_groups(stats.confidence, stats.correct)

    def grouped(rows: Integers) -> Floats:
        """Count per group of equal confidence [r, G]: sorting once serves every resample."""
        size = len(rows) * level.size
        cell = (group[rows] + level.size * np.arange(len(rows))[:, None]).ravel()
        count = np.bincount(cell, minlength=size).reshape(len(rows), -1)
        right = np.bincount(cell[stats.correct[rows].ravel()], minlength=size).reshape(len(rows), -1)
        return aurc_from_groups(count[:, ::-1], (count - right)[:, ::-1])

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
    """Return an interval (low, high) for the true value of one of `STATISTICS`, over samples of rows like these.

    Percentile bootstrap interval for accuracy, nll, brier, signed_gap and aurc, resampling rows with replacement. For
    `ece` and `ece_equal_mass` that of `ece_interval`, which simulates the sums per bin and inverts a test: these are
    biased upward, so that the interval is one for the true error over the same bins (of equal mass: the bins of this
    sample) and may lie below the value. Its low end is 0 whenever the value is consistent with perfect calibration at
    `level`, the test of `null_ece`.

    Raises:
        ValueError: unknown statistic, infinite nll, or level outside 0 to 1.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"expected a statistic of {', '.join(STATISTICS)}, got {statistic!r}; no other has a sound one")
    if statistic == "nll" and not np.isfinite(stats.nll).all():
        raise ValueError("expected finite nll, got inf; build the statistics from logits rather than probabilities")
    n, n_bins, level = len(stats), check_count(n_bins, "n_bins"), _check_level(level)
    rng, repetitions = np.random.default_rng(seed), check_count(repetitions, "repetitions")
    if statistic.startswith("ece"):
        index = bin_index(stats.confidence, n_bins)
        if statistic == "ece_equal_mass":
            _, count, _, group = tie_groups(stats.confidence, stats.correct)
            index = equal_mass_index(count, n_bins)[group]
        gap, share, covariance = _gap_moments(stats, index, n_bins)
        noise = rng.multivariate_normal(np.zeros(n_bins), covariance, size=repetitions, method="eigh")
        null = null_gaps(stats.confidence, index, n_bins, repetitions, seed)
        return ece_interval(gap, share, noise, null, level=level, seed=seed)

    resample = _statistic_of_rows(statistic, stats)
    values = np.empty(repetitions)
    for rows in row_chunks(repetitions, n):
        values[rows] = resample(rng.integers(0, n, size=(rows.stop - rows.start, n)))
    low, high = (float(q) for q in np.quantile(values, [(1.0 - level) / 2, (1.0 + level) / 2]))
    return low, high
