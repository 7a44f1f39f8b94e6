"""What a run measured: one frozen report and its JSON file.

Owns: `CalibrationRow`, `CalibrationReport`, `calibration.json`.
Does not own: any metric (`metrics`), or what is made of a report alone: tables (`tables`), sentences (`findings`),
pictures (`plots`), the card (`card`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from hf_ls import __version__
from hf_ls.calibration.temperature import apply_temperature
from hf_ls.common.files import write_atomically
from hf_ls.metrics.core import PredictionStatistics, bin_index, reliability_bins
from hf_ls.metrics.intervals import consistency_band
from hf_ls.metrics.paired import Difference
from hf_ls.metrics.summary import summarise
from hf_ls.metrics.tokens import TokenCalibration

Metric = Mapping[str, float | None]

REPORT = "calibration.json"
SETTINGS = "settings.json"  # beside it where the run was a training
HISTOGRAM_BINS = 20
CLASS_METRICS = ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc")
TOKEN_METRICS = ("accuracy", "nll", "perplexity", "brier", "ece", "signed_gap")
# What `metrics` and the Trainer measure; every other metric of a token row is the quality of the task.
_CALIBRATION_METRICS = {*CLASS_METRICS, *TOKEN_METRICS, "mce", "rmsce_debiased", "smooth_ece", "sequence_ece"}
_CALIBRATION_METRICS |= {"ece_equal_mass", "ece_classwise"}
_GROUP_KEYS = ("kind", "name", "n", "accuracy", "nll", "perplexity", "brier", "ece", "signed_gap")
_RELIABILITY_KEYS = ("edges", "count", "confidence", "accuracy", "band_low", "band_high")
_DATASET_KEYS = ("name", "hub_id", "split", "n", "class_counts", "licence")
_DATASET_OPTIONAL = ("config", "revision", "n_train", "n_validation", "n_sequences", "example")
_SMOOTHING_KEYS = ("epsilon", "convention", "prior", "schedule", "optimal_logit_gap", "max_confidence")
_SMOOTHING_OPTIONAL = ("excluded",)


@dataclass(frozen=True)
class CalibrationRow:
    """One evaluated set of predictions: a run, with or without temperature scaling.

    `metrics` is what `metrics.summarise` returns, each {"value", "low", "high"} with the 95 % interval where
    one is sound ("ece" also "null" and "null_q95"); `reliability` holds per bin what the diagram needs, None
    where a bin is empty; the histograms count confidences in 20 bins (a, b]. `temperature` 1.0 means none,
    `epsilon` None that it is not known how the model was trained. A row of tokens also has "perplexity" and the quality of
    its task, and `groups` as `TokenCalibration.groups`.

    Raises: ValueError for a missing metric or key; TypeError for a value which JSON cannot hold.
    """

    name: str
    epsilon: float | None
    temperature: float
    metrics: Mapping[str, Metric]
    reliability: Mapping[str, Sequence[float | None]]
    histogram_correct: list[int]
    histogram_incorrect: list[int]
    groups: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make every value what JSON gives back, and check the shapes."""
        _make_plain(self)
        where = f"in row {self.name!r}"
        if not self.temperature > 0:
            raise ValueError(f"expected temperature > 0 {where}, got {self.temperature}; 1.0 means none")
        wanted, remedy = (TOKEN_METRICS, "TokenCalibration.metrics()") if self.is_token else (CLASS_METRICS, "summarise()")
        missing = [key for key in wanted if "value" not in self.metrics.get(key, {})]
        if missing:
            raise ValueError(f"expected {missing} with a 'value' {where}, got none; use {remedy}")
        _check_keys(self.reliability, _RELIABILITY_KEYS, f"reliability {where}")
        for group in self.groups:
            _check_keys(group, _GROUP_KEYS, f"group {where}")
        sizes = [len(self.histogram_correct), len(self.histogram_incorrect)]
        if sizes != [HISTOGRAM_BINS, HISTOGRAM_BINS]:
            raise ValueError(f"expected {HISTOGRAM_BINS} bins {where}, got {sizes}; use from_logits()")

    @classmethod
    def from_logits(
        cls,
        name: str,
        epsilon: float | None,
        temperature: float,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        n_bins: int = 15,
        repetitions: int = 1000,
        seed: int = 0,
    ) -> Self:
        """Summarise the logits [n, K] of a model, divided by `temperature` here, against hard labels [n].

        Raises: ValueError for empty, ragged or NaN input, for labels outside [0, K), or temperature <= 0.
        """
        scaled = apply_temperature(logits, temperature)
        stats = PredictionStatistics.from_logits(scaled, labels)
        bins = reliability_bins(stats.confidence, stats.correct, n_bins)
        band = {"n_bins": n_bins, "repetitions": repetitions, "seed": seed}
        low, high = consistency_band(stats.confidence, level=0.95, **band)
        index = bin_index(stats.confidence, HISTOGRAM_BINS)
        return cls(
            name=name,
            epsilon=epsilon,
            temperature=temperature,
            metrics=summarise(scaled, labels, **band),
            reliability={
                "edges": bins.edges.tolist(),
                "count": bins.count.tolist(),
                "confidence": bins.confidence.tolist(),
                "accuracy": bins.accuracy.tolist(),
                "band_low": np.where(bins.count > 0, low, np.nan).tolist(),
                "band_high": np.where(bins.count > 0, high, np.nan).tolist(),
            },
            histogram_correct=np.bincount(index[stats.correct], minlength=HISTOGRAM_BINS).tolist(),
            histogram_incorrect=np.bincount(index[~stats.correct], minlength=HISTOGRAM_BINS).tolist(),
        )

    @classmethod
    def from_tokens(
        cls,
        name: str,
        epsilon: float | None,
        temperature: float,
        tokens: TokenCalibration,
        extra: Mapping[str, Metric] | None = None,
    ) -> Self:
        """The row of a teacher-forced pass whose logits were divided by `temperature` before they got into `tokens`.

        Args:
            extra: what was measured beside the tokens, e.g. "phoneme_error_rate", "exact_match", "bleu", "chrf" of the
                generated text and "sequence_ece", each {"value"} and, where known, "low" and "high".

        Raises: ValueError for a metric in `extra` which the tokens have too, and as `TokenCalibration.metrics`.
        """
        metrics, more = tokens.metrics(), dict(extra or {})
        if repeated := sorted(metrics.keys() & more.keys()):
            raise ValueError(f"expected other metrics in extra than those of the tokens, got {repeated}; rename or drop them")
        correct, incorrect = tokens.histogram(HISTOGRAM_BINS)
        return cls(
            name=name,
            epsilon=epsilon,
            temperature=temperature,
            metrics={**metrics, **more},
            reliability=tokens.reliability(),
            histogram_correct=correct,
            histogram_incorrect=incorrect,
            groups=tokens.groups(),
        )

    @property
    def n(self) -> int:
        """The number of predictions: examples, or tokens."""
        return sum(self.histogram_correct) + sum(self.histogram_incorrect)

    @property
    def is_token(self) -> bool:
        """Whether a prediction is a token rather than a whole example."""
        return "perplexity" in self.metrics

    @property
    def quality(self) -> list[str]:
        """The metrics of the task itself, such as the phoneme error rate; none for one label per example."""
        return [metric for metric in self.metrics if metric not in _CALIBRATION_METRICS] if self.is_token else []

    def value(self, metric: str) -> float:
        """The point value of a metric; NaN where it is undefined or was not measured."""
        value = self.metrics.get(metric, {}).get("value")
        return math.nan if value is None else value

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric, or None where none is known."""
        found = self.metrics.get(metric, {})
        low, high = found.get("low"), found.get("high")
        return None if low is None or high is None else (low, high)

    @property
    def epsilon_text(self) -> str:
        """Epsilon for tables and labels: "0.1", or "?" where it is not known."""
        return "?" if self.epsilon is None else f"{self.epsilon:g}"

    def show(self, metric: str) -> str:
        """A metric as text: "0.123 [0.110, 0.135]", signed for `signed_gap`, "–" where it is undefined."""
        value, interval = self.value(metric), self.interval(metric)
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
        task: Hub task id, e.g. "text-classification".
        model_name: name of the trained model; base_model: Hub id or local path of what it started from, None from scratch.
        dataset: name, hub_id (None when it is on no Hub), split, n (tokens for rows of tokens), class_counts (per
            class, in the order of `label_names`; None with label_names [] for a language model), licence; optional
            config, revision, n_train, n_validation, n_sequences, example (an input for the code in the card).
        smoothing: of the smoothed run: epsilon, convention, prior, schedule, optimal_logit_gap (nats),
            max_confidence; optional excluded (in words). None where a value does not exist.
        rows: in the order of the table.
        training: settings by name, with "seeds" a list; versions: package -> version.
        history: row name -> log records {"step", "loss", "nll", "smoothing_term", "eval_nll", …}.
        published: name of the row whose weights are saved beside the card; if it has a temperature, that is
            baked into the weights. None: not recorded.
        differences: paired, of a row against an earlier one (`metrics.paired.differences`); none in reports which only know
            the interval of each row.

    Raises: ValueError for unknown or missing keys, repeated row names, or counts which contradict each other.
    """

    task: str
    model_name: str
    base_model: str | None
    dataset: dict[str, Any]
    label_names: list[str]
    smoothing: dict[str, Any]
    rows: list[CalibrationRow]
    training: dict[str, Any]
    history: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    published: str | None = None
    differences: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make every value what JSON gives back, and check that the parts agree."""
        _make_plain(self)
        _check_keys(self.dataset, _DATASET_KEYS, "dataset", _DATASET_OPTIONAL)
        _check_keys(self.smoothing, _SMOOTHING_KEYS, "smoothing", _SMOOTHING_OPTIONAL)
        names = [row.name for row in self.rows]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected rows with distinct names, got {names}; rename the repeated ones")
        strangers = {*self.history, self.published} - {None, *names}
        if strangers:
            raise ValueError(f"expected names of rows in history and published, got {strangers}; rename")
        if len({row.is_token for row in self.rows}) > 1:
            raise ValueError("expected rows of tokens or of examples, got both; report them apart")
        n, counts = self.dataset["n"], self.dataset["class_counts"]
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
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a report from JSON text.

        Raises: ValueError for text which is not JSON, or for unknown or missing keys.
        """
        fields = json.loads(text)
        optional = ("published", "differences")
        required = [f.name for f in dataclasses.fields(cls) if f.name not in optional]
        _check_keys(fields, required, "calibration report", optional)
        rows = fields["rows"] if isinstance(fields["rows"], list) else [fields["rows"]]
        for row in rows:
            _check_keys(row, [f.name for f in dataclasses.fields(CalibrationRow) if f.name != "groups"], "row", ("groups",))
        differences = fields.get("differences", [])
        for difference in differences:
            _check_keys(difference, [f.name for f in dataclasses.fields(Difference)], "difference")
        made = {"rows": [CalibrationRow(**row) for row in rows], "differences": [Difference(**d) for d in differences]}
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
        sequences = self.dataset.get("n_sequences")
        within = f" in {sequences:,} sequences" if sequences else ""
        return f"n = {self.dataset['n']:,}" + (f" tokens{within}" if self.is_token_task else "")

    @property
    def baseline(self) -> CalibrationRow | None:
        """The first row with ε = 0 and no temperature."""
        return next((row for row in self.rows if row.epsilon == 0 and row.temperature == 1), None)

    @property
    def smoothed(self) -> CalibrationRow | None:
        """The first row beside the baseline without temperature: of smoothing, or of another objective or technique."""
        return next((row for row in self.rows if row is not self.baseline and row.temperature == 1), None)

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
        """The temperature-scaled row of the same run, which stands behind `row`, if there is one."""
        behind = self.rows[self.rows.index(row) + 1 :]
        run = itertools.takewhile(lambda r: r.temperature != 1 and r.epsilon == row.epsilon, behind)
        return next(run, None)


def package_versions(*packages: str) -> dict[str, str]:
    """What a report says it was made with: hf_ls, some packages, by default those which train, and Python."""
    names = packages or ("transformers", "torch", "accelerate", "datasets")
    return {"hf_ls": __version__, **{name: version(name) for name in names}, "python": platform.python_version()}


def _make_plain(instance: Any) -> None:
    """Turn every field into what JSON gives back, so that a report equals itself after a round trip."""
    for name in (f.name for f in dataclasses.fields(instance)):
        object.__setattr__(instance, name, _plain(getattr(instance, name), name))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int | CalibrationRow | Difference):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise TypeError(f"expected text as keys in {where}, got {bad[0]!r}; JSON has no other keys")
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"expected numbers, text or lists in {where}, got {type(value).__name__}; convert it")


def _check_keys(fields: Any, required: Any, what: str, optional: tuple[str, ...] = ()) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"expected {what} with keys {list(required)}, got {fields!r:.40}; pass a dict")
    missing = [key for key in required if key not in fields]
    unknown = [key for key in fields if key not in required and key not in optional]
    if missing or unknown:
        raise ValueError(
            f"expected {what} with keys {list(required)}, got missing {missing}, unknown {unknown}; "
            "was it written by another version of hf_ls?"
        )
