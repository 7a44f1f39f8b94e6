"""One table of every calibration metric which a report shows, with intervals where they are sound."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from hf_ls.metrics.core import (
    PredictionStatistics,
    aurc,
    e_aurc,
    ece,
    ece_classwise,
    ece_equal_mass,
    mce,
    rmsce_debiased,
    signed_gap,
    smooth_ece,
    softmax,
)
from hf_ls.metrics.intervals import STATISTICS, bootstrap_interval, classwise_interval, null_ece, wilson_interval

# Above this an interval of the classwise ECE would take longer than all else.
_MOST_PROBABILITIES = 1 << 22


def summarise(
    logits: Any, labels: Any, *, n_bins: int = 15, repetitions: int = 1000, seed: int = 0, clip: float | None = None
) -> dict[str, dict[str, float]]:
    """Return every metric of logits [n, K] and labels [n] as {name: {"value", and where sound "low",
    "high"}}.

    95 % intervals: Wilson for accuracy, `classwise_interval` for `ece_classwise`, `bootstrap_interval` for the others; `mce` and
    `e_aurc` have none, nor has `ece_classwise` above n·K = 4 million. `ece` also carries "null" and "null_q95", the mean and 95 %
    quantile for a perfectly calibrated model (`null_ece`). `smooth_ece` is absent where relplot is not
    installed. All values are plain Python floats; nll in nats.

    clip: None refuses a label whose logit is −inf, that is of probability 0. With a number such labels make the nll infinite,
    without an interval, and `nll` also carries "impossible", how many they are, and "clipped", the mean nll if no probability
    of a label were below `clip` (`log_loss` of scikit-learn clips at the machine epsilon of its input).

    >>> found = summarise([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1], repetitions=20)
    >>> {name: round(number, 2) for name, number in found["accuracy"].items()}
    {'value': 0.67, 'low': 0.21, 'high': 0.94}

    Raises:
        TypeError, ValueError: as `PredictionStatistics.from_logits`.
    """
    stats = PredictionStatistics.from_logits(logits, labels, impossible=clip is not None)
    impossible = int(np.isinf(stats.nll).sum())
    pair, probabilities = (stats.confidence, stats.correct), softmax(logits)
    values = {
        "accuracy": float(stats.correct.mean()),
        "nll": float(stats.nll.mean()),
        "brier": float(stats.brier.mean()),
        "ece": ece(*pair, n_bins),
        "ece_equal_mass": ece_equal_mass(*pair, n_bins),
        "ece_classwise": ece_classwise(probabilities, labels, n_bins),
        "mce": mce(*pair, n_bins),
        "rmsce_debiased": rmsce_debiased(*pair, n_bins),
        "signed_gap": signed_gap(*pair),
        "aurc": aurc(*pair),
        "e_aurc": e_aurc(*pair),
    }
    if importlib.util.find_spec("relplot") is not None:
        values["smooth_ece"] = smooth_ece(*pair)
    table = {name: {"value": value} for name, value in values.items()}
    drawn = {"n_bins": n_bins, "repetitions": repetitions, "seed": seed}
    classwise = ("ece_classwise",) if probabilities.size <= _MOST_PROBABILITIES else ()
    for name in filter(table.__contains__, (*STATISTICS, *classwise)):
        if name == "nll" and clip is not None and impossible:  # every resample with such a row is infinite
            table[name] |= {"impossible": float(impossible), "clipped": float(np.minimum(stats.nll, -np.log(clip)).mean())}
            continue
        if name == "accuracy":  # keeps its width at 0 and 100 %, where a bootstrap has none
            low, high = (float(end) for end in wilson_interval(stats.correct.sum(), len(stats)))
        elif name == "ece_classwise":
            low, high = classwise_interval(probabilities, labels, **drawn)
        else:
            low, high = bootstrap_interval(name, stats, **drawn)
        table[name] |= {"low": low, "high": high}
    table["ece"]["null"], table["ece"]["null_q95"] = null_ece(stats.confidence, n_bins, repetitions, seed)
    return table
