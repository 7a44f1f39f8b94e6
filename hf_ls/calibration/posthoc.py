"""What can be done after training beside one temperature: vector and matrix scaling, isotonic regression, selective scores.

Each is fitted on validation hard labels and applied to other logits. A map sees the classes relative to each other only: adding a
constant to a row of logits changes nothing. None of them is baked into a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import log_softmax, softmax

from hf_ls.calibration.temperature import NoFiniteTemperature, apply_temperature, fit_temperature
from hf_ls.common.errors import extra
from hf_ls.metrics.core import PredictionStatistics, aurc, ece
from hf_ls.metrics.paired import differences, draws_of_examples
from hf_ls.metrics.validation import Floats, check_labels, check_logits

POWERS = (1, 2, 3, 4, 5, 6, 7, 8)
_GRADIENT_TOLERANCE = 1e-8


@dataclass(frozen=True)
class VectorScaling:
    """Logits w ⊙ (z − mean z) + b with a weight and a bias per class [K], which may change the predicted class.

    The mean of a row is taken away first: the softmax does not see it, but unequal weights would. Source: Guo et al. 2017.
    """

    weight: Floats
    bias: Floats

    def __call__(self, logits: Any) -> Floats:
        """Scaled logits [n, K] in float64.

        Raises: ValueError for another number of classes or −inf logits; TypeError, ValueError as `check_logits`.
        """
        return _centred(_matrix(logits, len(self.weight))) * self.weight + self.bias


def fit_vector_scaling(logits: Any, labels: Any) -> VectorScaling:
    """The w and b [K], Σ b = 0, which minimise the mean NLL of labels [n] under softmax(w ⊙ (z − mean z) + b), in float64.

    The NLL is convex in (w, b); with 2·K parameters it needs validation rows of every class.

    Raises:
        ValueError: a class without a label, fewer rows than parameters, −inf logits, or an NLL without a minimum (separable
            rows); TypeError, ValueError as `check_logits` and `check_labels`.
    """
    z = check_logits(logits).astype(np.float64)
    n, k = z.shape
    y = check_labels(labels, n, k)
    absent = np.setdiff1d(np.arange(k), y)
    if absent.size or n < 2 * k:
        lacking = f"none of class {absent[:5].tolist()}" if absent.size else "every class"
        raise ValueError(
            f"expected at least {2 * k} rows with a label of every class, got {n} rows and {lacking}; "
            "use more validation data, or a temperature, which has one parameter"
        )
    z = _centred(z)
    scale = float(z.std()) or 1.0
    x, hot = z / scale, np.eye(k)[y]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        w, b = parameters[:k], parameters[k:]
        log_p = log_softmax(x * w + b, axis=1)
        residual = (np.exp(log_p) - hot) / n
        return -float(log_p[np.arange(n), y].mean()), np.concatenate([(residual * x).sum(0), residual.sum(0)])

    start = np.concatenate([np.full(k, scale), np.zeros(k)])
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": _GRADIENT_TOLERANCE}
    )
    steepest = np.abs(found.jac).max()
    if not (np.isfinite(found.x).all() and steepest < 1e-4) or found.fun < 1e-6:
        raise ValueError(
            f"expected an NLL with a minimum, got one still falling at {found.fun:.3g} after {found.nit} steps: the validation "
            "rows are all but separable; use more of them, or keep the logits"
        )
    return VectorScaling(found.x[:k] / scale, found.x[k:] - found.x[k:].mean())


def _centred(z: Floats) -> Floats:
    """Logits less the mean of their row."""
    if not np.isfinite(z).all():
        raise ValueError(
            "expected finite logits for vector and matrix scaling, got a probability which is exactly 0; use a temperature or "
            "isotonic regression where classes are masked"
        )
    return z - z.mean(axis=1, keepdims=True)


def fit_structured_matrix_scaling(logits: Any, labels: Any) -> Callable[[Any], Floats]:
    """The map of logits [n, K] to probabilities softmax(W·log p + b), fitted to labels [n].

    p = (n·softmax(logits / T) + 1 / K) / (n + 1). After T the regularised NLL
    + K·(Σ_k (W_kk − 1)² + Σ_k b_k²) / n + K·(K − 1)·Σ_{j≠k} W_jk² / n is minimised, so that few rows leave little but the
    temperature. It may change the predicted class. By the library `probmetrics`, whose logarithms are float32. Source: Berta et
    al. 2025 (Structured matrix scaling).

    Raises:
        ImportError: probmetrics or numba is not installed.
        ValueError: −inf logits; TypeError, ValueError as `check_logits` and `check_labels`.
    """
    z = _centred(check_logits(logits).astype(np.float64))
    y = check_labels(labels, *z.shape)
    with extra("posthoc", "structured matrix scaling"):
        from probmetrics.calibrators import SMSCalibrator
    calibrator = SMSCalibrator().fit(softmax(z, axis=1), y)
    return lambda other: np.asarray(calibrator.predict_proba(softmax(_centred(_matrix(other, z.shape[1])), axis=1)))


@dataclass(frozen=True)
class IsotonicCalibration:
    """One non-decreasing map of each class probability, then rows divided by their sum. Source: Zadrozny and Elkan 2002.

    A class may get probability 0, so that the NLL of a new row can be infinite: judge it by Brier score and ECE.
    """

    knots: tuple[Floats, ...]
    values: tuple[Floats, ...]

    def __call__(self, logits: Any) -> Floats:
        """Probabilities [n, K] in float64; a row which every map sends to 0 becomes uniform.

        Raises: ValueError for another number of classes; TypeError, ValueError as `check_logits`.
        """
        p = softmax(_matrix(logits, len(self.knots)), axis=1)
        maps = zip(p.T, self.knots, self.values, strict=True)
        mapped = np.stack([np.interp(column, knots, values) for column, knots, values in maps], axis=1)
        total = mapped.sum(axis=1, keepdims=True)
        return np.where(total > 0, mapped / np.where(total > 0, total, 1.0), 1.0 / mapped.shape[1])


def fit_isotonic(logits: Any, labels: Any) -> IsotonicCalibration:
    """For each class k the non-decreasing f which minimises Σ_i (f(p_ik) − [y_i = k])², p = softmax(logits [n, K]).

    Equal p share one value (the mean of theirs, weighted by their number); f is linear between knots and constant beyond. At
    K = 2 the two maps mirror each other, so that rows already sum to 1 between the ends.

    Raises: TypeError, ValueError as `check_logits` and `check_labels`.
    """
    z = check_logits(logits).astype(np.float64)
    y = check_labels(labels, *z.shape)
    knots, values = [], []
    for k, column in enumerate(softmax(z, axis=1).T):
        known, group, count = np.unique(column, return_inverse=True, return_counts=True)
        mean = np.bincount(group, weights=(y == k).astype(np.float64)) / count
        knots.append(known)
        values.append(np.asarray(isotonic_regression(mean, weights=count.astype(np.float64)).x))
    return IsotonicCalibration(tuple(knots), tuple(values))


@dataclass(frozen=True)
class SelectiveScore:
    """The score by which a classifier keeps or refuses its predictions: higher is kept first.

    power: None for the maximal softmax probability, else p of max_k z̃_k / ‖z̃‖_p with z̃ = z − mean z ("logit normalisation").
    validation_aurc: what each candidate scored where it was chosen, 0 to 1, lower is better; None is the probability.
    """

    power: int | None
    validation_aurc: dict[int | None, float]

    @property
    def name(self) -> str:
        """In words, for tables."""
        return "max probability" if self.power is None else f"max logit / {self.power}-norm"

    def __call__(self, logits: Any) -> Floats:
        """The score [n] of each row of logits [n, K], 0 to 1. It ranks; it is no probability.

        Raises: TypeError, ValueError as `selective_score`.
        """
        return selective_score(logits, self.power)


def selective_score(logits: Any, power: int | None = None) -> Floats:
    """Max softmax probability (power None), or the centred max logit over its p-norm, for logits [n, K]; shape [n], 0 to 1.

    Raises: ValueError for K = 2 with a power (both logits have the same size there, so that every row scores the same), power
    below 1, or −inf logits with a power; TypeError, ValueError as `check_logits`. Source: Cattelan and Silva 2024.
    """
    z = check_logits(logits).astype(np.float64)
    if power is None:
        return softmax(z, axis=1).max(axis=1)
    if z.shape[1] == 2:
        raise ValueError(
            "expected 3 or more classes for logit normalisation, got 2: every row would score the same; use power=None"
        )
    if power < 1:
        raise ValueError(f"expected power >= 1 or None, got {power}; None is the maximal probability")
    if not np.isfinite(z).all():
        raise ValueError(
            "expected finite logits for logit normalisation, got a probability which is exactly 0; use power=None where classes "
            "are masked"
        )
    centred = z - z.mean(axis=1, keepdims=True)
    top = np.abs(centred).max(axis=1, keepdims=True)
    unit = centred / np.where(top > 0, top, 1.0)  # keeps high powers from under- and overflowing
    norm = (np.abs(unit) ** power).sum(axis=1) ** (1.0 / power)
    return np.where(top[:, 0] > 0, unit.max(axis=1) / np.where(norm > 0, norm, 1.0), 0.0)


def choose_selective_score(logits: Any, labels: Any, powers: Sequence[int] = POWERS) -> SelectiveScore:
    """The score with the least AURC on validation logits [n, K] and labels [n]; a power must beat the probability to be chosen.

    Label smoothing makes the maximal probability rank errors worse; the normalised logit repairs some of that (Xia et al. 2025).

    Raises: ValueError at K = 2, where all these scores rank alike (see `selective_score`); as `selective_score`.
    """
    z = check_logits(logits)
    y = check_labels(labels, *z.shape)
    if z.shape[1] == 2:
        raise ValueError(
            "expected 3 or more classes to choose a selective score, got 2: logit normalisation scores every row the same there; "
            "use the maximal probability"
        )
    correct = z.argmax(axis=1) == y
    scores: dict[int | None, float] = {power: aurc(selective_score(z, power), correct) for power in (None, *powers)}
    return SelectiveScore(min(scores, key=lambda power: scores[power]), scores)


def compare_posthoc(
    validation: tuple[Any, Any], test: tuple[Any, Any], *, impossible: bool = False
) -> dict[str, dict[str, float | str]]:
    """Every method fitted on (logits, labels) of validation and measured on those of test: name -> accuracy, nll (nats, may be
    infinite), brier, ece, aurc; a method which cannot be fitted has "refused", the reason, instead. Structured matrix scaling is
    among them where its library is installed.

    Of the two proper scores also what the method changes, paired over the test examples: `nll_change` with its 95 % interval
    `nll_change_low` to `nll_change_high`, and `brier_change` alike, below 0 where it is better than no method; none of an
    infinite NLL. By these methods are ranked, since an ECE can be made small without any knowledge (Gneiting and Raftery 2007).

    impossible: as `PredictionStatistics.from_logits`, for logarithms of probabilities.

    Raises: TypeError, ValueError for invalid logits or labels.
    """
    logits, labels = test
    y = check_labels(labels, *check_logits(logits).shape)

    whole = impossible or not any(
        np.isneginf(check_logits(z)).any() for z, _ in (validation, test)
    )  # a masked class gets no mass

    def with_every_class() -> tuple[Any, Any]:
        if whole:
            return validation
        raise ValueError("expected every class in every row, got rows with fewer options than others; use a temperature")

    def scored(z: Any) -> PredictionStatistics:
        return PredictionStatistics.from_logits(z, y, impossible=impossible)

    stats = {"none": scored(logits)}
    found: dict[str, dict[str, float | str]] = {"none": _measure(stats["none"])}
    fits: dict[str, Callable[[], PredictionStatistics]] = {
        "temperature": lambda: scored(apply_temperature(logits, fit_temperature(*validation))),
        "vector scaling": lambda: scored(fit_vector_scaling(*with_every_class())(logits)),
        "isotonic": lambda: PredictionStatistics.from_probabilities(fit_isotonic(*with_every_class())(logits), y),
    }
    if find_spec("probmetrics") and find_spec("numba"):  # it imports numba, but does not bring it
        fits["structured matrix scaling"] = lambda: PredictionStatistics.from_probabilities(
            fit_structured_matrix_scaling(*with_every_class())(logits), y
        )
    for name, fit in fits.items():
        try:
            stats[name] = fit()
            found[name] = _measure(stats[name])
        except (NoFiniteTemperature, ValueError) as error:
            found[name] = {"refused": str(error)}
    for change in differences({name: [draws_of_examples(each, y)] for name, each in stats.items()}):
        if change.against == "none" and change.metric in ("nll", "brier"):
            ends = {"_low": change.low, "": change.value, "_high": change.high}
            found[change.row] |= {f"{change.metric}_change{end}": value for end, value in ends.items() if value is not None}
    try:
        score = choose_selective_score(*with_every_class())
        found["selective score"] = {
            "chosen": score.name,
            "aurc": aurc(score(logits), check_logits(logits).argmax(axis=1) == y),
        }
    except ValueError as error:
        found["selective score"] = {"refused": str(error)}
    return found


def _measure(stats: PredictionStatistics) -> dict[str, float | str]:
    return {
        "accuracy": float(stats.correct.mean()),
        "nll": float(stats.nll.mean()),
        "brier": float(stats.brier.mean()),
        "ece": ece(stats.confidence, stats.correct),
        "aurc": aurc(stats.confidence, stats.correct),
    }


def _matrix(logits: Any, num_classes: int) -> Floats:
    z = check_logits(logits).astype(np.float64)
    if z.shape[1] != num_classes:
        raise ValueError(f"expected logits of {num_classes} classes, got {z.shape[1]}; fit and apply with the same model")
    return z
