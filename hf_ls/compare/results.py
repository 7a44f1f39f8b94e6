"""From the predictions of a cell to its results, with and without temperature on every set; and which ε are dropped early."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy.stats import t as student

from hf_ls.calibration.temperature import NoFiniteTemperature, apply_temperature, fit_temperature
from hf_ls.compare.cells import Cell
from hf_ls.compare.comparison import TEST, Result, Variant
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.validation import Floats, Integers
from hf_ls.run.outcome import PREDICTIONS

OOD = "ood.npz"


@dataclass(frozen=True)
class Predictions:
    """Logits [n, K] and labels [n] of one cell on "validation", "test" and its out-of-domain sets."""

    cell: Cell
    logits: dict[str, Floats]
    labels: dict[str, Integers]

    @classmethod
    def load(cls, cell: Cell, folder: Path) -> Self:
        """Read what the cell left.

        Raises: ValueError without predictions on validation and test, and for logits which are not finite.
        """
        arrays: dict[str, np.ndarray] = {}
        for name in (PREDICTIONS, OOD):
            if (folder / name).is_file():
                with np.load(folder / name, allow_pickle=False) as saved:
                    arrays |= dict(saved)
        logits = {key.removeprefix("logits_"): value for key, value in arrays.items() if key.startswith("logits_")}
        missing = {"validation", TEST} - set(logits)
        if missing:
            raise ValueError(f"expected logits of {sorted(missing)} in {folder}, got none; compare text-classification")
        broken = [name for name, values in logits.items() if not np.isfinite(values).all()]
        if broken:
            raise ValueError(f"expected finite logits in {folder}, got others in {broken}; it diverged: lower the learning rate")
        return cls(cell, logits, {name: arrays[f"labels_{name}"] for name in logits})

    def nll(self, *, tempered: bool) -> Floats:
        """NLL of each validation example [n] in nats; tempered: by the temperature of the other half (cross-fitting)."""
        logits, labels = self.logits["validation"], self.labels["validation"]
        if not tempered:
            return PredictionStatistics.from_logits(logits, labels).nll
        out = np.empty(len(labels))
        # The same halves for every cell, so that differences stay paired.
        halves = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
        for fit, judged in (halves, halves[::-1]):
            scaled = apply_temperature(logits[judged], fit_or_one(logits[fit], labels[fit]))
            out[judged] = PredictionStatistics.from_logits(scaled, labels[judged]).nll
        return out

    def results(self) -> list[Result]:
        """The cell without and with a temperature fitted on all of validation."""
        fitted = fit_or_one(self.logits["validation"], self.labels["validation"])
        sets = [TEST, *(name for name in self.logits if name not in ("validation", TEST))]
        return [
            Result(
                variant=Variant(self.cell.variant, self.cell.epsilon, tempered),
                seed=self.cell.seed,
                temperature=temperature,
                validation_nll=float(self.nll(tempered=tempered).mean()),
                statistics={
                    name: PredictionStatistics.from_logits(apply_temperature(self.logits[name], temperature), self.labels[name])
                    for name in sets
                },
                labels={name: self.labels[name] for name in sets},
            )
            for tempered, temperature in ((False, 1.0), (True, fitted))
        ]

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.logits[TEST].shape[1])

    @property
    def validation_error(self) -> float:
        """Share of wrong predictions on validation."""
        return float(np.mean(self.logits["validation"].argmax(1) != self.labels["validation"]))


def fit_or_one(logits: Floats, labels: Integers) -> float:
    """The fitted temperature, or 1.0 (no scaling) where the NLL has no minimum at a finite one."""
    try:
        return fit_temperature(logits, labels)
    except NoFiniteTemperature:
        return 1.0


def clearly_worse(found: dict[float, list[Predictions]], level: float = 0.99) -> dict[float, tuple[float, float]]:
    """The ε > 0 whose validation NLL is measurably above that of the best ε, with the difference and its lower bound.

    Each ε is taken as the better of its two forms, without and with temperature, since either may be picked later; the
    differences are means over seeds of the same examples, the bound one-sided Student t at `level`. The best ε > 0 is never
    dropped.
    """
    scores = {
        epsilon: min(
            (np.mean([cell.nll(tempered=tempered) for cell in cells], axis=0) for tempered in (False, True)),
            key=lambda nll: float(nll.mean()),
        )
        for epsilon, cells in found.items()
    }
    best = min(scores, key=lambda epsilon: float(scores[epsilon].mean()))
    kept = min((epsilon for epsilon in scores if epsilon), key=lambda epsilon: float(scores[epsilon].mean()), default=0.0)
    worse = {}
    for epsilon, nll in scores.items():
        difference = nll - scores[best]
        n = len(difference)
        low = float(difference.mean() - student.ppf(level, n - 1) * difference.std(ddof=1) / np.sqrt(n))
        if epsilon not in (0.0, best, kept) and low > 0:
            worse[epsilon] = float(difference.mean()), low
    return worse
