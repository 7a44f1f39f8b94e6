"""Scores of classifiers by class: F1 and balanced accuracy from counts, the calibration of each class, scores against raters.

Counts add up over batches, processes and replicates of a bootstrap, which scikit-learn's functions of labels do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack

from hf_ls.metrics.core import N_BINS, bin_index, row_chunks, softmax
from hf_ls.metrics.paired import Draws, fingerprint, poisson_means
from hf_ls.metrics.validation import Floats, Integers, check_labels, check_logits, check_probabilities

_TAILS = (0.025, 0.975)


class ClassCounts(NamedTuple):
    """Of each class, how many predictions of it are right, how often it is the label, and the prediction: each [..., K]."""

    right: NDArray[Any]
    labelled: NDArray[Any]
    predicted: NDArray[Any]

    @classmethod
    def of(cls, predicted: Integers, labels: Integers, num_classes: int) -> ClassCounts:
        """Count predicted classes [n] and labels [n]."""
        found = (labels[predicted == labels], labels, predicted)
        return cls(*(np.bincount(values, minlength=num_classes) for values in found))

    def plus(self, other: ClassCounts) -> ClassCounts:
        """The counts of both together."""
        return ClassCounts(*(a + b for a, b in zip(self, other, strict=True)))

    def f1(self) -> Floats:
        """F1 of each class, 2·right / (labelled + predicted), 0 to 1; NaN for a class which is neither label nor prediction."""
        return _ratio(2 * self.right, self.labelled + self.predicted)


def f1_macro(counts: ClassCounts) -> Floats:
    """The mean F1 of the classes which are a label or a prediction, 0 to 1, higher is better: every class counts alike."""
    return np.nanmean(counts.f1(), axis=-1)


def f1_weighted(counts: ClassCounts) -> Floats:
    """The mean F1 of the classes, each as often as it is the label, 0 to 1, higher is better."""
    return np.nansum(counts.f1() * counts.labelled, axis=-1) / counts.labelled.sum(axis=-1)


def balanced_accuracy(counts: ClassCounts) -> Floats:
    """The mean over the classes with a label of the share of their labels which is found (recall), 0 to 1, higher is better."""
    return np.nanmean(_ratio(counts.right, counts.labelled), axis=-1)


CLASS_SCORES: dict[str, Callable[[ClassCounts], Floats]] = {
    "f1_macro": f1_macro, "f1_weighted": f1_weighted, "balanced_accuracy": balanced_accuracy,
}  # fmt: skip


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def soft_scores(logits: Any, targets: Any) -> tuple[Floats, Floats]:
    """How far softmax(logits) [n, K] is from a distribution q [n, K] per example: (nll, brier), each [n], lower is better.

    nll = −Σ_k q_k·log p_k in nats, at least the entropy of q; brier = Σ_k (p_k − q_k)², 0 to 2.

    Raises: as `check_logits` and `check_probabilities`; ValueError for other shapes, and for mass on a class whose logit is −inf.
    """
    z, q = check_logits(logits), check_probabilities(targets).astype(np.float64)
    if z.shape != q.shape:
        raise ValueError(f"expected one distribution per row of logits {z.shape}, got {q.shape}; give both for the same examples")
    nll, brier = np.empty(len(z)), np.empty(len(z))
    for rows in row_chunks(*z.shape):
        part = z[rows].astype(np.float64)
        top = part.max(axis=1, keepdims=True)
        log_p = part - top - np.log(np.exp(part - top).sum(axis=1, keepdims=True))
        nll[rows] = -np.where(q[rows] > 0, q[rows] * log_p, 0.0).sum(axis=1)
        brier[rows] = ((np.exp(log_p) - q[rows]) ** 2).sum(axis=1)
    if not np.isfinite(nll).all():
        raise ValueError("expected a finite logit for every class which a target has mass on, got −inf; unmask that class")
    return nll, brier


def class_scores(
    logits: Any, labels: Any, targets: Any = None, *, repetitions: int = 1000, seed: int = 0
) -> tuple[dict[str, dict[str, float]], Draws]:
    """Every score of this file for logits [n, K] and labels [n]: {name: {"value", "low", "high"}}, and its draws for pairing.

    `f1_macro`, `f1_weighted`, `balanced_accuracy`; with targets [n, K] also `soft_nll` and `soft_brier`. 95 % percentile
    intervals, examples drawn anew; none where every draw is the same, which says only that no other outcome was seen.

    Raises: as `check_logits`, `check_labels` and `soft_scores`.
    """
    matrix = check_logits(logits)
    n, k = matrix.shape
    y, best = check_labels(labels, n, k), matrix.argmax(axis=1)
    counts = ClassCounts.of(best, y, k)
    # A count of each class per replicate is a sum over examples of one-hot rows, sparse: of the classes which occur.
    present, ids = np.unique(np.concatenate([y, best]), return_inverse=True)
    label, prediction, size = ids[:n], ids[n:], len(present)
    index, hits = np.arange(n), np.flatnonzero(best == y)
    columns = np.concatenate([label[hits], size + label, 2 * size + prediction])
    one_hot = csr_array((np.ones(len(columns)), (np.concatenate([hits, index, index]), columns)), shape=(n, 3 * size))
    soft = np.empty((n, 0)) if targets is None else np.column_stack(soft_scores(matrix, targets))
    parts = []
    for means in poisson_means(hstack([one_hot, csr_array(soft)], format="csr"), repetitions, seed):
        drawn = ClassCounts(means[:, :size], means[:, size : 2 * size], means[:, 2 * size : 3 * size])
        parts.append(np.column_stack([*(score(drawn) for score in CLASS_SCORES.values()), means[:, 3 * size :]]))
    names = [*CLASS_SCORES, *("soft_nll", "soft_brier")[: soft.shape[1]]]
    draws = dict(zip(names, np.concatenate(parts).T, strict=True))
    values = {name: float(score(counts)) for name, score in CLASS_SCORES.items()}
    values |= dict(zip(names[len(CLASS_SCORES) :], map(float, soft.mean(axis=0)), strict=True))
    table = {}
    for name, value in values.items():
        low, high = np.quantile(draws[name], _TAILS)
        table[name] = {"value": value} | ({"low": float(low), "high": float(high)} if high > low else {})
    marks = [y, *([] if targets is None else [np.asarray(targets, dtype=np.float64)])]
    return table, Draws(fingerprint(*marks, repetitions, seed, "classes"), n, values, draws)


def class_table(logits: Any, labels: Any) -> list[dict[str, float | int | None]]:
    """Each class [K] of logits [n, K] and labels [n]: how it is found, and how far its probability can be trusted.

    "n" labels of it; "precision", "recall", "f1", 0 to 1, None where undefined; "probability", its mean p_k over all examples,
    less "share", how often it is the label, is "signed_gap" (above 0: predicted with too much probability); "ece" of p_k against
    whether k is the label, 15 bins, 0 to 1, lower is better (their mean is `ece_classwise`).

    Raises: as `check_logits` and `check_labels`.
    """
    p = softmax(logits)
    n, k = p.shape
    y = check_labels(labels, n, k)
    counts = ClassCounts.of(p.argmax(axis=1), y, k)
    precision, recall, f1 = _ratio(counts.right, counts.predicted), _ratio(counts.right, counts.labelled), counts.f1()
    table: list[dict[str, float | int | None]] = []
    for i in range(k):
        gaps = np.bincount(bin_index(np.minimum(p[:, i], 1.0), N_BINS), weights=p[:, i] - (y == i), minlength=N_BINS) / n
        row = {"precision": precision[i], "recall": recall[i], "f1": f1[i], "probability": p[:, i].mean()}
        row |= {"share": counts.labelled[i] / n, "signed_gap": gaps.sum(), "ece": np.abs(gaps).sum()}
        table.append({"n": int(counts.labelled[i])} | {name: None if np.isnan(v) else float(v) for name, v in row.items()})
    return table
