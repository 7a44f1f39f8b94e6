"""One set as all runs of a comparison saw it: values, intervals and paired differences, asked alike of examples and of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ls.compare.comparison import METRICS, TokenStatistics
from hf_ls.metrics.core import PredictionStatistics, rmsce_debiased, smooth_ece
from hf_ls.metrics.intervals import BINNED, bootstrap_interval
from hf_ls.metrics.paired import COMPARED, RESAMPLED, Contrast, Resamples, contrast, seed_difference

# Of tokens: what others say too (exp of the NLL, another cut of the same bins), or one bin alone.
_LEFT_OUT = ("perplexity", "ece_equal_mass", "mce")


class Examples:
    """Models with statistics of each prediction, a prediction or a cluster of them being what is drawn anew.

    Attributes: units: how many of these; clustered; compared: the metrics whose differences are told.
    """

    compared: tuple[str, ...] = COMPARED

    def __init__(self, models: Sequence[PredictionStatistics], cluster: Any, *, repetitions: int, seed: int) -> None:
        self._models, self.repetitions, self._seed = models, repetitions, seed
        self._resamples = Resamples(models, cluster, repetitions=repetitions, seed=seed)
        self.units, self.clustered = self._resamples.units, cluster is not None

    def values(self, model: int) -> dict[str, float]:
        """Every metric of one model by name."""
        stats = self._models[model]
        found = dict(zip(RESAMPLED, self._resamples.values[model].tolist(), strict=True))
        found["null_ece"], found["null_ece_q95"] = self._resamples.null_ece(model)
        found["rmsce_debiased"] = rmsce_debiased(stats.confidence, stats.correct)
        found["smooth_ece"] = smooth_ece(stats.confidence, stats.correct)
        return {metric: found[metric] for metric in METRICS}

    def interval(self, model: int, metric: str, level: float) -> tuple[float, float] | None:
        """The interval of one metric over the units; None where there is no sound one, or none of clusters."""
        if metric in RESAMPLED:
            return self._resamples.interval(model, metric, level)
        if metric not in BINNED or self.clustered:
            return None
        return bootstrap_interval(metric, self._models[model], repetitions=self.repetitions, level=level, seed=self._seed)

    def difference(self, models: Sequence[int], references: Sequence[int], metric: str, level: float, **names: str) -> Contrast:
        """As `Resamples.difference`."""
        return self._resamples.difference(models, references, metric, level, **names)


class Tokens:
    """Models with sums over the tokens of the same sequences, which are drawn anew as a whole; attributes as `Examples`.

    A metric of which not every model has draws is compared as a number, over seeds alone.
    """

    clustered = True

    def __init__(self, models: Sequence[TokenStatistics]) -> None:
        self._models = models
        self._draws = [{metric: draws for draws in model.draws for metric in draws.draws} for model in models]
        drawn = set.intersection(*(set(found) for found in self._draws))
        self.units = models[0].sequences
        self.repetitions = max(len(draws) for one in models[0].draws for draws in one.draws.values())
        shared = [metric for metric in models[0].row.quality if all(metric in model.row.metrics for model in models)]
        self.compared = (*(metric for metric in COMPARED if metric in drawn), *shared)
        self._drawn = drawn

    def values(self, model: int) -> dict[str, float]:
        """Every metric of one model by name, as far as it is defined."""
        row = self._models[model].row
        found = {metric: row.value(metric) for metric in row.metrics if metric not in _LEFT_OUT}
        null = row.metrics["ece"]
        found["null_ece"], found["null_ece_q95"] = (float(null[key]) for key in ("null", "null_q95"))  # type: ignore[arg-type]
        ordered = [*(metric for metric in METRICS if metric in found), *row.quality]
        return {metric: found[metric] for metric in dict.fromkeys([*ordered, *found]) if not math.isnan(found[metric])}

    def interval(self, model: int, metric: str, level: float) -> tuple[float, float] | None:
        """The 95 % interval of one metric over sequences; None where there is no sound one."""
        return self._models[model].row.interval(metric)

    def difference(self, models: Sequence[int], references: Sequence[int], metric: str, level: float, **names: str) -> Contrast:
        """As `Resamples.difference`, over sequences."""
        ours, theirs = ([self._models[i].row.value(metric) for i in rows] for rows in (models, references))
        if metric not in self._drawn:
            return seed_difference(metric, ours, theirs, level, **names)
        mine, other = (np.array([self._draws[i][metric].draws[metric] for i in rows]) for rows in (models, references))
        units = self._draws[models[0]][metric].units
        return contrast(metric, np.subtract(ours, theirs), mine - other, units, level, **names)
