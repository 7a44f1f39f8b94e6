"""The calibration metrics in float64, each from one confidence and one outcome per prediction. NumPy only.

Bins are half open, (a, b], with edges k / n_bins in float64; the first also holds 0. A confidence on an edge
therefore belongs to the bin that it closes, decided by exact comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_ls.common.errors import extra
from hf_ls.metrics.ties import aurc_from_groups, equal_mass_sums, tie_groups
from hf_ls.metrics.validation import (
    Booleans,
    Floats,
    Integers,
    check_confidence,
    check_count,
    check_labels,
    check_logits,
    check_probabilities,
)

N_BINS = 15  # of an ECE, where nothing else is said
CELLS = N_BINS * 1024  # the finest bins kept by `streaming`; every n_bins that divides it is a union of cells
_CHUNK_ELEMENTS = 1 << 21  # 16 MB of float64: bounds memory for large n·K and stays fast


LOWER_IS_BETTER = (
    "loss", "nll", "perplexity", "brier", "ece", "ece_equal_mass", "ece_classwise", "mce", "rmsce_debiased", "smooth_ece", "aurc",
    "error_rate", "wer", "cer",
)  # fmt: skip
Direction = Literal["lower", "higher", "zero"]


def direction(metric: str) -> Direction:
    """Which way a metric is better, by the last words of its name, as in `eval_test_ece` or `phoneme_error_rate`.

    "lower" for a loss or an error; "zero" for the signed gap, where both signs are wrong; "higher" for every other score.
    """

    def ends_with(name: str) -> bool:
        return metric == name or metric.endswith(f"_{name}")

    if ends_with("signed_gap"):
        return "zero"
    return "lower" if any(map(ends_with, LOWER_IS_BETTER)) else "higher"


def row_chunks(n: int, width: int) -> Iterator[slice]:
    """Yield slices that cover n rows of `width` values, each small enough to stay within bounded memory."""
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def softmax(logits: Any) -> Floats:
    """Return softmax probabilities of logits [n, K] in float64: exp(z_k) / Σ_j exp(z_j)."""
    z = check_logits(logits).astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=1, keepdims=True)
    return z


@dataclass(frozen=True)
class PredictionStatistics:
    """What every top-label metric needs of each prediction, as arrays of length n.

    confidence: probability of the predicted class (the first of equal ones), 0 to 1
    correct: whether the predicted class is the label
    nll: −log p_label in nats, 0 upward
    brier: Σ_k (p_k − 1[k = label])², 0 to 2
    """

    confidence: Floats
    correct: Booleans
    nll: Floats
    brier: Floats

    def __len__(self) -> int:
        """Return the number of predictions n."""
        return int(self.confidence.size)

    @classmethod
    def from_logits(cls, logits: Any, labels: Any, *, impossible: bool = False) -> PredictionStatistics:
        """Compute the statistics of logits [n, K] and labels [n] in float64, nll = logsumexp(z) − z_label.

        Probabilities are never clipped. −inf masks a class, as long as it is not the label.

        impossible: allow a label whose logit is −inf, as in logarithms of probabilities: its nll is infinite.

        Raises:
            TypeError: logits not numeric, or labels not integers.
            ValueError: NaN, +inf, wrong shapes, labels outside [0, K), or a label whose logit is −inf without `impossible`.
        """
        matrix = check_logits(logits)
        n, num_classes = matrix.shape
        target = check_labels(labels, n, num_classes)
        masked = np.flatnonzero(np.isneginf(matrix[np.arange(n), target]))
        if masked.size and not impossible:
            raise ValueError(
                f"expected a finite logit for every label, got −inf in row {masked[0]} "
                f"({masked.size} rows in all); the label's class must not be masked"
            )
        confidence, nll, brier = np.empty(n), np.empty(n), np.empty(n)
        for rows in row_chunks(n, num_classes):
            index = np.arange(rows.stop - rows.start)
            z = matrix[rows].astype(np.float64)
            z -= z.max(axis=1, keepdims=True)
            z_label = z[index, target[rows]]
            p = np.exp(z, out=z)
            total = p.sum(axis=1)
            confidence[rows] = 1.0 / total  # the largest shifted logit is 0
            nll[rows] = np.log(total) - z_label
            p /= total[:, None]
            p[index, target[rows]] -= 1.0
            brier[rows] = np.einsum("ik,ik->i", p, p)
        return cls(confidence, matrix.argmax(axis=1) == target, nll, brier)

    @classmethod
    def from_probabilities(cls, probabilities: Any, labels: Any) -> PredictionStatistics:
        """Compute the statistics of probabilities [n, K] and labels [n] in float64.

        A label of probability 0 has nll = inf, because that is its value and no clipping constant is. Prefer
        `from_logits`: half precision and float32 probabilities round to 0 where the logits are still finite.

        Raises:
            TypeError: probabilities not numeric, or labels not integers.
            ValueError: logits given, NaN, rows not summing to 1 within 1e-3, or labels outside [0, K).
        """
        matrix = check_probabilities(probabilities)
        n, num_classes = matrix.shape
        target = check_labels(labels, n, num_classes)
        # Rows may sum to 1 + rounding, so that a probability may pass 1 by as much.
        confidence = np.minimum(matrix.max(axis=1).astype(np.float64), 1.0)
        p_label = np.minimum(matrix[np.arange(n), target].astype(np.float64), 1.0)
        with np.errstate(divide="ignore"):
            nll = -np.log(p_label)
        brier = np.empty(n)
        for rows in row_chunks(n, num_classes):
            p = matrix[rows].astype(np.float64)
            p[np.arange(rows.stop - rows.start), target[rows]] -= 1.0
            brier[rows] = np.einsum("ik,ik->i", p, p)
        return cls(confidence, matrix.argmax(axis=1) == target, np.maximum(nll, 0.0), brier)


@dataclass(frozen=True)
class ReliabilityBins:
    """Equal-width bins of confidence: edges [B+1], and per bin [B] the count, mean confidence and accuracy.

    The two means are NaN in an empty bin.
    """

    edges: Floats
    count: Integers
    confidence: Floats
    accuracy: Floats


def bin_edges(n_bins: int) -> Floats:
    """Return the float64 edges k / n_bins, k = 0 … n_bins, each the correctly rounded quotient."""
    return np.arange(n_bins + 1) / n_bins


def bin_index(confidence: Floats, n_bins: int) -> Integers:
    """Return the 0-based bin of each value among `n_bins` bins (a, b]; 0 goes to the first."""
    return np.maximum(np.searchsorted(bin_edges(n_bins), confidence, side="left") - 1, 0)


def reliability_bins(confidence: Any, correct: Any, n_bins: int = 15) -> ReliabilityBins:
    """Group confidence [n] and correct [n] into `n_bins` equal-width bins (a, b], the first with 0.

    Raises:
        TypeError: inputs not numeric, or n_bins not an integer.
        ValueError: empty, confidence outside 0 to 1, different lengths, or n_bins < 1.
    """
    values, hits = check_confidence(confidence, correct)
    n_bins = check_count(n_bins, "n_bins")
    index = bin_index(values, n_bins)
    count = np.bincount(index, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the documented NaN
        mean_confidence = np.bincount(index, weights=values, minlength=n_bins) / count
        accuracy = np.bincount(index[hits], minlength=n_bins) / count
    return ReliabilityBins(bin_edges(n_bins), count, mean_confidence, accuracy)


def nll(logits: Any, labels: Any) -> float:
    """Return the mean negative log likelihood of labels [n] under logits [n, K].

    mean(logsumexp(z) − z_label), in nats, 0 upward, lower is better. Takes logits, since a probability
    rounded to 0 has lost its logarithm.

    >>> round(nll([[2.0, 0.0], [0.0, 0.0]], [0, 1]), 4)
    0.41
    """
    return float(PredictionStatistics.from_logits(logits, labels).nll.mean())


def brier(probabilities: Any, labels: Any) -> float:
    """Return the Brier score of probabilities [n, K] and labels [n].

    Mean over rows of Σ_k (p_k − 1[k = label])², 0 to 2, lower is better; summed over classes for every K
    (scikit-learn halves it at K = 2). Source: Brier 1950.

    >>> round(brier([[0.8, 0.2], [0.4, 0.6]], [0, 0]), 4)
    0.4
    """
    return float(PredictionStatistics.from_probabilities(probabilities, labels).brier.mean())


def signed_gap(confidence: Any, correct: Any) -> float:
    """Return mean(confidence) − mean(correct): above 0 over-confident, below 0 under-confident. −1 to 1.

    >>> round(signed_gap([0.9, 0.7], [True, False]), 4)
    0.3
    """
    values, hits = check_confidence(confidence, correct)
    return float(values.mean() - hits.mean())


def ece(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the expected calibration error of the top label: Σ_b (n_b / n)·|accuracy_b − confidence_b|.

    Equal-width bins (a, b]. 0 to 1, lower is better; a calibrated model scores above 0 at finite n (see
    `null_ece`). Source: Naeini et al. 2015, Guo et al. 2017.

    >>> round(ece([0.9, 0.6, 0.8, 0.7], [True, False, True, True]), 4)  # each in a bin of its own
    0.3
    """
    bins = reliability_bins(confidence, correct, n_bins)
    return float(np.nansum(bins.count * np.abs(bins.confidence - bins.accuracy)) / bins.count.sum())


def mce(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the maximum calibration error: the largest |accuracy_b − confidence_b| of any equal-width bin.

    Empty bins do not count. 0 to 1, lower is better. Dominated by bins of few examples. Source: Naeini et
    al. 2015.
    """
    bins = reliability_bins(confidence, correct, n_bins)
    return float(np.nanmax(np.abs(bins.confidence - bins.accuracy)))


def ece_equal_mass(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the ECE over `n_bins` bins of about equal mass: Σ_b |Σ_{i in b} (confidence_i − correct_i)| / n.

    Equal confidences are never split between bins, so the value does not depend on the order of the rows; a
    bin may stay empty where ties are large. 0 to 1, lower is better. Source: Nguyen and O'Connor 2015.
    """
    level, count, hits, _ = tie_groups(*check_confidence(confidence, correct))
    size, total, right = equal_mass_sums(count, level * count, hits, check_count(n_bins, "n_bins"))
    return float(np.abs(total - right).sum() / size.sum())


def rmsce_debiased(confidence: Any, correct: Any, n_bins: int = 15) -> float:
    """Return the debiased root mean square calibration error over tie-aware equal-mass bins.

    sqrt(max(0, Σ_b (n_b / n)·[(confidence_b − accuracy_b)² − accuracy_b (1 − accuracy_b) / (n_b − 1)])); a
    bin of one example has no variance estimate and contributes 0. 0 to 1, lower is better, and a calibrated
    model scores near 0 at any n. Source: Kumar, Liang and Ma 2019 (the debiased estimator, after Bröcker
    2012).
    """
    level, count, hits, _ = tie_groups(*check_confidence(confidence, correct))
    size, total, right = equal_mass_sums(count, level * count, hits, check_count(n_bins, "n_bins"))
    keep = size > 1
    accuracy = right[keep] / size[keep]
    squared = (total[keep] / size[keep] - accuracy) ** 2 - accuracy * (1.0 - accuracy) / (size[keep] - 1)
    return float(np.sqrt(max(0.0, float((size[keep] * squared).sum() / size.sum()))))


def ece_classwise(probabilities: Any, labels: Any, n_bins: int = 15) -> float:
    """Return the classwise ECE: (1 / K) Σ_k Σ_b (n_kb / n)·|frequency_kb − confidence_kb|.

    probabilities [n, K], labels [n]; the bins of class k are equal-width bins of p_k. Classes that no label
    has still count among the K. 0 to 1, lower is better. Source: Kull et al. 2019.
    """
    gaps = _gaps_of_classes(probabilities, labels, n_bins)
    return float(np.abs(gaps).sum() / len(gaps))


def full_ece(probabilities: Any, labels: Any, n_bins: int = 15) -> float:
    """Return the full ECE of probabilities [n, K] and labels [n]: Σ_b |Σ_{(i, k) in b} (p_ik − 1[y_i = k])| / n.

    Every probability counts, not only the largest of a row, each with its own outcome; the bins are equal-width bins of all of
    them together, so that no class needs many labels. 0 to 2, lower is better: per row, not divided by K. For language models,
    whose text is drawn from the whole distribution. Within a bin gaps cancel: 0 where every p is below 1 / n_bins. Source: Liu
    et al. 2024 (Full-ECE).

    >>> round(full_ece([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 4)  # 1.6 in the bin of 0.8 with one hit, 0.4 in that of 0.2 with one
    0.6
    """
    return float(np.abs(_gaps_of_classes(probabilities, labels, n_bins).sum(axis=0)).sum())


def _gaps_of_classes(probabilities: Any, labels: Any, n_bins: int) -> Floats:
    """Σ_i (p_ik − 1[y_i = k]) / n over the rows whose p_ik lies in a bin, for each class and bin [K, B]."""
    matrix = check_probabilities(probabilities)
    n, num_classes = matrix.shape
    target = check_labels(labels, n, num_classes)
    n_bins = check_count(n_bins, "n_bins")
    offset = n_bins * np.arange(num_classes)
    gap = np.zeros(num_classes * n_bins)
    for rows in row_chunks(n, num_classes):
        p = np.minimum(matrix[rows].astype(np.float64), 1.0)
        cell = bin_index(p, n_bins) + offset
        gap += np.bincount(cell.ravel(), weights=p.ravel(), minlength=gap.size)
        gap -= np.bincount(cell[np.arange(len(cell)), target[rows]], minlength=gap.size)
    return gap.reshape(num_classes, n_bins) / n


def smooth_ece(confidence: Any, correct: Any) -> float:
    """Return the smooth ECE of the top label, by kernel smoothing instead of bins (library `relplot`).

    0 to 1, lower is better; accurate to about 1e-3, the library's own tolerance. Source: Błasiok and
    Nakkiran 2023.

    Raises:
        ImportError: relplot is not installed.
    """
    return smoothed(*check_confidence(confidence, correct))[0]


def smoothed(confidence: Floats, correct: Booleans) -> tuple[float, float]:
    """Return the smooth ECE and the width of its kernel, which the library takes as large as the error itself."""
    with extra("scripts", "smooth_ece"):
        from relplot import smECE  # also imports matplotlib, so only where it is asked for
    value, width = smECE(confidence, correct.astype(np.float64), return_width=True)
    return float(value), float(width)


def aurc(confidence: Any, correct: Any) -> float:
    """Return the area under the risk-coverage curve: (1 / n) Σ_i error rate among the i most confident.

    Ties take the mean over their orders, so the value does not depend on the order of the rows. 0 to 1,
    lower is better; it falls with the error rate as well as with better ranking (`e_aurc` removes the
    former). Source: Geifman and El-Yaniv 2017.
    """
    values, hits = check_confidence(confidence, correct)
    _, count, right, _ = tie_groups(values, hits)
    return float(aurc_from_groups(count[::-1], (count - right)[::-1]))


def e_aurc(confidence: Any, correct: Any) -> float:
    """Return the excess AURC: `aurc` minus that of the best ranking with the same number of errors.

    0 to 1, lower is better; 0 when every error is less confident than every success. Source: Geifman et al.
    2019.
    """
    hits = check_confidence(confidence, correct)[1]
    misses = np.arange(1, int((~hits).sum()) + 1)
    best = (misses / (hits.sum() + misses)).sum() / hits.size
    return float(max(0.0, aurc(confidence, correct) - best))
