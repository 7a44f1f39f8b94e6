"""Warnings which teach: what the smoothing asks of the model against what the data show.

Owns: the ceiling of ε and the sentences of the warnings. Does not own: refusals (where the settings are read), regime and verdict
(`findings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ls.metrics.intervals import wilson_interval

if TYPE_CHECKING:
    from hf_ls.losses.smoothing import Convention


def epsilon_ceiling(error: float, num_classes: int, convention: str = "all") -> float:
    """The ε above which a model that is right as often as this one is forced to be under-confident.

    At the optimum the confidence is 1 − ε + ε/K under the "all" convention, so that ε = error·K/(K−1) gives a mean
    confidence equal to the accuracy; 1 − ε and ε = error under "wrong". 0 to 1.
    """
    return error * num_classes / (num_classes - 1) if convention == "all" else error


def ceiling_warning(
    epsilon: float, convention: Convention, accuracy: float, n: float, num_classes: int, who: str = "the model"
) -> str | None:
    """One sentence when ε lies above its ceiling for every error rate which n examples leave open (Wilson, 95 %), else None.

    >>> ceiling_warning(0.05, "all", 0.9, 1000, 2) is None
    True
    """
    if epsilon <= 0 or n < 1 or num_classes < 2:
        return None
    low, _ = wilson_interval(accuracy * n, n)
    error = 1 - accuracy
    if epsilon <= epsilon_ceiling(1 - float(low), num_classes, convention):
        return None
    from hf_ls.losses.smoothing import Smoothing

    ceiling, most = epsilon_ceiling(error, num_classes, convention), Smoothing(epsilon, convention).max_confidence(num_classes)
    return (
        f"epsilon {epsilon:g} lies above the confidence ceiling {ceiling:.3f} (error {error:.3f} of {who}, n = {n:,.0f}, "
        f"K = {num_classes:,}): a model which fits such targets is at most {most:.3f} sure and right more often; use an epsilon "
        "below the ceiling, or none and temperature scaling"
    )
