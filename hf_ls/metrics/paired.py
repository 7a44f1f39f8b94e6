"""Differences between models measured on the same examples, how sure they are, and the one rule of "measurably better".

One draw of examples, or of whole clusters such as sequences, serves every model (paired bootstrap). Example i counts
w_i ~ Poisson(1) times in a replicate, so that memory does not grow with n. Source: Hanley and MacGibbon 2006; Cameron, Gelbach
and Miller 2008 for clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import stdtr, stdtrit

from hf_ls.metrics.core import N_BINS, PredictionStatistics, aurc, bin_index, direction, e_aurc
from hf_ls.metrics.intervals import ece_interval, null_gaps, wilson_interval
from hf_ls.metrics.ties import tie_groups
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.metrics.validation import Floats, Integers, as_array

RESAMPLED = ("accuracy", "nll", "brier", "signed_gap", "aurc", "e_aurc", "ece")
COMPARED = ("accuracy", "nll", "brier", "ece", "aurc", "e_aurc")  # the difference of two signed gaps says nothing
Finding = Literal["better", "worse", "none"]
_CELLS = 2**24  # numbers of drawn means at a time: 134 MB
_UNITS = 4096  # examples or clusters per block of weights: 33 MB at 1000 repetitions


@dataclass(frozen=True)
class Difference:
    """One metric of a row less that of another row, both measured on the same examples.

    metric: its name. row, against: the names of the rows. value: row − against, in the unit of the metric.
    low, high: the paired interval (95 % unless another level is said), over examples, or over sequences for tokens; both None
    where none is known.
    """

    metric: str
    row: str
    against: str
    value: float
    low: float | None
    high: float | None

    @property
    def finding(self) -> Finding:
        """Whether the row is measurably better or worse: its paired interval leaves 0 out. "none": no difference shown."""
        way = direction(self.metric)
        if self.low is None or self.high is None or self.low <= 0 <= self.high or way == "zero":
            return "none"
        return "better" if (self.high < 0) == (way == "lower") else "worse"


@dataclass(frozen=True, kw_only=True)
class Contrast(Difference):
    """A mean over seeds of differences on the same examples with the same seeds, for rows which were trained several times.

    set: the examples. value, low, high: of the mean; the interval covers examples and seeds, with one seed examples only, and is
        None for a task metric with one seed. p: its two-sided p-value. p_holm: corrected for the number of smoothed variants
        which are set against this row (1 for the baseline's temperature).
    per_seed: one difference a seed. per_seed_low, per_seed_high: their paired intervals over examples (None for task metrics).
    seed_low, seed_high: t interval over seeds, for these examples; None with one seed.
    """

    set: str
    p: float | None
    p_holm: float | None = None
    per_seed: list[float]
    per_seed_low: list[float] | None
    per_seed_high: list[float] | None
    seed_low: float | None
    seed_high: float | None

    def corrected(self, level: float = 0.95) -> Finding:
        """The finding, if it holds after the correction for several variants too: p_holm ≤ 1 − level."""
        return self.finding if self.p_holm is not None and self.p_holm <= 1.0 - level else "none"


@dataclass(frozen=True)
class Draws:
    """What some metrics of one model are, and what they become when its examples are drawn anew.

    examples: a fingerprint of the examples, their order and the weights of the draws: models with the same one are paired, in
    whatever process or week they were measured. units: number of examples or clusters. values: by metric. draws: float64 [R].
    """

    examples: str
    units: int
    values: dict[str, float]
    draws: dict[str, Floats]


def draws_of_examples(stats: PredictionStatistics, labels: Any, *, repetitions: int = 1000, seed: int = 0) -> Draws:
    """The draws of `COMPARED` for the predictions of labels [n], each example a unit; without an infinite nll."""
    finite = bool(np.isfinite(stats.nll).all())
    cell = stats if finite else replace(stats, nll=np.zeros(len(stats)))
    resamples = Resamples([cell], None, repetitions=repetitions, seed=seed)
    columns = {metric: RESAMPLED.index(metric) for metric in COMPARED if finite or metric != "nll"}
    return Draws(
        fingerprint(labels, repetitions, seed),
        resamples.units,
        {metric: float(resamples.values[0, column]) for metric, column in columns.items()},
        {metric: resamples.draws[0, :, column] for metric, column in columns.items()},
    )


def poisson_means(values: csr_array, repetitions: int, seed: int) -> Iterator[Floats]:
    """The means of the columns of values [n, m] when its rows are drawn anew, with the weights of `Resamples`: parts of [R, m],
    of some replicates each, so that memory does not grow with m."""
    n, m = values.shape
    size = max(1, _CELLS // m)
    for first in range(0, repetitions, size):
        part = slice(first, min(first + size, repetitions))
        count, sums = np.zeros(part.stop - first), np.zeros((part.stop - first, m))
        for block, start in enumerate(range(0, n, _UNITS)):
            weights = unit_weights(seed, block, repetitions, min(_UNITS, n - start))[part]
            count += weights.sum(axis=1)
            sums += weights @ values[start : start + _UNITS]
        yield sums[count > 0] / count[count > 0, None]


def unit_weights(seed: int, block: int, repetitions: int, width: int) -> Floats:
    """How often each unit of a block counts in each replicate [R, width], Poisson(1)."""
    return np.random.default_rng((seed, block)).poisson(1.0, size=(repetitions, width)).astype(np.float64)


def draws_of_tokens(tokens: TokenCalibration) -> Draws:
    """The draws of accuracy, nll, brier and ece, whole sequences drawn; the number of tokens in each draw tells the examples."""
    count, values, draws = tokens.draws()
    return Draws(fingerprint(count), tokens.sequences, values, draws)


def fingerprint(*values: Any) -> str:
    """A hash of arrays, numbers and texts in order."""
    parts = [repr((array.dtype.kind, array.shape)).encode() + array.tobytes() for array in map(as_array, values)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def differences(rows: Mapping[str, Sequence[Draws]], *, level: float = 0.95) -> list[Difference]:
    """Every row less every earlier one, in each metric which both have on the same examples; name of a row -> its draws.

    The interval is that of `Resamples.difference` with one seed. Rows which were measured on other examples, or drawn with other
    weights, have no difference, since marginal intervals decide nothing.
    """
    found = []
    for against, row in combinations(rows, 2):
        for ours, theirs in product(rows[row], rows[against]):
            if (ours.examples, ours.units) != (theirs.examples, theirs.units):
                continue
            for metric in (metric for metric in ours.draws if metric in theirs.draws):
                value = np.array([ours.values[metric] - theirs.values[metric]])
                drawn = (ours.draws[metric] - theirs.draws[metric])[None]
                low, high, _ = _over_examples(metric, value, drawn, ours.units, level)
                found.append(Difference(metric, row, against, float(value[0]), low, high))
    return found


def draws_as_arrays(rows: Mapping[str, Sequence[Draws]]) -> dict[str, NDArray[Any]]:
    """Draws as arrays for `numpy.savez`; `draws_from_arrays` reads them."""
    flat = [(row, draws) for row, several in rows.items() for draws in several]
    arrays: dict[str, NDArray[Any]] = {"rows": np.array([row for row, _ in flat], dtype=np.str_)}
    for i, (_, d) in enumerate(flat):
        arrays[f"examples_{i}"], arrays[f"units_{i}"] = np.array(d.examples), np.array(d.units)
        arrays[f"metrics_{i}"], arrays[f"values_{i}"] = np.array(list(d.values)), np.array(list(d.values.values()))
        arrays[f"draws_{i}"] = np.stack([d.draws[metric] for metric in d.values])
    return arrays


def draws_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[Draws]]:
    """What `draws_as_arrays` was given."""
    rows: dict[str, list[Draws]] = {}
    for i, row in enumerate(arrays["rows"].tolist()):
        names = arrays[f"metrics_{i}"].tolist()
        values = dict(zip(names, arrays[f"values_{i}"].tolist(), strict=True))
        drawn = dict(zip(names, arrays[f"draws_{i}"], strict=True))
        rows.setdefault(row, []).append(Draws(str(arrays[f"examples_{i}"]), int(arrays[f"units_{i}"]), values, drawn))
    return rows


def ranking_influence(confidence: Floats, correct: Any) -> tuple[Floats, Floats]:
    """Return the influence of each row [n] on `aurc` and on `e_aurc`: what n times its weight adds to the metric, to first order.

    With errors e in descending order of confidence, R_i the error rate among the first i, and A the AURC:
    R_j − A + Σ_{i ≥ j} (e_j − R_i) / i, averaged over ties; for the excess, plus log(1 − r)·(e_j − r) at the error rate r,
    since the best AURC is r + (1 − r)·log(1 − r). Both sum to 0.
    """
    _, count, right, group = tie_groups(confidence, correct)
    size = count[::-1]
    rate = np.repeat(((count - right) / count)[::-1], size)
    position = np.arange(1, rate.size + 1)
    risk = np.cumsum(rate) / position
    later = np.cumsum((1.0 / position)[::-1])[::-1]
    later_risk = np.cumsum((risk / position)[::-1])[::-1]
    starts = np.cumsum(size) - size
    first, second = (np.add.reduceat(part, starts) / size for part in (risk - later_risk, later))
    errors, where = 1.0 - correct, count.size - 1 - group
    of_aurc = first[where] - risk.mean() + errors * second[where]
    r = errors.mean()
    return of_aurc, of_aurc + (np.log1p(-r) if r < 1 else 0.0) * (errors - r)


class Resamples:
    """What every metric of `RESAMPLED` becomes when the examples of one set are drawn anew, for several models alike.

    cells: the models' statistics, all of the same examples in the same order. cluster: integers [n] or None.
    Attributes: units: number of examples or clusters; values [M, 7] and draws [M, R, 7], in the order of `RESAMPLED`.
    """

    def __init__(self, cells: Sequence[PredictionStatistics], cluster: Any, *, repetitions: int, seed: int) -> None:
        """Draw the weights block by block, and add up what each model needs."""
        n = len(cells[0])
        unit = np.arange(n) if cluster is None else np.unique(as_array(cluster), return_inverse=True)[1].ravel()
        self.units, self.clustered = int(unit.max()) + 1, cluster is not None
        self._cells, self._seed = cells, seed
        self._repetitions = repetitions
        self._nulls: dict[int, Floats] = {}
        ranking = [ranking_influence(stats.confidence, stats.correct) for stats in cells]
        self.values = np.array([_point(stats) for stats in cells])
        order = np.argsort(unit, kind="stable")
        ends = np.searchsorted(unit[order], np.arange(0, self.units + _UNITS, _UNITS))
        count, sums = np.zeros(repetitions), np.zeros((len(cells), repetitions, len(RESAMPLED) - 1 + N_BINS))
        for block, (start, end) in enumerate(pairwise(ends)):
            rows = order[start:end]
            local, width = unit[rows] - block * _UNITS, min(_UNITS, self.units - block * _UNITS)
            weights = unit_weights(seed, block, repetitions, width)
            count += weights @ np.bincount(local, minlength=width)
            for model, (stats, influence) in enumerate(zip(cells, ranking, strict=True)):
                sums[model] += weights @ _per_unit(stats, influence, rows, local, width)
        kept = count > 0
        means = sums[:, kept] / count[kept, None]
        self.gap_draws = means[:, :, -N_BINS:]
        self.draws = np.concatenate([means[:, :, :-N_BINS], np.abs(self.gap_draws).sum(axis=2, keepdims=True)], axis=2)
        ranked = [RESAMPLED.index("aurc"), RESAMPLED.index("e_aurc")]
        self.draws[:, :, ranked] += self.values[:, None, ranked]

    def interval(self, model: int, metric: str, level: float) -> tuple[float, float]:
        """Return the interval (low, high) of one metric of one model over examples.

        Percentile; of an ECE that of `metrics.intervals.ece_interval`; of an accuracy of 0 or 1 Wilson's over units.
        """
        column, stats = RESAMPLED.index(metric), self._cells[model]
        value, draws = self.values[model, column], self.draws[model, :, column]
        if metric == "accuracy" and value in (0.0, 1.0):  # every resample is alike there
            low, high = wilson_interval(value * self.units, self.units, level)
            return float(low), float(high)
        if metric == "ece":
            index = bin_index(stats.confidence, N_BINS)
            share = np.bincount(index, minlength=N_BINS) / len(stats)
            gap = np.bincount(index, weights=stats.confidence - stats.correct, minlength=N_BINS) / len(stats)
            noise = (self.gap_draws[model] - gap) * self._widening
            null = self._null(model)[: len(draws)]
            if self.clustered and np.abs(noise).sum(axis=1).mean() > np.abs(null).sum(axis=1).mean():
                null = noise  # tokens of one sequence are off together: that alone is no evidence
            return ece_interval(gap, share, noise, null, level=level, seed=self._seed)
        low, high = np.quantile(draws, [(1.0 - level) / 2, (1.0 + level) / 2])
        return float(low), float(high)

    def null_ece(self, model: int) -> tuple[float, float]:
        """Return the mean and the 95 % quantile of the ECE of a calibrated model with these confidences."""
        draws = np.abs(self._null(model)).sum(axis=1)
        return float(draws.mean()), float(np.quantile(draws, 0.95))

    def _null(self, model: int) -> Floats:
        if model not in self._nulls:
            c = self._cells[model].confidence
            self._nulls[model] = null_gaps(c, bin_index(c, N_BINS), N_BINS, self._repetitions, self._seed)
        return self._nulls[model]

    @property
    def _widening(self) -> float:
        return float(np.sqrt(self.units / max(self.units - 1, 1)))

    def difference(self, models: Sequence[int], references: Sequence[int], metric: str, level: float, **names: str) -> Contrast:
        """Return models − references, each a list with one model per seed, for one metric; names: row, against and set.

        Per seed: the percentile interval of the paired difference; for ece the basic one, because both values are biased.
        Over examples and seeds: mean ± t·sqrt(v_e + v_s), where v_e is the bootstrap variance of the mean over seeds when
        the shared examples are drawn anew, and v_s that over seeds divided by their number; the degrees of freedom are
        Satterthwaite's. A part of the variance is counted in both, so that the interval errs on the wide side. With one
        seed v_s is not known and left out.
        """
        column = RESAMPLED.index(metric)
        values = self.values[list(models), column] - self.values[list(references), column]
        draws = self.draws[list(models), :, column] - self.draws[list(references), :, column]
        return contrast(metric, values, draws, self.units, level, **names)


def contrast(metric: str, values: Floats, draws: Floats, units: int, level: float, **names: str) -> Contrast:
    """The mean over seeds of paired differences, values [S], which become draws [S, R] when the units are drawn anew.

    metric, level and names (row, against and set): as `Resamples.difference`, which says how the intervals come about.
    """
    ends = np.quantile(draws, [(1.0 - level) / 2, (1.0 + level) / 2], axis=1)
    if metric == "ece":
        ends = 2 * values - ends[::-1]
    return _contrast(metric, values, _over_examples(metric, values, draws, units, level), ends.tolist(), level, names)


def seed_difference(metric: str, values: Sequence[float], references: Sequence[float], level: float, **names: str) -> Contrast:
    """Return values − references, one of each per seed, of a metric known only as a number: all intervals are over seeds."""
    per_seed = np.asarray(values, dtype=np.float64) - np.asarray(references, dtype=np.float64)
    low, high = seed_interval(per_seed, level)
    p = None if low is None else _combined(float(per_seed.mean()), 0.0, 2, per_seed, level)[2]
    return _contrast(metric, per_seed, (low, high, p), [None, None], level, names)


def _contrast(metric: str, values: Floats, whole: Any, ends: Any, level: float, names: dict[str, str]) -> Contrast:
    """Put a contrast together: values [S], (low, high, p) of their mean, and the ends of the interval of each."""
    low, high, p = whole
    seed_low, seed_high = seed_interval(values, level)
    return Contrast(
        metric, names.get("row", ""), names.get("against", ""), float(values.mean()), low, high, set=names.get("set", ""),
        p=p, per_seed=values.tolist(), per_seed_low=ends[0], per_seed_high=ends[1], seed_low=seed_low, seed_high=seed_high,
    )  # fmt: skip


def _over_examples(metric: str, values: Floats, draws: Floats, units: int, level: float) -> tuple[float, float, float]:
    """Return (low, high, p) of the mean of paired differences [S], which become draws [S, R] when the units are drawn anew."""
    centre = float(values.mean())
    if metric == "ece":  # both values are biased upward, and so are their draws
        centre = 2 * centre - float(draws.mean())
    widening = units / max(units - 1, 1)
    return _combined(centre, float(draws.mean(axis=0).var()) * widening, units, values, level)


def seed_interval(values: Any, level: float) -> tuple[float | None, float | None]:
    """Return the t interval of the mean over seeds, mean ± t_{S−1}·s / sqrt(S); (None, None) with one seed."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return None, None
    half = stdtrit(values.size - 1, (1.0 + level) / 2) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean() - half), float(values.mean() + half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected so that one or more false findings among them all stay below the level; None stays None.

    The k-th smallest of m becomes max over the smaller ones of (m − k + 1)·p, at most 1. Source: Holm 1979.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def _combined(centre: float, over_examples: float, units: int, values: Floats, level: float) -> tuple[float, float, float]:
    """Return (low, high, p) of a mean with a variance over examples and one over seeds."""
    over_seeds = float(values.var(ddof=1)) / values.size if values.size > 1 else 0.0
    variance = over_examples + over_seeds
    if variance == 0.0:
        return centre, centre, 1.0 if centre == 0.0 else 0.0
    shares = over_examples**2 / max(units - 1, 1) + (over_seeds**2 / (values.size - 1) if values.size > 1 else 0.0)
    freedom = variance**2 / shares
    half = float(stdtrit(freedom, (1.0 + level) / 2)) * variance**0.5
    return centre - half, centre + half, float(2 * stdtr(freedom, -abs(centre) / variance**0.5))


def _point(stats: PredictionStatistics) -> list[float]:
    index, n = bin_index(stats.confidence, N_BINS), len(stats)
    gap = np.bincount(index, weights=stats.confidence - stats.correct, minlength=N_BINS) / n
    means = [stats.correct.mean(), stats.nll.mean(), stats.brier.mean(), gap.sum()]
    ranking = [function(stats.confidence, stats.correct) for function in (aurc, e_aurc)]
    return [float(value) for value in (*means, *ranking, np.abs(gap).sum())]


def _per_unit(
    stats: PredictionStatistics, influence: tuple[Floats, Floats], rows: Integers, unit: Integers, units: int
) -> Floats:
    """Add up rows per unit [units, 6 + B]: the numbers whose means are the metrics (or influences), and the gap per bin."""
    confidence, correct = stats.confidence[rows], stats.correct[rows]
    gap = confidence - correct
    numbers = (correct, stats.nll[rows], stats.brier[rows], gap, *(part[rows] for part in influence))
    cells = np.bincount(unit * N_BINS + bin_index(confidence, N_BINS), weights=gap, minlength=units * N_BINS)
    return np.column_stack([*(np.bincount(unit, weights=n, minlength=units) for n in numbers), cells.reshape(units, N_BINS)])
