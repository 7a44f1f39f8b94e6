"""Input checks for the calibration metrics: every refusal is a ValueError or TypeError that names the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# A float32 softmax over 32,000 classes is off by less than 1e-5; a float16 or bfloat16 one by up to 1e-2.
ROW_SUM_TOLERANCE = 1e-3
# Fewer rows of logits might sum to 1 by accident.
FEWEST_PROBABILITIES = 10


def as_array(values: Any) -> NDArray[Any]:
    """`values` as a NumPy array: anything that NumPy takes, and torch tensors of every type, on any device, with or without grad.

    NumPy has no bfloat16 or float8: these become float32, which holds them exactly.
    """
    if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
        return np.stack([as_array(value) for value in values])
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:
        return np.asarray(tensor.float().numpy())


def _as_matrix(values: Any, name: str) -> NDArray[np.floating[Any]]:
    """Return `values` as a float array [n, K], in its own precision, with n >= 1 and K >= 2."""
    try:
        matrix = as_array(values)
    except ValueError as error:
        raise ValueError(f"expected {name} of shape [n, K], got ragged rows; give every row one value per class") from error
    if matrix.dtype.kind in "iu":
        matrix = matrix.astype(np.float64)
    if matrix.dtype.kind != "f":
        raise TypeError(
            f"expected numeric {name} of shape [n, K], got dtype {matrix.dtype}; "
            "convert to floats and remove None, strings and ragged rows"
        )
    if matrix.shape[0:1] == (0,):
        raise ValueError(f"expected at least one row of {name}, got none; check that the split is not empty")
    if matrix.ndim != 2:
        raise ValueError(
            f"expected {name} of shape [n, K], got shape {list(matrix.shape)}; "
            "give scores for every class rather than the predicted class, and flatten token dimensions"
        )
    if matrix.shape[1] < 2:
        raise ValueError(
            f"expected {name} with at least 2 classes, got {matrix.shape[1]}; "
            "for a single sigmoid output s give the two columns [1 - s, s]"
        )
    if np.isnan(matrix).any():
        rows = np.flatnonzero(np.isnan(matrix).any(axis=1))
        raise ValueError(f"expected {name} without NaN, got NaN in {rows.size} rows, first {rows[0]}; fix the model")
    return matrix


def check_logits(logits: Any) -> NDArray[np.floating[Any]]:
    """Return logits [n, K] as a float array in their own precision; −inf marks an impossible class.

    Raises:
        TypeError: not numeric.
        ValueError: wrong shape, empty, fewer than two classes, NaN, +inf, a row of −inf only, or ten rows and more which are
            probabilities.
    """
    matrix = _as_matrix(logits, "logits")
    top = matrix.max(axis=1)
    if not np.isfinite(top).all():
        row = int(np.flatnonzero(~np.isfinite(top))[0])
        raise ValueError(
            f"expected a finite largest logit in every row, got {top[row]} in row {row}; "
            "−inf may mask some classes but not all, and +inf usually means an overflow in half precision"
        )
    if len(matrix) >= FEWEST_PROBABILITIES and _are_probabilities(matrix):
        raise ValueError(
            f"expected logits, got {len(matrix)} rows of probabilities (from 0 to 1, each with sum 1); pass the scores before "
            "the softmax, or numpy.log of the probabilities (an evaluate module takes them with from_logits=False)"
        )
    return matrix


def _are_probabilities(matrix: NDArray[np.floating[Any]]) -> bool:
    """Whether no row could be anything else: one-hot rows could."""
    if matrix.min() < 0.0 or matrix.max() > 1.0 or not ((matrix > 0.0) & (matrix < 1.0)).any():
        return False
    return bool((np.abs(matrix.sum(axis=1, dtype=np.float64) - 1.0) <= ROW_SUM_TOLERANCE).all())


def check_probabilities(probabilities: Any) -> NDArray[np.floating[Any]]:
    """Return probabilities [n, K] as a float array in their own precision, rows summing to 1 within 1e-3.

    Raises:
        TypeError: not numeric.
        ValueError: wrong shape, empty, NaN, values outside 0 to 1 (logits?) or rows which do not sum to 1.
    """
    matrix = _as_matrix(probabilities, "probabilities")
    low, high = float(matrix.min()), float(matrix.max())
    if low < 0.0 or high > 1.0 + ROW_SUM_TOLERANCE:
        raise ValueError(
            f"expected probabilities from 0 to 1, got values from {low:.6g} to {high:.6g}, "
            "which look like logits; apply hf_ls.metrics.softmax to them (an evaluate module takes them with from_logits=True)"
        )
    sums = matrix.sum(axis=1, dtype=np.float64)
    off = np.flatnonzero(np.abs(sums - 1.0) > ROW_SUM_TOLERANCE)
    if off.size:
        raise ValueError(
            f"expected rows of probabilities that sum to 1 within {ROW_SUM_TOLERANCE}, "
            f"got {sums[off[0]]:.6g} in row {off[0]} ({off.size} rows in all); "
            "apply softmax over the classes in float32 or better"
        )
    return matrix


def check_label_type(labels: Any) -> Integers:
    """Return labels [n] as int64, refusing floats, strings, booleans and soft labels [n, K] before any cast.

    Raises:
        TypeError: not integers.
        ValueError: not one-dimensional, or empty.
    """
    try:
        array = as_array(labels)
    except ValueError as error:
        raise ValueError("expected labels of shape [n], got ragged rows; give one integer class per row") from error
    if array.shape[0:1] == (0,):
        raise ValueError("expected at least one label, got none; check that the split is not empty")
    if array.ndim != 1:
        raise ValueError(
            f"expected labels of shape [n], got shape {list(array.shape)}; "
            "give one hard class per row (the argmax of soft or one-hot labels) and flatten token dimensions"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"expected integer labels, got dtype {array.dtype}; map class names to ids, and cast with .astype(int)")
    return array.astype(np.int64)


def check_labels(labels: Any, n: int, num_classes: int) -> Integers:
    """Return labels [n] as int64 in [0, num_classes).

    Raises:
        TypeError: not integers.
        ValueError: wrong length or shape, −100 (the ignore index), or outside [0, num_classes).
    """
    array = check_label_type(labels)
    if array.size != n:
        raise ValueError(f"expected one label per prediction, got {n} predictions and {array.size} labels; align them")
    if (array == -100).any():
        raise ValueError(
            f"expected labels in [0, {num_classes}), "
            f"got {int((array == -100).sum())} labels −100 (ignore_index); "
            "drop those rows from predictions and labels first"
        )
    bad = np.flatnonzero((array < 0) | (array >= num_classes))
    if bad.size:
        raise ValueError(
            f"expected labels in [0, {num_classes}), got {array[bad[0]]} in row {bad[0]}; "
            "check the label mapping and the number of columns of the predictions"
        )
    return array


def check_confidence(confidence: Any, correct: Any) -> tuple[Floats, Booleans]:
    """Return (confidence [n] as float64 in 0 to 1, correct [n] as bool).

    Raises:
        TypeError: not numeric.
        ValueError: empty, not one-dimensional, of different lengths, NaN, or outside the range.
    """
    values, hits = as_array(confidence), as_array(correct)
    if values.dtype.kind not in "fiu" or hits.dtype.kind not in "biuf":
        raise TypeError(
            f"expected float confidence and boolean correct, got dtypes {values.dtype} and {hits.dtype}; convert them"
        )
    if values.ndim != 1 or values.shape != hits.shape:
        raise ValueError(
            "expected confidence and correct of one shape [n], "
            f"got {list(values.shape)} and {list(hits.shape)}; "
            "give one top-class probability and one outcome per prediction"
        )
    if values.size == 0:
        raise ValueError("expected at least one prediction, got none; check that the split is not empty")
    values = values.astype(np.float64)
    if not ((values >= 0.0) & (values <= 1.0)).all():  # written so that NaN fails too
        bad = values[~((values >= 0.0) & (values <= 1.0))][0]
        raise ValueError(f"expected confidence from 0 to 1, got {bad}; give the probability of the predicted class")
    if not ((hits == 0) | (hits == 1)).all():
        bad = hits[~((hits == 0) | (hits == 1))][0]
        raise ValueError(f"expected correct to hold only True and False, got {bad}; give prediction == label")
    return values, hits.astype(bool)


def check_count(value: Any, name: str, least: int = 1) -> int:
    """Return `value` as an int of at least `least`.

    Raises:
        TypeError: not an integer.
        ValueError: below it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"expected an integer {name}, got {value!r}; give a whole number such as 15")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}; give a whole number such as 15")
    return int(value)
