"""Facts about the report: what its rows hold, that its file gives it back, and what its sentences claim."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hf_ls.metrics import summarise
from hf_ls.report import TABLE_METRICS, CalibrationReport, CalibrationRow

ROOT = Path(__file__).parent.parent


def toy_logits(n: int = 200, num_classes: int = 3, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1.5
    return scale * logits, labels


def make_report(n: int = 200, num_classes: int = 3, rows: int = 4, **changes: Any) -> CalibrationReport:
    """Rows over one toy split: an over-confident baseline, an under-confident smoothed run, both tempered."""
    logits, labels = toy_logits(n, num_classes)
    settings = [("baseline", 0.0, 1.0, 1.0), ("baseline + temperature", 0.0, 1.6, 1.0)]
    settings += [("smoothed", 0.1, 1.0, 0.4), ("smoothed + temperature", 0.1, 0.7, 0.4)]
    made = [
        CalibrationRow.from_logits(name, epsilon, temperature, factor * logits, labels, repetitions=50)
        for name, epsilon, temperature, factor in settings[:rows]
    ]
    steps = range(10, 60, 10)
    history = {
        row.name: [
            {
                "step": s,
                "loss": 1.0 - s / 100 + row.epsilon,
                "nll": 1.0 - s / 100,
                "smoothing_term": row.epsilon,
            }
            for s in steps
        ]
        + [{"step": 50, "eval_nll": 0.8, "eval_ece": 0.1}]
        for row in made
        if row.temperature == 1
    }
    fields: dict[str, Any] = {
        "task": "text-classification",
        "model_name": "toy-model",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "dataset": {
            "name": "snippets",
            "hub_id": None,
            "split": "test",
            "n": n,
            "class_counts": np.bincount(labels, minlength=num_classes),
            "licence": "MIT",
            "n_train": 1000,
            "n_validation": 100,
        },
        "label_names": [f"label {i}" for i in range(num_classes)],
        "smoothing": {
            "epsilon": 0.1,
            "convention": "all",
            "prior": "uniform",
            "schedule": None,
            "optimal_logit_gap": 3.332,
            "max_confidence": 0.933,
        },
        "rows": made,
        "training": {"seeds": [0], "steps": 50, "learning_rate": 5e-5, "max_length": 16, "peft": "none"},
        "history": history,
        "versions": {"transformers": "5.23.0"},
        "published": made[-1].name if rows != 3 else "smoothed",
    }
    return CalibrationReport(**fields | changes)


def with_metrics(row: CalibrationRow, **metrics: dict[str, float]) -> CalibrationRow:
    return replace(row, metrics={**row.metrics, **metrics})


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def test_row_holds_what_an_independent_count_finds() -> None:
    logits, labels = toy_logits()
    row = CalibrationRow.from_logits("x", 0.0, 1.6, logits, labels, repetitions=50)
    scaled = logits / 1.6
    p = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    confidence, correct = p.max(1), p.argmax(1) == labels

    assert row.metrics == summarise(scaled, labels, repetitions=50)
    assert row.n == len(labels)
    assert row.value("accuracy") == correct.mean()
    assert row.value("accuracy") + row.value("signed_gap") == pytest.approx(confidence.mean(), abs=1e-12)
    for histogram, part in ((row.histogram_correct, correct), (row.histogram_incorrect, ~correct)):
        assert histogram == np.histogram(confidence[part], bins=20, range=(0, 1))[0].tolist()
    edges = np.array(row.reliability["edges"])
    for b in range(15):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        assert row.reliability["count"][b] == inside.sum()
        band = row.reliability["band_low"][b], row.reliability["band_high"][b]
        if inside.any():
            assert row.reliability["accuracy"][b] == pytest.approx(correct[inside].mean())
            assert row.reliability["confidence"][b] == pytest.approx(confidence[inside].mean())
            assert band[0] is not None and band[1] is not None and 0 <= band[0] <= band[1] <= 1
        else:
            assert band == (None, None) and row.reliability["accuracy"][b] is None


@pytest.mark.parametrize(("n", "num_classes", "rows"), [(200, 3, 4), (5, 2, 1), (60, 20, 3)])
def test_file_gives_the_report_back_exactly(tmp_path: Path, n: int, num_classes: int, rows: int) -> None:
    report = make_report(n, num_classes, rows)
    path = report.save(tmp_path / "new folder" / "calibration.json")
    assert CalibrationReport.load(path) == report
    assert os.listdir(path.parent) == ["calibration.json"]
    assert None in report.rows[0].reliability["accuracy"]  # an empty bin


def test_no_value_is_written_which_json_lacks(tmp_path: Path) -> None:
    broken = {"baseline": [{"step": 1, "loss": math.nan, "nll": np.float32(math.inf), "epoch": np.int64(2)}]}
    report = make_report(history=broken)
    text = report.save(tmp_path / "r.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert strict["history"]["baseline"] == [{"step": 1, "loss": None, "nll": None, "epoch": 2}]
    assert CalibrationReport.load(tmp_path / "r.json") == report


def test_unplain_values_are_named_where_they_stand() -> None:
    with pytest.raises(TypeError, match=r"training\['optimizer'\].*got object"):
        make_report(training={"optimizer": object()})
    with pytest.raises(TypeError, match="expected text as keys in versions, got 3"):
        make_report(versions={3: "x"})


@pytest.mark.parametrize("where", [(), ("rows", 0), ("rows", 0, "reliability"), ("dataset",), ("smoothing",)])
def test_missing_and_unknown_keys_are_named(where: tuple[Any, ...]) -> None:
    for change, word in (("unknown", "colour"), ("missing", None)):
        fields = json.loads(make_report().to_json())
        part = fields
        for key in where:
            part = part[key]
        if change == "unknown":
            part["colour"] = 1
        else:
            word = next(iter(part))
            del part[word]
        with pytest.raises(ValueError, match=f"{change}.*{word}"):
            CalibrationReport.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rows": 1}', "null"])
def test_load_refuses_what_is_no_report_and_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json"):
        CalibrationReport.load(tmp_path / "calibration.json")


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_report(rows=1).save(tmp_path / "calibration.json")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_report(rows=2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["calibration.json"]


def test_contradictions_are_refused() -> None:
    report = make_report()
    other = CalibrationRow.from_logits("other", 0.1, 1.0, *toy_logits(199), repetitions=10)
    for changes, message in (
        ({"rows": [*report.rows, other]}, "n = 200 in rows.*199"),
        ({"rows": [report.rows[0], report.rows[0]]}, "distinct names"),
        ({"rows": []}, "distinct names"),
        ({"published": "best"}, "names of rows.*best"),
        ({"history": {"elsewhere": []}}, "names of rows.*elsewhere"),
        (
            {"dataset": report.dataset | {"class_counts": [1, 2, 3]}},
            r"3 class_counts with sum 200, got \[1, 2, 3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(report, **changes)
    with pytest.raises(ValueError, match="temperature > 0"):
        replace(report.rows[0], temperature=0.0)
    with pytest.raises(ValueError, match="aurc"):
        replace(report.rows[0], metrics={k: v for k, v in report.rows[0].metrics.items() if k != "aurc"})


def test_rows_are_found_by_what_they_are() -> None:
    report = make_report()
    baseline, baseline_t, smoothed, smoothed_t = report.rows
    assert (report.baseline, report.smoothed, report.published_row) == (baseline, smoothed, smoothed_t)
    assert report.tempered(baseline) is baseline_t and report.tempered(smoothed) is smoothed_t
    assert make_report(rows=1, published=None).published_row is not None
    assert make_report(rows=2, published=None).published_row is None


@pytest.mark.parametrize(
    ("gap", "word"),
    [
        (interval(0.1, 0.05, 0.15), "is over-confident"),
        (interval(-0.1, -0.15, -0.05), "is under-confident"),
        (interval(0.01, -0.02, 0.04), "not distinguishable from calibrated at this n"),
        ({"value": 0.01}, "not known"),
    ],
)
def test_regime_follows_the_interval_of_the_signed_gap(gap: dict[str, float], word: str) -> None:
    report = make_report()
    first = with_metrics(report.rows[0], signed_gap=gap, ece={"value": 0.01, "null": 0.02, "null_q95": 0.03})
    sentence = replace(report, rows=[first, *report.rows[1:]]).regime()
    assert word in sentence
    assert "baseline" in sentence and "n = 200" in sentence and first.show("signed_gap") in sentence
    assert "still above" not in sentence


def test_regime_sees_errors_which_cancel() -> None:
    report = make_report()
    gap, ece = interval(0.0, -0.02, 0.02), {"value": 0.2, "null": 0.02, "null_q95": 0.03}
    rows = [with_metrics(report.rows[0], signed_gap=gap, ece=ece), *report.rows[1:]]
    assert "ECE of 0.200 is still above 0.030" in replace(report, rows=rows).regime()


def test_regime_does_not_trust_a_bootstrap_without_an_error() -> None:
    """Five of five right at confidence 0.9 happen with probability 0.59: no sign of under-confidence."""
    logits = np.log([[0.9, 0.05, 0.05]] * 5) + np.linspace(0, 1e-3, 5)[:, None] * [1, 0, 0]
    row = CalibrationRow.from_logits("baseline", 0.0, 1.0, logits, [0] * 5, repetitions=50)
    assert row.metrics["signed_gap"]["high"] is not None and row.metrics["signed_gap"]["high"] < 0
    dataset = make_report().dataset | {"n": 5, "class_counts": [5, 0, 0]}
    report = replace(make_report(rows=1, history={}), rows=[row], dataset=dataset)
    assert "not distinguishable" in report.regime()


def test_regime_of_a_smoothed_run_alone_gives_no_advice_to_smooth() -> None:
    report = make_report()
    alone = replace(report, rows=[report.rows[2]], history={}, published=None)
    assert "under-confident" in alone.regime() and "smoothed" in alone.regime()
    assert "it may hurt here" not in alone.regime()
    assert "Smoothing lowers confidence" in report.regime()


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        (
            interval(0.5, 0.4, 0.6),
            interval(0.8, 0.7, 0.9),
            "smoothing is better (the intervals are disjoint)",
        ),
        (interval(0.8, 0.7, 0.9), interval(0.5, 0.4, 0.6), "smoothing is worse (the intervals are disjoint)"),
        (interval(0.5, 0.4, 0.7), interval(0.6, 0.55, 0.8), "no difference shown (the intervals overlap)"),
        (interval(0.5, 0.4, 0.6), interval(0.7, 0.6, 0.8), "no difference shown (the intervals overlap)"),
        ({"value": 0.5}, interval(0.8, 0.7, 0.9), "not decided (no interval)"),
    ],
)
def test_verdict_claims_only_what_disjoint_intervals_show(ours: Any, theirs: Any, word: str) -> None:
    report = make_report()
    baseline, baseline_t, smoothed, smoothed_t = report.rows
    for metric in ("nll", "ece"):
        rows = [
            baseline,
            with_metrics(baseline_t, **{metric: theirs}),
            with_metrics(smoothed, **{metric: ours}),
            smoothed_t,
        ]
        verdict = replace(report, rows=rows).verdict()
        clause = next(part for part in verdict.split(". ") if part.startswith(metric.upper()))
        assert clause.endswith(word)
        assert rows[2].show(metric) in clause and rows[1].show(metric) in clause
        assert "temperature scaling of the baseline" in verdict and "One seed" in verdict


def test_verdict_without_a_pair_says_so() -> None:
    assert "Nothing to compare" in make_report(rows=2).verdict()
    plain = make_report()
    two = replace(plain, rows=[plain.rows[0], plain.rows[2]], published=None, training={})
    assert "against the baseline, test split" in two.verdict()
    assert "number of seeds is not recorded" in two.verdict()
    assert "2 seeds" in replace(two, training={"seeds": [0, 1]}).verdict()


def _printed(report: CalibrationReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.table(width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_table_shows_every_number_whole(width: int) -> None:
    report = make_report()
    text = _printed(report, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    words = text.split()
    for row in report.rows:
        for metric in TABLE_METRICS:
            assert all(part in words for part in row.show(metric).split()), (row.name, metric)
        assert f"{row.metrics['ece']['null']:.3f}" in words


def test_wide_table_keeps_value_and_interval_together() -> None:
    report = make_report()
    text = _printed(report, 200)
    assert all(row.show(metric) in text for row in report.rows for metric in TABLE_METRICS)


def test_table_shows_names_as_they_are_and_gaps_as_a_dash() -> None:
    report = make_report()
    row = with_metrics(replace(report.rows[0], name="[red]x[/red]\n[bold"), aurc={"value": math.nan})
    text = _printed(replace(report, rows=[row], history={}, published=None), 200)
    assert "[red]x[/red] [bold" in text
    assert row.show("aurc") == "–"


def test_import_stays_light() -> None:
    code = (
        "import hf_ls.report, hf_ls.plots, sys;"
        "print([m for m in ('torch', 'matplotlib', 'rich', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
