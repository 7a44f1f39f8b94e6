"""What the accuracy of a model says about its training: the largest ε it can bear, and whether it has learnt anything at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ls.metrics.intervals import wilson_interval
from hf_ls.metrics.validation import as_array


def _moved(num_classes: int, convention: str) -> float:
    """The share of ε which leaves the label: 1 − 1/K for "all", all of it for "wrong"."""
    return 1 - 1 / num_classes if convention == "all" else 1.0


def epsilon_ceiling(error: float, num_classes: int, convention: str = "all") -> float:
    """The ε above which a model that is right as often as this one is forced to be under-confident, 0 to 1.

    At the optimum the confidence is 1 − ε + ε/K under the "all" convention, so that ε = error·K/(K−1) gives a mean
    confidence equal to the accuracy; 1 − ε and ε = error under "wrong". K is the number of logits of one prediction.
    """
    return min(1.0, error / _moved(num_classes, convention))


def last_epsilon(epsilon: float, schedule: Any = None) -> float:
    """The ε of the last training step, which the finished model was asked to meet.

    schedule: None for a constant ε, or a `Schedule`; "constant" (a warm-up only) ends at ε.
    """
    return epsilon if schedule is None or schedule.kind == "constant" else float(schedule.final_epsilon)


def ceiling_warning(
    epsilon: float | Sequence[float], convention: str, accuracy: float, n: float, num_classes: int, who: str = "the model"
) -> str | None:
    """One sentence on each ε above its ceiling for every error rate which n examples leave open (Wilson, 95 %), else None.

    epsilon: of the last step (`last_epsilon`), or several. n: examples; for tokens the sequences, because tokens of one
    sequence depend on each other. num_classes: the logits of one prediction, K.

    >>> ceiling_warning(0.05, "all", 0.9, 1000, 2) is None
    True
    """
    if n < 1 or num_classes < 2:
        return None
    ends = (1 - float(end) for end in reversed(wilson_interval(accuracy * n, n)))
    low, high = (epsilon_ceiling(error, num_classes, convention) for error in ends)
    epsilons = [epsilon] if isinstance(epsilon, int | float) else epsilon
    above = sorted({value for value in epsilons if value > high})
    if not above:
        return None
    ceiling = epsilon_ceiling(1 - accuracy, num_classes, convention)
    verb, at_most = ("lies", "at most") if len(above) == 1 else ("lie", "for the least of them at most")
    return (
        f"epsilon {', '.join(f'{value:g}' for value in above)} {verb} above the confidence ceiling {ceiling:.3f} "
        f"[{low:.3f}, {high:.3f}] (error {1 - accuracy:.3f} of {who}, n = {n:,.0f}, K = {num_classes:,}): a model which fits "
        f"such targets is {at_most} {1 - above[0] * _moved(num_classes, convention):.3f} sure and right more often; use an "
        "epsilon below the ceiling, or none and temperature scaling"
    )


def constant_scores(class_counts: Sequence[float]) -> tuple[float, float]:
    """(accuracy, NLL in nats) of a model which knows nothing but how frequent each class is among these labels.

    The share of the most frequent class, and the entropy of the shares.

    >>> tuple(round(score, 3) for score in constant_scores([90, 5, 5]))
    (0.9, 0.394)

    Raises: ValueError without any label.
    """
    counts = as_array(class_counts).astype(np.float64)
    if not counts.sum() > 0:
        raise ValueError(f"expected at least one label, got the counts {counts.tolist()}; count the evaluated split")
    shares = counts[counts > 0] / counts.sum()
    return float(shares.max()), float(-(shares * np.log(shares)).sum())


def guessing_scores(options: Sequence[int]) -> tuple[float, float]:
    """(expected accuracy, NLL in nats) of a model which finds all options of a question equally likely.

    options: how many each question has.

    >>> tuple(round(score, 3) for score in guessing_scores([2, 4]))
    (0.375, 1.04)
    """
    number = as_array(options).astype(np.float64)
    return float((1 / number).mean()), float(np.log(number).mean())


def has_learnt(accuracy_low: float, nll_high: float, uninformed: Sequence[float]) -> bool:
    """Whether predictions are measurably better than those of a model which knows nothing: in accuracy, or in NLL where one class
    is most labels.

    accuracy_low, nll_high: the worse ends of their 95 % intervals. uninformed: `constant_scores` or `guessing_scores`. Labels of
    a single class tell nothing, and give True.
    """
    accuracy, nll = uninformed
    return accuracy == 1 or accuracy_low > accuracy or nll_high < nll
