"""How far a finite sample can be trusted: bootstrap and Wilson intervals, and the ECE which a calibrated model shows.

Each function depends on its arguments and `seed` alone; memory stays bounded for any n and number of repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_ls.metrics.core import PredictionStatistics, bin_index, row_chunks, smoothed
from hf_ls.metrics.ties import aurc_from_groups, equal_mass_index, tie_groups
from hf_ls.metrics.validation import (
    Floats,
    Integers,
    as_array,
    check_confidence,
    check_count,
    check_labels,
    check_probabilities,
)

BINNED = ("ece", "ece_equal_mass", "rmsce_debiased", "smooth_ece")  # calibration errors, which are biased upward
STATISTICS = ("accuracy", "nll", "brier", "signed_gap", "aurc", *BINNED)
_DRAWN = 960  # cells of confidence, each with one binomial draw
_SMOOTHED = 240  # cells of confidence, and points at which a smooth ECE is evaluated
_DRAWS = 1 << 24  # labels drawn at most for a classwise ECE, as long as that leaves 200 repetitions


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


def _directions(gap: Floats, variance: Floats, share: Floats, group: Integers, repetitions: int, seed: int) -> Floats:
    """Draw how the true gap may be spread over the bins [R, B], up to a factor for each draw.

    Empirical Bayes: the mean gap of each bin, gap / share, is drawn from its posterior: it lies towards the mean gap of
    the bins of its group [B] by as much as its own sampling variance, against the variance within groups of DerSimonian and
    Laird 1986, makes likely. The observed gaps themselves would spread the error too unevenly, because noise is uneven.
    """
    used = share > 0
    level, noise = gap[used] / share[used], np.maximum(variance[used] / share[used] ** 2, 1e-12)
    of = np.unique(group[used], return_inverse=True)[1]

    def centres(weight: Floats) -> tuple[Floats, Floats]:
        """Return the weighted mean of each group, and its weight."""
        total: Floats = np.bincount(of, weights=weight).astype(np.float64)
        return np.bincount(of, weights=weight * level) / total, total

    weight = 1.0 / noise
    centre, total = centres(weight)
    spare = float((total - np.bincount(of, weights=weight**2) / total).sum())
    excess = float((weight * (level - centre[of]) ** 2).sum()) - (of.size - centre.size)
    between = max(0.0, excess / spare) if spare > 1e-9 * weight.sum() else 0.0
    centre, total = centres(1.0 / (noise + between))
    kept = between / (between + noise)
    z = np.random.default_rng((seed, 1)).standard_normal((repetitions, centre.size + of.size))
    drawn = (centre + z[:, : centre.size] / np.sqrt(total))[:, of]
    directions = np.zeros((repetitions, gap.size))
    draws = (1.0 - kept) * drawn + kept * level + np.sqrt(kept * noise) * z[:, centre.size :]
    directions[:, used] = share[used] * draws
    return directions


def ece_interval(
    gap: Floats,
    share: Floats,
    noise: Floats,
    null: Floats,
    *,
    matrix: Floats | None = None,
    order: int = 1,
    group: Integers | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval (low, high) for the true calibration error ‖γ·M‖, where γ_b = E[(c − a)·1[bin b]].

    gap: estimates of γ [B], mean confidence − correct over all rows, 0 for the rows of other bins. share: of rows per bin
    [B]. noise: draws [R, B] of the sampling error of gap. null: draws [R, B] of gap when calibration is perfect. matrix: M
    [B, T], None for the gaps themselves. order: of the norm, 1 for the sum of absolute values, which is the ECE, or 2. group: of
    bins which are likely to have like mean gaps [B], None for one of all.

    ‖gap·M‖ is biased upward, most where the true error is small, so no interval around it covers. Instead a test is
    inverted over one parameter: the error θ spread over the bins as `_directions` finds likely. θ belongs to the
    interval if ‖gap·M‖ is not in the tails of ‖(θ·direction + error)·M‖. The error is `noise`; where `null` is the wider
    one, as below an under-confident model, its variance goes from that of `null` at θ = 0 to that of `noise` at the observed
    value. θ = 0 is tested against `null` with the whole of 1 − level above; for the tails near 0 see `_tail_above`.
    """
    alpha = 1.0 - _check_level(level)
    group = np.zeros(gap.size, dtype=np.int64) if group is None else group
    directions = _directions(gap, (noise.var(axis=0) + null.var(axis=0)) / 2, share, group, len(noise), seed)
    if matrix is not None:  # once, not for every θ
        gap, noise, null, directions = gap @ matrix, noise @ matrix, null @ matrix, directions @ matrix

    def size(x: Floats) -> Floats:
        return np.asarray(np.linalg.norm(x, ord=order, axis=-1))

    value, null_values = float(size(gap)), size(null)
    if value == 0.0 and not null_values.any():  # certain and always right
        return 0.0, 0.0
    directions /= size(directions)[:, None]
    consistent = value <= np.quantile(null_values, level)
    widest = value + 5.0 * float(size(value * directions + noise).std()) + float(null_values.mean())

    falling = value > 0 and bool((null**2).sum() > (noise**2).sum())

    def slack(theta: float) -> float:
        """Return by how far the value lies inside the region of θ; below 0 outside."""
        part = min(1.0, theta / value) if falling else 1.0
        draws = size(theta * directions + np.sqrt(1.0 - part) * null + np.sqrt(part) * noise)
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


def _bins(statistic: str, stats: PredictionStatistics, n_bins: int) -> tuple[Integers, int, Floats | None, int]:
    """Return the bin of each row, the number of bins, and the matrix and order of `ece_interval`, of one of `BINNED`."""
    if statistic == "smooth_ece":
        return bin_index(stats.confidence, _SMOOTHED), _SMOOTHED, _smoother(smoothed(stats.confidence, stats.correct)[1]), 1
    if statistic == "ece":
        return bin_index(stats.confidence, n_bins), n_bins, None, 1
    _, count, _, group = tie_groups(stats.confidence, stats.correct)
    index = equal_mass_index(count, n_bins)[group]
    if statistic == "ece_equal_mass":
        return index, n_bins, None, 1
    # The debiased square less the raw one, Σ_b γ_b² / share_b, is a number which the sample knows: both give one test.
    size = np.bincount(index, minlength=n_bins)
    return index, n_bins, np.diag(np.where(size > 1, np.sqrt(len(stats) / np.maximum(size, 1)), 0.0)), 2


def _smoother(width: float) -> Floats:
    """Return the matrix [cells, points] of a Gaussian kernel which is reflected at 0 and 1, each row of sum 1.

    By its cosine series, (1 + 2·Σ_k exp(−(πk·width)² / 2)·cos(πkx)·cos(πkt)) / points. Source: Błasiok and Nakkiran 2023.
    """
    width = max(width, 1.0 / _SMOOTHED)
    k = np.arange(1, max(2, int(np.ceil(6.0 / (np.pi * width)))))
    waves = np.cos(np.pi * np.outer((np.arange(_SMOOTHED) + 0.5) / _SMOOTHED, k))
    return (1.0 + 2.0 * (waves * np.exp(-((np.pi * k * width) ** 2) / 2)) @ waves.T) / _SMOOTHED


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
    `ece`, `ece_equal_mass`, `rmsce_debiased` and `smooth_ece` that of `ece_interval`, which simulates the sums per bin and
    inverts a test: these are biased upward (of `rmsce_debiased` what is debiased), so that the interval is one for the true
    error over the same bins (of equal mass: the bins of this sample; of `smooth_ece`: smoothed as this sample is) and may lie
    below the value. Its low end is 0 whenever the value is consistent with perfect calibration at `level`, the test of
    `null_ece`. `rmsce_debiased` without a bin of two examples: (0, 1), no information.

    Raises:
        ImportError: relplot is not installed, for `smooth_ece`.
        ValueError: unknown statistic, infinite nll, or level outside 0 to 1.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"expected a statistic of {', '.join(STATISTICS)}, got {statistic!r}; no other has a sound one")
    if statistic == "nll" and not np.isfinite(stats.nll).all():
        raise ValueError("expected finite nll, got inf; build the statistics from logits rather than probabilities")
    n, n_bins, level = len(stats), check_count(n_bins, "n_bins"), _check_level(level)
    rng, repetitions = np.random.default_rng(seed), check_count(repetitions, "repetitions")
    if statistic in BINNED:
        index, n_bins, matrix, order = _bins(statistic, stats, n_bins)
        if matrix is not None and not matrix.any():
            return 0.0, 1.0
        gap, share, covariance = _gap_moments(stats, index, n_bins)
        noise = rng.multivariate_normal(np.zeros(n_bins), covariance, size=repetitions, method="eigh")
        null = null_gaps(stats.confidence, index, n_bins, repetitions, seed)
        return ece_interval(gap, share, noise, null, matrix=matrix, order=order, level=level, seed=seed)

    resample = _statistic_of_rows(statistic, stats)
    values = np.empty(repetitions)
    for rows in row_chunks(repetitions, n):
        values[rows] = resample(rng.integers(0, n, size=(rows.stop - rows.start, n)))
    low, high = (float(q) for q in np.quantile(values, [(1.0 - level) / 2, (1.0 + level) / 2]))
    return low, high


def classwise_interval(
    probabilities: Any, labels: Any, *, n_bins: int = 15, repetitions: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return an interval (low, high) for the true `ece_classwise` of probabilities [n, K] over the same bins.

    That of `ece_interval` with the bins of all classes together, those of the same probabilities being alike. The error of
    a sample is drawn by the multiplier bootstrap, that of a calibrated model by labels drawn from the probabilities, so that
    the classes of a row stay bound to each other. Large n or K have fewer repetitions, at least 200. Source of the
    multipliers: Chernozhukov, Chetverikov and Kato 2013.

    Raises:
        TypeError, ValueError: as `ece_classwise`; ValueError for level outside 0 to 1.
    """
    from scipy.sparse import csr_array  # half a second, and only needed here

    p = np.minimum(check_probabilities(probabilities).astype(np.float64), 1.0)
    n, k = p.shape
    target, n_bins, level = check_labels(labels, n, k), check_count(n_bins, "n_bins"), _check_level(level)
    repetitions = check_count(repetitions, "repetitions")
    rows = np.arange(n)
    used, cell = np.unique(bin_index(p, n_bins) + n_bins * np.arange(k), return_inverse=True)  # of most classes few bins
    cell, size = cell.reshape(n, k), used.size
    total, count = np.bincount(cell.ravel(), weights=p.ravel(), minlength=size), np.bincount(cell.ravel(), minlength=size)
    repetitions = min(repetitions, max(200, _DRAWS // max(n, 4 * size)))
    gap = (total - np.bincount(cell[rows, target], minlength=size)) / n
    residual = p.copy()
    residual[rows, target] -= 1.0
    values = csr_array((residual.ravel(), cell.ravel(), np.arange(0, n * k + 1, k)), shape=(n, size))
    rng = np.random.default_rng(seed)
    noise = np.empty((repetitions, size))
    for part in row_chunks(repetitions, n):
        z = rng.standard_normal((part.stop - part.start, n))
        noise[part] = (z @ values) / n - z.mean(axis=1, keepdims=True) * gap
    cumulative, replicate = np.cumsum(p, axis=1), size * np.arange(repetitions)
    hits = np.zeros(repetitions * size)
    for row in rows:
        drawn = np.minimum(np.searchsorted(cumulative[row], rng.random(repetitions), side="right"), k - 1)
        hits[replicate + cell[row, drawn]] += 1.0
    null = (total - hits.reshape(repetitions, size)) / n
    low, high = ece_interval(gap, count / n, noise, null, group=used % n_bins, level=level, seed=seed)
    return low / k, high / k
