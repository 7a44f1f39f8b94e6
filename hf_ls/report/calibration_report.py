"""What a run measured: one frozen report and its file, `calibration.json`, which gives it back as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from hf_ls import __version__
from hf_ls.calibration.temperature import apply_temperature
from hf_ls.common.files import write_atomically
from hf_ls.metrics.core import PredictionStatistics, reliability_bins
from hf_ls.metrics.intervals import consistency_band
from hf_ls.metrics.paired import Difference
from hf_ls.metrics.summary import summarise
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.report.facts import AnswerFacts, DatasetFacts, HubFacts, SmoothingFacts, TrainingFacts, check_keys, make_plain, record

Metric = Mapping[str, float | str | None]

REPORT = "calibration.json"
SETTINGS = "settings.json"  # beside it where the run was a training
EVALUATED = "evaluated"  # a finished model, or predictions, as they are
BASELINE = "baseline"  # the run trained on the plain cross entropy, which the others are compared with
CLASS_METRICS = ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc")
TOKEN_METRICS = ("accuracy", "nll", "perplexity", "brier", "ece", "signed_gap")
# What `metrics` and the Trainer measure; every other metric of a token row is the quality of the task.
_CALIBRATION_METRICS = {*CLASS_METRICS, *TOKEN_METRICS, "mce", "rmsce_debiased", "smooth_ece", "sequence_ece"}
_CALIBRATION_METRICS |= {"ece_equal_mass", "ece_classwise", "full_ece", "f1_macro", "f1_weighted", "balanced_accuracy"}
_OPTIONAL = ("published", "differences", "posthoc", "pictures", "hub", "predictions", "answers", "answered")  # of a report
_GROUP_KEYS = ("kind", "name", "n", "accuracy", "nll", "perplexity", "brier", "ece", "signed_gap")
_RELIABILITY_KEYS = ("edges", "count", "confidence", "accuracy", "band_low", "band_high")


@dataclass(frozen=True)
class CalibrationRow:
    """One evaluated set of predictions: a run, with or without temperature scaling.

    Args:
        run: what was trained: "baseline" (the plain cross entropy), "smoothed", or the name of another objective or technique.
        epsilon: of its label smoothing, at the first step of a schedule; None where it is not known how the model was trained.
        temperature: which the logits were divided by; 1.0 without temperature scaling. tempered: whether that was done.
        metrics: what `metrics.summarise` returns, each {"value", "low", "high"} with the 95 % interval where one is sound ("ece"
            also "null" and "null_q95", an infinite "nll" "impossible" and "clipped", BLEU and chrF "signature"). A row of
            classes also has the scores of `metrics.classes`; a row of tokens "perplexity" and the quality of its task.
        reliability: per bin of confidence (a, b] what the diagrams need, None where a bin is empty.
        groups: of tokens, as `TokenCalibration.groups`. classes: of classifiers, as `metrics.classes.class_table`, a class each.

    Raises: ValueError for a missing metric or key; TypeError for a value which JSON cannot hold.
    """

    run: str
    epsilon: float | None
    temperature: float
    metrics: Mapping[str, Metric]
    reliability: Mapping[str, Sequence[float | None]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    tempered: bool = False
    classes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make every value what JSON gives back, and check the shapes."""
        make_plain(self)
        where = f"in row {self.name!r}"
        if not self.temperature > 0:
            raise ValueError(f"expected temperature > 0 {where}, got {self.temperature}; 1.0 means none")
        if not self.tempered and self.temperature != 1:
            raise ValueError(f"expected temperature 1.0 {where}, got {self.temperature}; set tempered=True where it was applied")
        wanted, remedy = (TOKEN_METRICS, "TokenCalibration.metrics()") if self.is_token else (CLASS_METRICS, "summarise()")
        missing = [key for key in wanted if "value" not in self.metrics.get(key, {})]
        if missing:
            raise ValueError(f"expected {missing} with a 'value' {where}, got none; use {remedy}")
        check_keys(self.reliability, _RELIABILITY_KEYS, f"reliability {where}")
        for group in self.groups:
            check_keys(group, _GROUP_KEYS, f"group {where}")

    @classmethod
    def from_logits(
        cls,
        run: str,
        epsilon: float | None,
        temperature: float | None,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        n_bins: int = 15,
        repetitions: int = 1000,
        seed: int = 0,
        clip: float | None = None,
    ) -> Self:
        """Summarise the logits [n, K] of a model, divided by `temperature` here (None: as they are), against hard labels [n].

        clip: for logarithms of probabilities, some of which may be 0 at the label; see `metrics.summarise`.

        Raises: ValueError for empty, ragged or NaN input, for labels outside [0, K), or temperature <= 0.
        """
        scaled = apply_temperature(logits, 1.0 if temperature is None else temperature)
        stats = PredictionStatistics.from_logits(scaled, labels, impossible=clip is not None)
        bins = reliability_bins(stats.confidence, stats.correct, n_bins)
        band = {"n_bins": n_bins, "repetitions": repetitions, "seed": seed}
        low, high = consistency_band(stats.confidence, level=0.95, **band)
        return cls(
            run=run,
            epsilon=epsilon,
            temperature=1.0 if temperature is None else temperature,
            tempered=temperature is not None,
            metrics=summarise(scaled, labels, clip=clip, **band),
            reliability={
                "edges": bins.edges.tolist(),
                "count": bins.count.tolist(),
                "confidence": bins.confidence.tolist(),
                "accuracy": bins.accuracy.tolist(),
                "band_low": np.where(bins.count > 0, low, np.nan).tolist(),
                "band_high": np.where(bins.count > 0, high, np.nan).tolist(),
            },
        )

    @classmethod
    def from_tokens(
        cls,
        run: str,
        epsilon: float | None,
        temperature: float | None,
        tokens: TokenCalibration,
        extra: Mapping[str, Metric] | None = None,
    ) -> Self:
        """The row of a teacher-forced pass whose logits were divided by `temperature` (None: not) before they got into `tokens`.

        Args:
            extra: what was measured beside the tokens, e.g. "phoneme_error_rate", "exact_match", "bleu", "chrf" of the
                generated text and "sequence_ece", each {"value"} and, where known, "low" and "high".

        Raises: ValueError for a metric in `extra` which the tokens have too, and as `TokenCalibration.metrics`.
        """
        metrics, more = tokens.metrics(), dict(extra or {})
        if repeated := sorted(metrics.keys() & more.keys()):
            raise ValueError(f"expected other metrics in extra than those of the tokens, got {repeated}; rename or drop them")
        return cls(
            run=run,
            epsilon=epsilon,
            temperature=1.0 if temperature is None else temperature,
            tempered=temperature is not None,
            metrics={**metrics, **more},
            reliability=tokens.reliability(),
            groups=tokens.groups(),
        )

    @property
    def name(self) -> str:
        """The name of the row in tables and plots: its run, "+ temperature" where that was applied."""
        return f"{self.run} + temperature" if self.tempered else self.run

    @property
    def n(self) -> int:
        """The number of predictions: examples, or tokens."""
        return int(sum(count or 0 for count in self.reliability["count"]))

    @property
    def is_token(self) -> bool:
        """Whether a prediction is a token rather than a whole example."""
        return "perplexity" in self.metrics

    @property
    def quality(self) -> list[str]:
        """The metrics of the task itself, such as the phoneme error rate; none for one label per example."""
        return [metric for metric in self.metrics if metric not in _CALIBRATION_METRICS] if self.is_token else []

    def value(self, metric: str) -> float:
        """The point value of a metric; NaN where it is undefined, infinite or was not measured."""
        return math.nan if (value := self._number(metric, "value")) is None else value

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric, or None where none is known."""
        low, high = self._number(metric, "low"), self._number(metric, "high")
        return None if low is None or high is None else (low, high)

    def _number(self, metric: str, key: str) -> float | None:
        found = self.metrics.get(metric, {}).get(key)
        return None if isinstance(found, str) else found

    def show(self, metric: str) -> str:
        """A metric as text: "0.123 [0.110, 0.135]", signed for `signed_gap`, "∞", "–" where it is undefined."""
        value, interval = self.value(metric), self.interval(metric)
        if self.metrics.get(metric, {}).get("impossible"):
            return "∞"
        if math.isnan(value):
            return "–"
        style = "+.3f" if metric == "signed_gap" else ".3f"
        if metric not in CLASS_METRICS and abs(value) >= 10:  # BLEU, chrF and perplexity
            style = ".2f" if abs(value) < 10_000 else ".3g"
        text = format(value, style)
        return text if interval is None else f"{text} [{interval[0]:{style}}, {interval[1]:{style}}]"


@dataclass(frozen=True)
class CalibrationReport:
    """Everything a run has to show, enough to draw the plots and write the card offline.

    Args:
        task: Hub task id, e.g. "text-classification"; None for predictions of which it is not known.
        model_name: name of the trained model; base_model: Hub id of what it started from, or "./name" for a folder; None from
            scratch, or not known without `training`.
        dataset: the evaluated data. label_names: of the classes, [] for a language model.
        smoothing: of the last run which is not the baseline. training: of the published run; None for a model evaluated only.
        rows: in the order of the table.
        history: run -> log records {"step", "loss", "nll", "smoothing_term", "eval_nll", …}.
        versions: package -> version.
        published: name of the row whose weights are saved beside the card; if it has a temperature, that is
            baked into the weights. None: not recorded.
        differences: paired, of a row against an earlier one (`metrics.paired.differences`); none in reports which only know
            the interval of each row.
        posthoc: what `calibration.posthoc.compare_posthoc` found, an infinite value as None; empty without validation data.
        pictures: file names of what was drawn from predictions and features, which the report does not hold, for the card.
        hub: what its user says of the model for the header of the card.
        predictions: "logits" or "probabilities" where the report was made from these and the model was not seen.
        answers: of a language model whose classes are the options of questions; None for all others.
        answered: a report of this kind on the answers of the same runs, beside their tokens; None without questions.

    Raises: ValueError for repeated rows, or counts which contradict each other.
    """

    task: str | None
    model_name: str
    base_model: str | None
    dataset: DatasetFacts
    label_names: list[str]
    smoothing: SmoothingFacts
    rows: list[CalibrationRow]
    training: TrainingFacts | None
    history: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    published: str | None = None
    differences: list[Difference] = field(default_factory=list)
    posthoc: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    hub: HubFacts = field(default_factory=HubFacts)
    predictions: Literal["logits", "probabilities"] | None = None
    answers: AnswerFacts | None = None
    answered: CalibrationReport | None = None

    def __post_init__(self) -> None:
        """Make every value what JSON gives back, and check that the parts agree."""
        make_plain(self)
        names = [row.name for row in self.rows]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected rows with distinct names, got {names}; rename the repeated ones")
        strangers = {*({self.published} - {None, *names}), *(self.history.keys() - {row.run for row in self.rows})}
        if strangers:
            raise ValueError(f"expected runs of rows in history and the name of one in published, got {strangers}; rename")
        if len({row.is_token for row in self.rows}) > 1:
            raise ValueError("expected rows of tokens or of examples, got both; report them apart")
        n, counts = self.dataset.n, self.dataset.class_counts
        if counts is None:
            if not self.is_token_task or self.label_names:
                raise ValueError("expected class_counts None only with rows of tokens and label_names []; count the labels")
        elif len(counts) != len(self.label_names) or sum(counts) != n:
            wanted = f"{len(self.label_names)} class_counts with sum {n}"
            raise ValueError(f"expected {wanted}, got {counts}; count the evaluated split")
        if any(row.n != n for row in self.rows):
            raise ValueError(f"expected n = {n} in rows, got {[r.n for r in self.rows]}; use one split")

    def to_json(self) -> str:
        """The report as JSON text; a number which is not finite (an empty bin, a diverged loss) is null."""
        return json.dumps(self._fields(), indent=1, allow_nan=False) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(dataclasses.replace(self, answered=None))
        for row in fields["rows"]:
            if not row["classes"]:  # of tokens, and of reports which were written before there were any
                del row["classes"]
        if fields["answers"] is None:
            del fields["answers"]
        del fields["answered"]
        return fields if self.answered is None else fields | {"answered": self.answered._fields()}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a report from JSON text.

        Raises: ValueError for text which is not JSON, or for unknown or missing keys.
        """
        return cls._from_fields(json.loads(text))

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        check_keys(fields, [f.name for f in dataclasses.fields(cls) if f.name not in _OPTIONAL], "calibration report", _OPTIONAL)
        rows = fields["rows"] if isinstance(fields["rows"], list) else [fields["rows"]]
        made = {
            "dataset": record(DatasetFacts, fields["dataset"], "dataset"),
            "smoothing": record(SmoothingFacts, fields["smoothing"], "smoothing"),
            "training": None if fields["training"] is None else record(TrainingFacts, fields["training"], "training"),
            "rows": [record(CalibrationRow, row, "row") for row in rows],
            "hub": record(HubFacts, fields.get("hub", {}), "hub"),
            "answers": record(AnswerFacts, fields["answers"], "answers") if fields.get("answers") else None,
            "answered": cls._from_fields(fields["answered"]) if fields.get("answered") else None,
            "differences": [record(Difference, found, "difference") for found in fields.get("differences", [])],
        }
        return cls(**fields | made)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `calibration.json`; a reader sees the old file or the new one, never a part."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises: FileNotFoundError; ValueError as `from_json`, with the path.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"expected a calibration report in {path}, got: {error}") from error

    @property
    def is_token_task(self) -> bool:
        """Whether the rows are of tokens rather than of whole examples."""
        return self.rows[0].is_token

    @property
    def size(self) -> str:
        """How much was evaluated, in words: "n = 2,284", or "n = 12,345 tokens in 800 sequences"."""
        sequences = self.dataset.n_sequences
        within = f" in {sequences:,} sequences" if sequences else ""
        return f"n = {self.dataset.n:,}" + (f" tokens{within}" if self.is_token_task else "")

    @property
    def baseline(self) -> CalibrationRow | None:
        """The baseline without temperature."""
        return next((row for row in self.rows if row.run == BASELINE and not row.tempered), None)

    @property
    def challengers(self) -> list[CalibrationRow]:
        """The rows, without temperature, of the runs which are not the baseline: of smoothing, another objective or technique."""
        return [row for row in self.rows if row.run != BASELINE and not row.tempered]

    @property
    def published_row(self) -> CalibrationRow | None:
        """The row of the saved weights; a report of one row needs no `published` to name it."""
        if self.published is None:
            return self.rows[0] if len(self.rows) == 1 else None
        return next(row for row in self.rows if row.name == self.published)

    def difference(self, metric: str, row: CalibrationRow, against: CalibrationRow) -> Difference | None:
        """The paired difference row − against in a metric; None where only the interval of each row is known."""
        found = (d for d in self.differences if (d.metric, d.row, d.against) == (metric, row.name, against.name))
        return next(found, None)

    def tempered(self, row: CalibrationRow) -> CalibrationRow | None:
        """The temperature-scaled row of the run which `row` is of, if there is one and `row` is not it."""
        return next((other for other in self.rows if other.run == row.run and other.tempered and other != row), None)

    def smoothing_of(self, row: CalibrationRow) -> SmoothingFacts:
        """How the targets of the row's run were smoothed: the baseline's never are, and of runs before the last no more than ε
        is known."""
        if row.run == BASELINE:
            return SmoothingFacts(epsilon=0.0)
        last = [other.run for other in self.rows if other.run != BASELINE][-1:]
        return self.smoothing if [row.run] == last else SmoothingFacts(row.epsilon)

    def epsilon_text(self, row: CalibrationRow) -> str:
        """Epsilon of a row for tables and labels: "0.1", "0 → 0.4" with a schedule, "?" where it is not known."""
        known = self.smoothing_of(row)
        return (known if known.epsilon == row.epsilon else SmoothingFacts(row.epsilon)).epsilon_text


def package_versions(*packages: str) -> dict[str, str]:
    """What a report says it was made with: hf_ls, some packages, by default those which train, and Python."""
    names = packages or ("transformers", "torch", "accelerate", "datasets")
    return {"hf_ls": __version__, **{name: version(name) for name in names}, "python": platform.python_version()}
