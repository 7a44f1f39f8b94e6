"""Calibration metrics: float64 functions over NumPy arrays, and the same as offline `evaluate` modules (`path`).

Importing it loads neither torch nor `evaluate`.
"""

from __future__ import annotations

from pathlib import Path

from hf_ls.common.errors import did_you_mean
from hf_ls.metrics.core import (
    PredictionStatistics,
    ReliabilityBins,
    aurc,
    brier,
    e_aurc,
    ece,
    ece_classwise,
    ece_equal_mass,
    full_ece,
    mce,
    nll,
    reliability_bins,
    rmsce_debiased,
    signed_gap,
    smooth_ece,
    softmax,
)
from hf_ls.metrics.intervals import bootstrap_interval, classwise_interval, consistency_band, null_ece, wilson_interval
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.metrics.summary import summarise
from hf_ls.metrics.tokens import TokenCalibration

__all__ = [
    "PredictionStatistics",
    "ReliabilityBins",
    "StreamingCalibration",
    "TokenCalibration",
    "aurc",
    "bootstrap_interval",
    "brier",
    "classwise_interval",
    "consistency_band",
    "e_aurc",
    "ece",
    "ece_classwise",
    "ece_equal_mass",
    "full_ece",
    "mce",
    "nll",
    "null_ece",
    "path",
    "reliability_bins",
    "rmsce_debiased",
    "signed_gap",
    "smooth_ece",
    "softmax",
    "summarise",
    "wilson_interval",
]

_MODULES = Path(__file__).parent / "modules"


def path(name: str) -> str:
    """Return the folder of one metric for `evaluate.load(path("ece"))`, which needs no network.

    Raises:
        ValueError: no metric of that name.
    """
    names = sorted(folder.name for folder in _MODULES.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in names:
        hint = did_you_mean(str(name), names, f"choose one of {', '.join(names)}")
        raise ValueError(f"expected the name of a metric, got {name!r}; {hint}")
    return str(_MODULES / name)
