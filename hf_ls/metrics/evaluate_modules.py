"""The calibration metrics as `evaluate.Metric` classes, usable directly or by `evaluate.load(path(name))`.

Here are the features, the settings, and checks before Arrow can cast a wrong input into a plausible one: it turns the label
1.5 into 1 and "1" into 1. `evaluate` wants one class per metric, so they share one base for the checks; each file
`modules/<name>/<name>.py` imports exactly one of them, because `evaluate.load` takes the first it finds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_ls.common.errors import did_you_mean
from hf_ls.metrics import core
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.validation import check_count, check_labels, check_logits, check_probabilities

_INPUTS = """
Args:
    predictions: [n, K] probabilities, rows summing to 1; logits if the metric was built with from_logits=True
    references: [n] integer labels in [0, K)
Settings go to the constructor: from_logits, and for binned metrics n_bins (15).
"""
_EVALUATE_OPTIONS = tuple(inspect.signature(evaluate.Metric.__init__).parameters)[1:-1]


class CalibrationMetric(evaluate.Metric):
    """The part that all metrics share: settings, features and checks; subclasses say which function they are.

    Raises:
        TypeError: an unknown setting, or n_bins for a metric without bins.
        ValueError: n_bins < 1.
    """

    function: Callable[..., float]
    binned = False

    def __init__(self, *, from_logits: bool = False, n_bins: int | None = None, **options: Any) -> None:
        """Take the settings; `options` are those of `evaluate.Metric`, such as cache_dir."""
        known = (*_EVALUATE_OPTIONS, "from_logits", *(["n_bins"] if self.binned else []))
        given = [*options, *([] if n_bins is None else ["n_bins"])]
        for option in given:  # evaluate itself would swallow it
            if option not in known:
                hint = did_you_mean(option, known, "leave it out")
                raise TypeError(f"expected settings of {', '.join(known)}, got {option!r}; {hint}")
        if not isinstance(from_logits, bool):
            raise TypeError(f"expected from_logits to be True or False, got {from_logits!r}; give a bool")
        self.from_logits = from_logits
        self.n_bins = check_count(15 if n_bins is None else n_bins, "n_bins")
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(self.function) or "",
            citation="",
            license="Apache-2.0",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _check(self, predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return (predictions [n, K], references [n]) as arrays, or raise the named error."""
        if predictions is None or references is None:
            raise ValueError("expected predictions and references, got only one of them; give both together")
        scores = check_logits(predictions) if self.from_logits else check_probabilities(predictions)
        return scores, check_labels(references, *scores.shape)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Check and store predictions [n, K] and references [n].

        Raises:
            TypeError, ValueError: wrong inputs; nothing of the batch is then stored.
        """
        scores, labels = self._check(predictions, references)
        super().add_batch(predictions=scores, references=labels, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Check and store one prediction [K] and its reference.

        Raises:
            TypeError, ValueError: wrong inputs; nothing is then stored.
        """
        # `evaluate.combine(...).add` calls the two by their plural names.
        row, label = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        scores, labels = self._check([row], [label])
        super().add(prediction=scores[0], reference=labels[0], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict | None:
        """Return {name: value} as a Python float over everything added and the given arrays.

        Raises:
            TypeError, ValueError: wrong or no inputs, or a setting, which belongs to the constructor.
        """
        if kwargs:
            raise TypeError(
                f"expected only predictions and references, got {sorted(kwargs)}; "
                f"give settings to the constructor: evaluate.load(path, {next(iter(kwargs))}=...)"
            )
        if predictions is None and references is None and len(self) == 0:
            raise ValueError(
                "expected at least one prediction, got none; call add() or add_batch() before, or give predictions and references"
            )
        return super().compute(predictions=predictions, references=references)

    def _statistics(self, predictions: Any, references: Any) -> PredictionStatistics:
        if self.from_logits:
            return PredictionStatistics.from_logits(predictions, references)
        return PredictionStatistics.from_probabilities(predictions, references)

    def _value(self, predictions: Any, references: Any) -> float:
        """Return the metric; here for functions of (confidence, correct[, n_bins])."""
        stats = self._statistics(predictions, references)
        settings = {"n_bins": self.n_bins} if self.binned else {}
        return type(self).function(stats.confidence, stats.correct, **settings)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.name: float(self._value(predictions, references))}


class Nll(CalibrationMetric):
    """The mean negative log likelihood in nats."""

    function = staticmethod(core.nll)

    def _value(self, predictions: Any, references: Any) -> float:
        value = self._statistics(predictions, references).nll.mean()
        if np.isinf(value):  # would be written as the invalid JSON token Infinity
            raise ValueError(
                "expected a probability above 0 for every label, got 0, whose nll is infinite; "
                "give logits to the metric built with from_logits=True"
            )
        return value


class Brier(CalibrationMetric):
    """The Brier score, summed over classes: 0 to 2."""

    function = staticmethod(core.brier)

    def _value(self, predictions: Any, references: Any) -> float:
        return self._statistics(predictions, references).brier.mean()


class Ece(CalibrationMetric):
    """The expected calibration error of the top label over equal-width bins."""

    function = staticmethod(core.ece)
    binned = True


class EceEqualMass(CalibrationMetric):
    """The expected calibration error over tie-aware bins of equal mass."""

    function = staticmethod(core.ece_equal_mass)
    binned = True


class EceClasswise(CalibrationMetric):
    """The calibration error of every class's probability, averaged over the classes."""

    function = staticmethod(core.ece_classwise)
    binned = True

    def _value(self, predictions: Any, references: Any) -> float:
        probabilities = core.softmax(predictions) if self.from_logits else predictions
        return core.ece_classwise(probabilities, references, self.n_bins)


class FullEce(CalibrationMetric):
    """The calibration error of all probabilities together, not only the largest ones."""

    function = staticmethod(core.full_ece)
    binned = True

    def _value(self, predictions: Any, references: Any) -> float:
        probabilities = core.softmax(predictions) if self.from_logits else predictions
        return core.full_ece(probabilities, references, self.n_bins)


class Mce(CalibrationMetric):
    """The largest calibration error of any bin."""

    function = staticmethod(core.mce)
    binned = True


class RmsceDebiased(CalibrationMetric):
    """The debiased root mean square calibration error."""

    function = staticmethod(core.rmsce_debiased)
    binned = True


class SmoothEce(CalibrationMetric):
    """The smooth calibration error, with the library relplot."""

    function = staticmethod(core.smooth_ece)


class SignedGap(CalibrationMetric):
    """Confidence minus accuracy: above 0 is over-confident."""

    function = staticmethod(core.signed_gap)


class Aurc(CalibrationMetric):
    """The area under the risk-coverage curve."""

    function = staticmethod(core.aurc)


class EAurc(CalibrationMetric):
    """The area under the risk-coverage curve, less that of the best ranking with as many errors."""

    function = staticmethod(core.e_aurc)
