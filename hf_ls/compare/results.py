"""What a cell measures beside its run, and its results, with and without temperature on every set; which ε are dropped early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from datasets import DatasetDict, load_dataset
from scipy.stats import t as student

from hf_ls.calibration.temperature import NoFiniteTemperature, apply_temperature, fit_temperature
from hf_ls.calibration.token_temperature import CrossFittedTemperature
from hf_ls.common.files import write_arrays
from hf_ls.compare.cells import Cell, Spec
from hf_ls.compare.comparison import TEST, Result, TokenStatistics, Variant
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.validation import Floats, Integers
from hf_ls.run.config import Config
from hf_ls.run.loading import Loaded, load_tokens
from hf_ls.run.outcome import PREDICTIONS, Outcome, measure_tokens, predict
from hf_ls.run.publish import folder_of
from hf_ls.run.tasks import TASKS

OOD = "ood.npz"
OOD_OUTCOMES = "ood"  # a folder, with one of an outcome for each set of sequences
VALIDATION = "validation.npz"


def measure_more(config: Config, spec: Spec, trainer: Any, loaded: Loaded, outcome: Outcome) -> None:
    """What a comparison needs beside the files of a run: the out-of-domain sets, and of sequences the NLL of each on validation.

    Of classes it leaves logits; of tokens the sums of each set, and of each validation sequence its tokens, NLL, and NLL at a
    temperature of other sequences.
    """
    folder, task = folder_of(config), TASKS[config.run.task]
    tokens = {}
    with config.training.main_process_first(desc="out-of-domain sets"):
        sets = {name: load_dataset("parquet", data_files=path, split="train") for name, path in spec.ood.items()}
        for name, rows in sets.items():
            data = replace(loaded.data, splits=DatasetDict(train=rows))
            tokens[name] = load_tokens(config, data, loaded.tokenizer, loaded.form)["train"]
    if not task.per_token:
        found = {name: predict(trainer, part, f"ood_{name}") for name, part in tokens.items()}
        arrays = {f"logits_{name}": np.asarray(output.predictions, np.float64) for name, output in found.items()}
        arrays |= {f"labels_{name}": np.asarray(output.label_ids) for name, output in found.items()}
        if arrays and config.training.should_save:
            write_arrays(folder / OOD, **arrays)
        return
    temperature = next((row.temperature for row in outcome.rows if row.tempered), None)
    for name, part in tokens.items():
        measured, _ = measure_tokens(
            trainer, name, part, sets[name], config.run.text_metrics,
            temperature=temperature, prefix=f"ood_{name}", has_classes=task.has_classes,
        )  # fmt: skip
        if config.training.should_save:
            measured.save(folder / OOD_OUTCOMES / name)
    trainer.cross_fitted = CrossFittedTemperature(keep=True)
    output = predict(trainer, loaded.tokens["validation"], "eval", loss_only=True)
    count, nll, crossed = trainer.cross_fitted.by_example()
    trainer.cross_fitted = None
    if config.training.should_save:
        accuracy = np.array(output.metrics["eval_accuracy"])
        write_arrays(folder / VALIDATION, count=count, nll=nll, crossed=crossed, accuracy=accuracy)


@dataclass(frozen=True)
class Predictions:
    """Logits [n, K] and labels [n] of one cell on "validation", "test" and its out-of-domain sets."""

    cell: Cell
    logits: dict[str, Floats]
    labels: dict[str, Integers]
    needed: ClassVar[frozenset[str]] = frozenset({"validation", TEST})

    @classmethod
    def load(cls, cell: Cell, folder: Path, **more: Any) -> Self:
        """Read what the cell left; more: further fields.

        Raises: ValueError without predictions on validation and test, and for logits which are not finite.
        """
        arrays: dict[str, np.ndarray] = {}
        for name in (PREDICTIONS, OOD):
            if (folder / name).is_file():
                with np.load(folder / name, allow_pickle=False) as saved:
                    arrays |= dict(saved)
        logits = {key.removeprefix("logits_"): value for key, value in arrays.items() if key.startswith("logits_")}
        missing = cls.needed - set(logits)
        if missing:
            raise ValueError(f"expected logits of {sorted(missing)} in {folder}, got none; compare text-classification")
        # Options which a question does not have are −inf; a label at −inf has no finite NLL, which `compare` refuses.
        broken = [name for name, values in logits.items() if not (values < np.inf).all()]
        if broken:
            raise ValueError(f"expected finite logits in {folder}, got others in {broken}; it diverged: lower the learning rate")
        return cls(cell, logits, {name: arrays[f"labels_{name}"] for name in logits}, **more)

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
        """The cell without and with a temperature fitted on all of validation, if there is any."""
        forms = [(False, 1.0)]
        if "validation" in self.logits:
            forms.append((True, fit_or_one(self.logits["validation"], self.labels["validation"])))
        sets = [TEST, *(name for name in self.logits if name not in ("validation", TEST))]
        return [
            Result(
                variant=Variant(self.cell.variant, self.cell.epsilon, tempered),
                seed=self.cell.seed,
                temperature=temperature,
                validation_nll=float(self.nll(tempered=tempered).sum() / self.count.sum()),
                statistics={
                    name: PredictionStatistics.from_logits(apply_temperature(self.logits[name], temperature), self.labels[name])
                    for name in sets
                },
                labels={name: self.labels[name] for name in sets},
            )
            for tempered, temperature in forms
        ]

    @property
    def count(self) -> Floats:
        """The predictions of each validation example [n]."""
        return np.ones(len(self.labels["validation"]))

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.logits[TEST].shape[1])

    @property
    def validation_error(self) -> float:
        """Share of wrong predictions on validation."""
        return float(np.mean(self.logits["validation"].argmax(1) != self.labels["validation"]))

    @property
    def quality(self) -> str:
        """The metric which says how good the predictions are."""
        return "accuracy"


@dataclass(frozen=True)
class Sequences:
    """What a cell leaves of tokens: the outcome on "test" and on its out-of-domain sets, and sums of each validation sequence.

    count, plain_nll, crossed_nll: [n]; the last at the temperature of other sequences.
    """

    cell: Cell
    outcomes: dict[str, Outcome]
    count: Floats
    plain_nll: Floats
    crossed_nll: Floats
    validation_error: float

    @classmethod
    def load(cls, cell: Cell, folder: Path) -> Self:
        """Read what the cell left.

        Raises: ValueError without the outcome of test.
        """
        outcomes = {TEST: Outcome.load(folder)}
        outcomes |= {path.name: Outcome.load(path) for path in sorted((folder / OOD_OUTCOMES).glob("*"))}
        if outcomes[TEST].split != TEST:
            raise ValueError(f"expected what was measured on test in {folder}, got {outcomes[TEST].split}; give --test_file")
        with np.load(folder / VALIDATION, allow_pickle=False) as saved:
            return cls(cell, outcomes, saved["count"], saved["nll"], saved["crossed"], 1.0 - float(saved["accuracy"]))

    def nll(self, *, tempered: bool) -> Floats:
        """Summed NLL of each validation sequence [n] in nats; tempered: by the temperature of others (cross-fitting)."""
        return self.crossed_nll if tempered else self.plain_nll

    def results(self) -> list[Result]:
        """The cell without and with a temperature fitted on all of validation; where there is none, twice without."""
        made = []
        for tempered in (False, True):
            statistics, temperature = {}, 1.0
            for name, outcome in self.outcomes.items():
                row = outcome.rows[-1 if tempered else 0]
                statistics[name] = TokenStatistics(
                    row, outcome.draws[row.name], outcome.n_sequences or 0, outcome.label_counts or []
                )
                temperature = row.temperature
            nll = float(self.nll(tempered=tempered).sum() / self.count.sum())
            variant = Variant(self.cell.variant, self.cell.epsilon, tempered)
            made.append(Result(variant, self.cell.seed, temperature, nll, statistics))
        return made

    @property
    def num_classes(self) -> int:
        """K."""
        return self.outcomes[TEST].num_classes

    @property
    def quality(self) -> str:
        """The metric which says how good the predictions are: the first of its task, else the accuracy of tokens."""
        return next(iter(self.outcomes[TEST].rows[0].quality), "accuracy")


@dataclass(frozen=True)
class Answers(Predictions):
    """Logits of the options of questions [n, K] on "test" and perhaps "validation"; without these the tokens stand in, of which
    the same cell has learnt to predict."""

    tokens: Sequences
    needed: ClassVar[frozenset[str]] = frozenset({TEST})

    def nll(self, *, tempered: bool) -> Floats:
        """As of predictions, or as of the tokens."""
        return super().nll(tempered=tempered) if "validation" in self.logits else self.tokens.nll(tempered=tempered)

    @property
    def count(self) -> Floats:
        """As of predictions, or as of the tokens."""
        return np.ones(len(self.labels["validation"])) if "validation" in self.logits else self.tokens.count


def fit_or_one(logits: Floats, labels: Integers) -> float:
    """The fitted temperature, or 1.0 (no scaling) where the NLL has no minimum at a finite one."""
    try:
        return fit_temperature(logits, labels)
    except NoFiniteTemperature:
        return 1.0


def clearly_worse(
    found: Mapping[float, Sequence[Predictions | Sequences]], level: float = 0.99
) -> dict[float, tuple[float, float]]:
    """The ε > 0 whose validation NLL is measurably above that of the best ε, with the difference and its lower bound.

    Each ε is taken as the better of its two forms, without and with temperature, since either may be picked later; the
    differences are means over seeds of the same examples, the bound one-sided Student t at `level`; of tokens d_i and n_i are the
    sums and the counts of sequence i, and the variance is that of Σ d_i / Σ n_i to first order. The best ε > 0 is never dropped.
    """
    count = next(iter(found.values()))[0].count
    scores = {
        epsilon: min(
            (np.mean([cell.nll(tempered=tempered) for cell in cells], axis=0) for tempered in (False, True)),
            key=lambda nll: float(nll.sum()),
        )
        for epsilon, cells in found.items()
    }
    best = min(scores, key=lambda epsilon: float(scores[epsilon].sum()))
    kept = min((epsilon for epsilon in scores if epsilon), key=lambda epsilon: float(scores[epsilon].sum()), default=0.0)
    worse = {}
    for epsilon, nll in scores.items():
        difference, n = nll - scores[best], len(nll)
        mean = float(difference.sum() / count.sum())
        spread = float((difference - mean * count).std(ddof=1)) * n**0.5 / float(count.sum())
        low = mean - float(student.ppf(level, n - 1)) * spread
        if epsilon not in (0.0, best, kept) and low > 0:
            worse[epsilon] = mean, low
    return worse
