"""What a run measured: one frozen report, its JSON file, its console table and its plain-language findings.

Owns: `CalibrationRow`, `CalibrationReport`, `calibration.json`, the wording of what the numbers show.
Does not own: any metric (`metrics`), drawing (`plots`), the card (`card`); those two read only reports.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from hf_ls.files import write_atomically
from hf_ls.metrics.core import PredictionStatistics, bin_index, reliability_bins
from hf_ls.metrics.intervals import consistency_band
from hf_ls.metrics.summary import summarise
from hf_ls.temperature import apply_temperature

if TYPE_CHECKING:
    from rich.table import Table

Metric = Mapping[str, float | None]

HISTOGRAM_BINS = 20
TABLE_METRICS = ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc")
TABLE_HEADINGS = ("run", "epsilon", "T", "accuracy", "nll", "brier", "ece", "null ece", "signed gap", "aurc")
TABLE_NOTE = (
    "T: temperature. 95 % intervals in brackets; the one of ece is for the true error and may lie below the "
    "value, which is biased upward. null ece: mean ece of a calibrated model with these confidences and n. "
    "signed gap: mean confidence minus accuracy. nll in nats, brier 0 to 2, aurc 0 to 1: lower is better."
)
_RELIABILITY_KEYS = ("edges", "count", "confidence", "accuracy", "band_low", "band_high")
_DATASET_KEYS = ("name", "hub_id", "split", "n", "class_counts", "licence")
_DATASET_OPTIONAL = ("config", "revision", "n_train", "n_validation")
_SMOOTHING_KEYS = ("epsilon", "convention", "prior", "schedule", "optimal_logit_gap", "max_confidence")
_SMOOTHING_OPTIONAL = ("excluded",)


@dataclass(frozen=True)
class CalibrationRow:
    """One evaluated set of predictions: a run, with or without temperature scaling.

    `metrics` is what `metrics.summarise` returns, each {"value", "low", "high"} with the 95 % interval where
    one is sound ("ece" also "null" and "null_q95"); `reliability` holds per bin what the diagram needs, None
    where a bin is empty; the histograms count confidences in 20 bins (a, b]. `temperature` 1.0 means none.

    Raises: ValueError for a missing metric or key; TypeError for a value which JSON cannot hold.
    """

    name: str
    epsilon: float
    temperature: float
    metrics: Mapping[str, Metric]
    reliability: dict[str, list[float | None]]
    histogram_correct: list[int]
    histogram_incorrect: list[int]

    def __post_init__(self) -> None:
        """Make every value what JSON gives back, and check the shapes."""
        _make_plain(self)
        where = f"in row {self.name!r}"
        if not self.temperature > 0:
            raise ValueError(f"expected temperature > 0 {where}, got {self.temperature}; 1.0 means none")
        missing = [key for key in TABLE_METRICS if "value" not in self.metrics.get(key, {})]
        if missing:
            raise ValueError(f"expected {missing} with a 'value' {where}, got none; use summarise()")
        _check_keys(self.reliability, _RELIABILITY_KEYS, f"reliability {where}")
        sizes = [len(self.histogram_correct), len(self.histogram_incorrect)]
        if sizes != [HISTOGRAM_BINS, HISTOGRAM_BINS]:
            raise ValueError(f"expected {HISTOGRAM_BINS} bins {where}, got {sizes}; use from_logits()")

    @classmethod
    def from_logits(
        cls,
        name: str,
        epsilon: float,
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

    @property
    def n(self) -> int:
        """The number of predictions."""
        return sum(self.histogram_correct) + sum(self.histogram_incorrect)

    def value(self, metric: str) -> float:
        """The point value of a metric; NaN where it is undefined."""
        value = self.metrics[metric]["value"]
        return math.nan if value is None else value

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric, or None where none is known."""
        low, high = self.metrics[metric].get("low"), self.metrics[metric].get("high")
        return None if low is None or high is None else (low, high)

    def show(self, metric: str) -> str:
        """A metric as text: "0.123 [0.110, 0.135]", signed for `signed_gap`, "–" where it is undefined."""
        style = "+.3f" if metric == "signed_gap" else ".3f"
        value, interval = self.value(metric), self.interval(metric)
        if math.isnan(value):
            return "–"
        text = format(value, style)
        return text if interval is None else f"{text} [{interval[0]:{style}}, {interval[1]:{style}}]"

    def cells(self) -> list[str]:
        """The row of the table as text, in the order of `TABLE_HEADINGS`."""
        null = self.metrics["ece"].get("null")
        shown = {metric: self.show(metric) for metric in TABLE_METRICS}
        temperature = "–" if self.temperature == 1 else f"{self.temperature:.2f}"
        null_ece = "–" if null is None else f"{null:.3f}"
        start = [one_line(self.name), f"{self.epsilon:g}", temperature, shown["accuracy"], shown["nll"]]
        return [*start, shown["brier"], shown["ece"], null_ece, shown["signed_gap"], shown["aurc"]]


@dataclass(frozen=True)
class CalibrationReport:
    """Everything a run has to show, enough to draw the plots and write the card offline.

    Args:
        task: Hub task id, e.g. "text-classification".
        model_name: name of the fine-tuned model; base_model: Hub id or local path of what it started from.
        dataset: name, hub_id (None when it is on no Hub), split, n, class_counts (per class, in the order of
            `label_names`), licence; optional config, revision, n_train, n_validation.
        smoothing: of the smoothed run: epsilon, convention, prior, schedule, optimal_logit_gap (nats),
            max_confidence; optional excluded (in words). None where a value does not exist.
        rows: in the order of the table.
        training: settings by name, with "seeds" a list; versions: package -> version.
        history: row name -> log records {"step", "loss", "nll", "smoothing_term", "eval_nll", …}.
        published: name of the row whose weights are saved beside the card; if it has a temperature, that is
            baked into the weights. None: not recorded.

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
        n, counts = self.dataset["n"], self.dataset["class_counts"]
        if len(counts) != len(self.label_names) or sum(counts) != n:
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
        required = [f.name for f in dataclasses.fields(cls) if f.name != "published"]
        _check_keys(fields, required, "calibration report", ("published",))
        rows = fields["rows"] if isinstance(fields["rows"], list) else [fields["rows"]]
        for row in rows:
            _check_keys(row, [f.name for f in dataclasses.fields(CalibrationRow)], "row")
        return cls(**fields | {"rows": [CalibrationRow(**row) for row in rows]})

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
    def baseline(self) -> CalibrationRow | None:
        """The first row with ε = 0 and no temperature."""
        return next((row for row in self.rows if row.epsilon == 0 and row.temperature == 1), None)

    @property
    def smoothed(self) -> CalibrationRow | None:
        """The first row with ε ≠ 0 and no temperature."""
        return next((row for row in self.rows if row.epsilon != 0 and row.temperature == 1), None)

    @property
    def published_row(self) -> CalibrationRow | None:
        """The row of the saved weights; a report of one row needs no `published` to name it."""
        if self.published is None:
            return self.rows[0] if len(self.rows) == 1 else None
        return next(row for row in self.rows if row.name == self.published)

    def tempered(self, row: CalibrationRow) -> CalibrationRow | None:
        """The temperature-scaled row of the same ε as `row`, if there is one."""
        return next((r for r in self.rows if r.epsilon == row.epsilon and r.temperature != 1), None)

    def table(self, width: int | None = None) -> Table:
        """The console table for `width` columns (the terminal's by default), numbers whole from 80 on.

        Intervals stand as "0.123 [0.110, 0.135]" where there is room, else beneath their value. Nothing is
        bold: which row is best is a matter of intervals, and `verdict` says it in words.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        place = f"{one_line(self.dataset['name'])}, {one_line(self.dataset['split'])}"
        title = Text(f"Calibration of {one_line(self.model_name)} on {place} (n = {self.dataset['n']:,})")
        room, ruler = width or Console().width, Console(width=10_000)
        for before, within in ((" [", ", "), ("\n[", ", "), ("\n[", ",\n")):
            table = Table(
                title=title, caption=Text(TABLE_NOTE), box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
                show_edge=False, title_justify="left", caption_justify="left",
            )  # fmt: skip
            for heading in TABLE_HEADINGS:
                table.add_column(heading.replace(" ", "\n"), justify="left" if heading == "run" else "right")
            for row in self.rows:
                name, *cells = row.cells()
                name = name.replace(" + ", " +\n") if within == ",\n" else name
                shown = (cell.replace(" [", before).replace(", ", within) for cell in cells)
                table.add_row(Text(name), *(Text(cell) for cell in shown), end_section=True)
            if ruler.measure(table).maximum <= room:
                break
        return table

    def regime(self) -> str:
        """Plain sentences: is the baseline (else the first row) under- or over-confident at this n?

        Read from the interval of the signed gap, confidence − accuracy: all above 0 is over-confident, all
        below 0 under-confident. A mean of 0 can hide errors which cancel, so the ECE is set beside its null.
        """
        row = self.baseline or self.rows[0]
        accuracy, interval = row.value("accuracy"), row.interval("signed_gap")
        confidence, wilson = accuracy + row.value("signed_gap"), row.interval("accuracy")
        if accuracy in (0, 1) and wilson is not None:
            # All right or all wrong: a bootstrap never draws the other outcome, its interval is too short.
            interval = confidence - wilson[1], confidence - wilson[0]
        who = f"The model of row '{one_line(row.name)}' (epsilon {row.epsilon:g})"
        facts = (
            f"mean confidence {confidence:.3f}, accuracy {row.show('accuracy')}, "
            f"signed gap {row.show('signed_gap')}, n = {row.n:,}"
        )
        if interval is None:
            return f"{who} has no interval for its signed gap, so its regime is not known: {facts}."
        if interval[0] > 0:
            advice = " Smoothing lowers confidence, so it may help here." if row.epsilon == 0 else ""
            return f"{who} is over-confident: {facts}.{advice}"
        if interval[1] < 0:
            advice = " Smoothing lowers confidence further: it may hurt here." if row.epsilon == 0 else ""
            return f"{who} is under-confident: {facts}.{advice}"
        sentence = f"{who} is, on average, not distinguishable from calibrated at this n: {facts}."
        null_q95 = row.metrics["ece"].get("null_q95")
        if null_q95 is not None and row.value("ece") > null_q95:
            sentence += (
                f" Its ECE of {row.value('ece'):.3f} is still above {null_q95:.3f}, which a calibrated model"
                " would exceed in 5 % of samples: some confidences are too high and others too low."
            )
        return sentence

    def verdict(self) -> str:
        """Plain sentences on NLL and ECE: the smoothed run against baseline + temperature, or the baseline.

        A metric differs only if the two intervals are disjoint. They share their examples, so this is
        stricter than a paired test: overlap says that none is shown here, not that there is none.
        """
        baseline, smoothed = self.baseline, self.smoothed
        if baseline is None or smoothed is None:
            return "Nothing to compare: a verdict needs a baseline row (epsilon = 0) and a smoothed row."
        rival = self.tempered(baseline) or baseline
        label = "the baseline" if rival is baseline else "temperature scaling of the baseline"
        nll, ece = (
            f"{key.upper()} {smoothed.show(key)} against {rival.show(key)} – {_finding(smoothed, rival, key)}"
            for key in ("nll", "ece")
        )
        return (
            f"Smoothing (epsilon {smoothed.epsilon:g}) against {label}, {one_line(self.dataset['split'])} "
            f"split, n = {rival.n:,}. {nll}. {ece}. {self.seeds()}; the intervals cover the choice of test "
            "examples, not the seed."
        )

    def seeds(self) -> str:
        """How many seeds stand behind the numbers, in words."""
        seeds = self.training.get("seeds")
        if not isinstance(seeds, list) or not seeds:
            return "The number of seeds is not recorded"
        return "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _finding(smoothed: CalibrationRow, rival: CalibrationRow, metric: str) -> str:
    ours, theirs = smoothed.interval(metric), rival.interval(metric)
    if ours is None or theirs is None:
        return "not decided (no interval)"
    if ours[0] <= theirs[1] and theirs[0] <= ours[1]:
        return "no difference shown (the intervals overlap)"
    return f"smoothing is {'better' if ours[1] < theirs[0] else 'worse'} (the intervals are disjoint)"


def one_line(text: str) -> str:
    """Text without line breaks, control characters and direction overrides, for titles and metadata."""
    kept = "".join(" " if c.isspace() else c for c in str(text) if c.isprintable() or c.isspace())
    return " ".join(kept.split())


def _make_plain(instance: Any) -> None:
    """Turn every field into what JSON gives back, so that a report equals itself after a round trip."""
    for field in dataclasses.fields(instance):
        object.__setattr__(instance, field.name, _plain(getattr(instance, field.name), field.name))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int | CalibrationRow):
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
