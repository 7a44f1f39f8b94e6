"""What a reader sees of a comparison: the console table, `report.json` and the self-contained `report.html`.

The words and the place of each mark of a plot are here, how the page looks is in `compare_template.html`. Everything passes
through the escaping of jinja2; the page has no script and loads nothing.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from hf_ls.common.files import write_atomically
from hf_ls.compare.comparison import TEST, Comparison, Measurement, Result, TokenStatistics, Variant
from hf_ls.metrics.core import ReliabilityBins, direction, reliability_bins
from hf_ls.metrics.paired import Contrast
from hf_ls.report.calibration_report import BASELINE, package_versions

_TEMPLATE = Path(__file__).with_name("compare_template.html")
HEADLINES = {
    "smooth": "Smooth",
    "trade_off": "A trade-off",
    "temperature": "Use temperature scaling instead",
    "no_difference": "No measurable difference",
    "not_learnt": "The models have not learnt",
}
# Metric, heading; those of a task follow by their names.
COLUMNS = (
    ("accuracy", "accuracy"), ("nll", "NLL"), ("brier", "Brier"), ("ece", "ECE"), ("smooth_ece", "smooth ECE"),
    ("rmsce_debiased", "debiased RMSCE"), ("aurc", "AURC"), ("e_aurc", "E-AURC"), ("signed_gap", "signed gap"),
)  # fmt: skip
_AT_MOST_1 = (
    "accuracy", "ece", "smooth_ece", "rmsce_debiased", "aurc", "e_aurc", "exact_match", "entity_f1", "sequence_ece", "f1_macro",
    "f1_weighted", "balanced_accuracy",
)  # fmt: skip
# By file name: what a picture of one seed shows.
_PICTURES = {
    "penultimate.png": "Three classes on the plane of their templates: what the last layer sees, and which class wins there "
    "(Müller et al. 2019). Smoothing pulls clusters together and to equal distances.",
    "logit_gap.png": "How far the label's logit lies above the others; dashed: where the smoothed loss is least. "
    "Without smoothing there is no such point: the gap grows as long as training goes on.",
    "calibration_steps.png": "Calibration on validation while the model trained.",
}
FEWEST_SEEDS = 3  # of an interval over seeds
_WIDTH, _MARGIN, _LONG_NAME = 340.0, 12.0, 27


@dataclass(frozen=True)
class Facts:
    """What the page says beside the numbers.

    sizes: examples of "train", "validation", "test" and others. flip_labels: share of flipped training labels. steps,
    runs: of training; seconds: summed over runs. settings: name -> value, in words.
    """

    title: str
    model: str
    data: str
    sizes: Mapping[str, int]
    label_names: Sequence[str]
    flip_labels: float
    convention: str
    steps: int
    warnings: Sequence[str]
    runs: int
    seconds: float
    settings: Mapping[str, Any]


def write_report(
    comparison: Comparison, results: Sequence[Result], facts: Facts, folder: Path, pictures: Sequence[Path] = ()
) -> None:
    """Write `report.json` and `report.html`, each whole or not at all; pictures: as in `html`."""
    write_atomically(folder / "report.json", comparison.to_json())
    write_atomically(folder / "report.html", html(comparison, results, facts, pictures))


def headline(comparison: Comparison) -> tuple[str, str]:
    """The verdict in a few words, "Smooth with ε=0.1", and the rest of its sentence."""
    first, separator, rest = comparison.verdict.sentence.partition(": ")
    if not separator:
        return HEADLINES[comparison.verdict.kind], comparison.verdict.sentence
    return first, rest[:1].upper() + rest[1:]


def html(comparison: Comparison, results: Sequence[Result], facts: Facts, pictures: Sequence[Path] = ()) -> str:
    """The page, readable from 390 px on; every text in it is escaped. pictures: PNG files, which become part of the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline(comparison)[0],
        sentence=headline(comparison)[1],
        comparison=comparison,
        verdict=comparison.verdict,
        has_intervals=len(comparison.seeds) >= FEWEST_SEEDS,
        others=[*comparison.verdict.evidence[:1], *comparison.verdict.evidence[1 + len(comparison.verdict.compared) :]],
        differences=judged(comparison),
        facts=facts,
        minutes=facts.seconds / 60,
        level=f"{comparison.level:.0%}".replace("%", " %"),
        tables=[{"set": title, "size": of.size(name), "rows": rows(of, name)} for title, of, name in _sets(comparison)],
        higher=[metric for metric in comparison.metrics() if direction(metric) == "higher" and not metric.startswith("null_")],
        units="sequences" if comparison.clusters else comparison.what,
        forests=forests(comparison, TEST),
        other_forests=[
            forest | {"set": title} for title, of, name in _sets(comparison)[1:] for forest in forests(of, name, only=("nll",))
        ],
        diagrams=diagrams(comparison, results),
        pictures=[
            {"text": _PICTURES[path.name], "png": base64.b64encode(path.read_bytes()).decode("ascii")} for path in pictures
        ],
        versions=package_versions("transformers", "torch", "numpy"),
    )


def _sets(comparison: Comparison) -> list[tuple[str, Comparison, str]]:
    """Each table: its title, the comparison which holds it and the set; the judged one first, those of tokens last."""
    sets = [(name, comparison, name) for name in sorted(comparison.sets, key=lambda name: name != TEST)]
    return sets if comparison.tokens is None else [*sets, *((f"tokens of {t}", of, n) for t, of, n in _sets(comparison.tokens))]


def rows(comparison: Comparison, name: str) -> list[dict[str, Any]]:
    """The table of a set: variant, temperature and, per metric, mean and t interval over seeds as text."""
    out = []
    known = comparison.metrics(name)
    columns = [*COLUMNS, *((metric, metric) for metric in known if metric not in _known_columns())]
    for variant in comparison.variants:
        cells = []
        for metric, heading in columns:
            if metric not in known:
                continue
            if not any((m.variant, m.metric, m.set) == (variant, metric, name) for m in comparison.measurements):
                cells.append({"heading": heading, "value": "–", "interval": "", "note": ""})  # as after a temperature
                continue
            found = comparison.measurement(variant, metric, name)
            null = comparison.measurement(variant, "null_ece", name).mean if metric == "ece" and "null_ece" in known else None
            note = "" if null is None or math.isnan(null) else f"calibrated: {null:.3f}"
            cells.append(
                {"heading": heading, "value": _mean(found), "interval": _interval(found, len(comparison.seeds)), "note": note}
            )
        temperatures = comparison.temperatures.get(variant.label, [])
        shown = f"{np.mean(temperatures):.2f}" if variant.tempered and temperatures else ""
        out.append({"label": variant.label, "picked": variant == comparison.picked, "temperature": shown, "cells": cells})
    return out


def judged(comparison: Comparison) -> list[dict[str, str]]:
    """The contrasts which the verdict rests on, as lines of a table."""
    titles, lines = dict(COLUMNS), []
    for row, against, metric in comparison.verdict.compared:
        found = next(c for c in comparison.contrasts if (c.row, c.against, c.metric, c.set) == (row, against, metric, TEST))
        known = found.low is not None and found.high is not None
        lines.append(
            {
                "metric": titles.get(metric, metric) + (", nats" if metric == "nll" else ""),
                "row": row,
                "against": against,
                "value": f"{found.value:+.4f}",
                "interval": f"{found.low:+.4f} to {found.high:+.4f}" if known else "–",
                "p": "–" if found.p is None else "< 0.001" if found.p < 0.001 else f"{found.p:.3f}",
                "seeds": ", ".join(f"{value:+.4f}" for value in found.per_seed),
                "finding": {"none": "no difference shown"}.get(found.finding, found.finding),
                "class": found.finding,
            }
        )
    return lines


def forests(comparison: Comparison, name: str, only: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The paired differences of a set as panels, one a metric and reference, every mark at its place in the plot."""
    panels = []
    wanted = set(only)
    for metric, title in (("nll", "NLL, nats"), (comparison.quality, comparison.quality), ("ece", "ECE")):
        if wanted and metric not in wanted:
            continue
        for reference in (Variant(BASELINE, 0.0, False), Variant(BASELINE, 0.0, True)):
            found = [c for c in comparison.contrasts if (c.set, c.metric, c.against) == (name, metric, reference.label)]
            if found:
                panels.append(_panel(found, title, comparison.level) | {"set": name})
    return panels


def diagrams(comparison: Comparison, results: Sequence[Result], n_bins: int = 10) -> list[dict[str, Any]]:
    """A reliability diagram a variant on test, predictions of all seeds together; bins as circles, area by count."""
    out = []
    for variant in comparison.variants:
        parts = [result.statistics[TEST] for result in results if result.variant == variant]
        if not parts:
            continue
        bins = _pooled(parts, n_bins)
        ece = comparison.measurement(variant, "ece").mean
        dots = [
            {"x": 22 + 124 * c, "y": 134 - 124 * a, "r": 1.5 + 6 * math.sqrt(n / bins.count.max()), "n": int(n)}
            for c, a, n in zip(bins.confidence, bins.accuracy, bins.count, strict=True)
            if n
        ]
        out.append({"label": variant.label, "ece": f"{ece:.3f}", "dots": dots, "picked": variant == comparison.picked})
    return out


def _pooled(parts: Sequence[Any], n_bins: int) -> ReliabilityBins:
    """The bins of all predictions together; of tokens those in which each model was measured."""
    if not isinstance(parts[0], TokenStatistics):
        confidence, correct = (np.concatenate([getattr(part, name) for part in parts]) for name in ("confidence", "correct"))
        return reliability_bins(confidence, correct, n_bins)
    known = [{name: np.array(column, dtype=np.float64) for name, column in part.row.reliability.items()} for part in parts]
    count = np.sum([part["count"] for part in known], axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [
            np.sum([part["count"] * np.nan_to_num(part[name]) for part in known], axis=0) / count
            for name in ("confidence", "accuracy")
        ]
    return ReliabilityBins(known[0]["edges"], count.astype(np.int64), *means)


def print_comparison(comparison: Comparison, facts: Facts) -> None:
    """The table and the verdict on the console."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    seeds = len(comparison.seeds)
    for title, of, name in _sets(comparison):
        compared, lines = {contrast.metric for contrast in of.contrasts}, rows(of, name)
        title = f"{title}, {of.size(name)}, mean of {seeds} seed{'s' * (seeds > 1)}"
        made = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), show_edge=False)
        headings = [cell["heading"] for cell in lines[0]["cells"]]
        wide = {"debiased RMSCE", "AURC", "Brier"} | {*headings} - {heading for _, heading in COLUMNS} - compared
        shown = [i for i, heading in enumerate(headings) if heading not in wide]
        for heading in ("run", "T", *(lines[0]["cells"][i]["heading"] for i in shown)):
            made.add_column(Text(heading), justify="left" if heading == "run" else "right")
        for line in lines:
            made.add_row(Text(line["label"]), line["temperature"] or "–", *(line["cells"][i]["value"] for i in shown))
        console.print(made)
    for text in (f"Verdict: {comparison.verdict.sentence}", *comparison.verdict.evidence):
        console.print(text, markup=False, highlight=False)
    for text in (*comparison.verdict.caveats, *facts.warnings):
        console.print(f"Note: {text}", markup=False, highlight=False)


def _panel(contrasts: Sequence[Contrast], title: str, level: float) -> dict[str, Any]:
    ends = [value for c in contrasts for value in (*_seed_ends(c), c.low, c.high, c.value, *c.per_seed) if value is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    span = (high - low) or 1.0
    low, high = low - 0.04 * span, high + 0.04 * span

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) / (high - low) * (_WIDTH - 2 * _MARGIN), 2)

    lines, y = [], 8.0
    for contrast in contrasts:
        # A long name has its numbers on a line of their own.
        extra = 13.0 if len(contrast.row) > _LONG_NAME else 0.0
        name_y, y = y + 11, y + extra
        seeds = []
        for i, value in enumerate(contrast.per_seed):
            interval = None
            if contrast.per_seed_low and contrast.per_seed_high:
                interval = place(contrast.per_seed_low[i]), place(contrast.per_seed_high[i])
            seeds.append({"x": place(value), "interval": interval, "y": y + 24 + 6 * i})
        whole = None if contrast.low is None or contrast.high is None else (place(contrast.low), place(contrast.high))
        text = f"{contrast.value:+.3f}"
        if contrast.low is not None and contrast.high is not None:
            text += f" [{contrast.low:+.3f}, {contrast.high:+.3f}]"
        bottom = y + 24 + 6 * len(seeds) + 2
        finding = contrast.corrected(level)
        lines.append(
            {
                "label": contrast.row,
                "text": text,
                "finding": {"none": "no difference shown"}.get(finding, finding),
                "class": finding,
                "name_y": name_y,
                "value_y": y + 11,
                "seeds": seeds,
                "mean": place(contrast.value),
                "whole": whole,
                "bottom": bottom,
            }
        )
        y = bottom + 10
    better = "left" if direction(contrasts[0].metric) == "lower" else "right"
    ticks = [{"x": place(value), "text": f"{value:+g}" if value else "0"} for value in _ticks(low, high)]
    reference = contrasts[0].against
    return {
        "title": f"{title}: less {reference}",
        "better": better,
        "lines": lines,
        "height": y,
        "zero": place(0),
        "ticks": ticks,
    }


def _seed_ends(contrast: Contrast) -> list[float]:
    return [*(contrast.per_seed_low or []), *(contrast.per_seed_high or [])]


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside [low, high], at most so many, 0 among them."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _known_columns() -> set[str]:
    return {metric for metric, _ in COLUMNS} | {"null_ece", "null_ece_q95"}


def _number(value: float, metric: str) -> str:
    return (
        "–" if math.isnan(value) else format(value, "+.3f" if metric == "signed_gap" else ".4f" if metric == "e_aurc" else ".3f")
    )


def _mean(found: Measurement) -> str:
    return _number(found.mean, found.metric)


def _interval(found: Measurement, seeds: int) -> str:
    """Over seeds; none from two, whose t interval is 12.7 standard errors to each side."""
    if found.low is None or found.high is None or seeds < FEWEST_SEEDS:
        return ""
    # A t interval over few seeds knows no bounds, but the metrics have some.
    low = found.low if found.metric == "signed_gap" else max(0.0, found.low)
    high = min(1.0, found.high) if found.metric in _AT_MOST_1 else found.high
    return f"[{_number(low, found.metric)}, {_number(high, found.metric)}]"
