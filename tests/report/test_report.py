"""Facts about the report: what its rows hold, and that its file gives it back."""

from __future__ import annotations

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
from places import ROOT
from reports import interval, make_report, make_token_report, toy_logits, toy_tokens, with_metrics

from hf_ls.losses.smoothing import Schedule, Smoothing
from hf_ls.metrics import summarise
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.card import model_card
from hf_ls.report.facts import SmoothingFacts, TrainingFacts
from hf_ls.report.figures import row_colours


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
    with pytest.raises(TypeError, match=r"objective_params\['x'\].*got object"):
        make_report(training=TrainingFacts(objective_params={"x": object()}))
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
    other = CalibrationRow.from_logits("other", 0.1, None, *toy_logits(199), repetitions=10)
    for changes, message in (
        ({"rows": [*report.rows, other]}, "n = 200 in rows.*199"),
        ({"rows": [report.rows[0], report.rows[0]]}, "distinct names"),
        ({"rows": []}, "distinct names"),
        ({"published": "best"}, "runs of rows.*best"),
        ({"history": {"elsewhere": []}}, "runs of rows.*elsewhere"),
        (
            {"dataset": replace(report.dataset, class_counts=[1, 2, 3])},
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
    assert (report.baseline, report.challengers, report.published_row) == (baseline, [smoothed], smoothed_t)
    assert report.tempered(baseline) is baseline_t and report.tempered(smoothed) is smoothed_t
    assert make_report(rows=1, published=None).published_row is not None
    assert make_report(rows=2, published=None).published_row is None


def test_row_of_tokens_holds_what_the_tokens_say() -> None:
    tokens = toy_tokens()
    extra = {"phoneme_error_rate": interval(0.2, 0.1, 0.3), "sequence_ece": {"value": 0.1}}
    row = CalibrationRow.from_tokens("x", 0.1, None, tokens, extra)
    assert row.is_token and row.n == len(tokens) == sum(row.reliability["count"])
    assert row.quality == ["phoneme_error_rate"]
    assert CalibrationRow.from_tokens("x", 0.1, None, tokens).quality == []
    for metric, found in (tokens.metrics() | extra).items():
        assert row.metrics[metric] == found
    assert row.groups == tokens.groups() and {g["kind"] for g in row.groups} == {"end_of_sequence", "frequency", "position"}
    with pytest.raises(ValueError, match=r"other metrics in extra than those of the tokens, got \['ece'\]"):
        CalibrationRow.from_tokens("x", 0.1, None, tokens, {"ece": {"value": 0.1}})


def test_temperature_of_a_token_row_is_already_in_its_tokens() -> None:
    plain, tempered = (CalibrationRow.from_tokens("x", 0.0, t, toy_tokens(temperature=t or 1.0)) for t in (None, 2.0))
    assert tempered.temperature == 2.0 and tempered.value("accuracy") == plain.value("accuracy")
    assert tempered.value("nll") == toy_tokens(temperature=2.0).metrics()["nll"]["value"] != plain.value("nll")


@pytest.mark.parametrize("task", ["text2text-generation", "text-generation", "token-classification"])
def test_file_gives_a_report_of_tokens_back_exactly(task: str, tmp_path: Path) -> None:
    report = make_token_report(task)
    loaded = CalibrationReport.load(report.save(tmp_path / "calibration.json"))
    assert loaded == report and loaded.rows[0].groups == report.rows[0].groups != []
    assert report.is_token_task and report.size == f"n = {report.rows[0].n} tokens in 80 sequences"


def test_files_from_before_groups_are_read() -> None:
    report = make_report()
    fields = json.loads(report.to_json())
    for row in fields["rows"]:
        assert row.pop("groups") == []
    assert CalibrationReport.from_json(json.dumps(fields)) == report
    assert not report.is_token_task and report.size == "n = 200"


def test_contradictions_of_token_reports_are_refused() -> None:
    report, examples = make_token_report(), make_report()
    names = ["a"] * 9
    for changes, message in (
        ({"label_names": names}, "class_counts None only with rows of tokens and label_names"),
        ({"rows": [*report.rows[:3], replace(examples.rows[3])]}, "rows of tokens or of examples, got both"),
        ({"dataset": replace(report.dataset, n=7)}, "n = 7 in rows, got .381"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(report, **changes)
    with pytest.raises(ValueError, match="class_counts None only with rows of tokens"):
        replace(examples, dataset=replace(examples.dataset, class_counts=None), label_names=[])
    row = report.rows[0]
    with pytest.raises(ValueError, match=r"'brier'.*TokenCalibration"):
        replace(row, metrics={name: found for name, found in row.metrics.items() if name != "brier"})
    with pytest.raises(ValueError, match=r"group in row 'baseline'.*missing .'ece'"):
        replace(row, groups=[{key: value for key, value in row.groups[0].items() if key != "ece"}])


def test_numbers_are_shown_with_the_digits_that_tell_rows_apart() -> None:
    row = make_token_report(rows=1).rows[0]
    large = {"bleu": interval(41.236, 40.0, 42.5), "perplexity": {"value": 123456.0}, "chrf": {"value": math.nan}}
    row = with_metrics(row, **large, ece=interval(0.0123, 0.01, 0.02))
    assert row.show("bleu") == "41.24 [40.00, 42.50]" and row.show("perplexity") == "1.23e+05"
    assert row.show("ece") == "0.012 [0.010, 0.020]" and row.show("chrf") == row.show("unmeasured") == "–"
    assert row.interval("unmeasured") is None


def test_import_stays_light() -> None:
    code = (
        "import hf_ls.report.calibration_report, hf_ls.report.plots, hf_ls.report.table, hf_ls.report.sentences, sys;"
        "print([m for m in ('torch', 'matplotlib', 'rich', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_runs_of_one_epsilon_are_told_apart_by_their_names() -> None:
    """A distilled run beside its baseline, both without label smoothing, and a temperature which happens to be 1."""
    report = make_report()
    names = {"smoothed": "distilled"}
    rows = [replace(row, run=names.get(row.run, row.run), epsilon=0.0) for row in report.rows]
    rows[1] = replace(rows[1], temperature=1.0)
    report = replace(report, rows=[rows[2], rows[0], rows[3], rows[1]], history={}, published=None, differences=[])
    assert (report.challengers, report.baseline) == ([rows[2]], rows[0])
    assert report.tempered(rows[0]) == rows[1] and report.tempered(rows[2]) == rows[3] and report.tempered(rows[3]) is None
    assert len(set(row_colours(report).values())) == 4
    with pytest.raises(ValueError, match="set tempered=True"):
        replace(rows[3], tempered=False)


def test_a_run_which_ramps_from_0_is_not_said_to_be_unsmoothed() -> None:
    ramp = SmoothingFacts.of(Smoothing(0.0, schedule=Schedule("linear", 0.4)), 3, steps=(5, 5))
    assert (ramp.final_epsilon, ramp.epsilon_at, ramp.is_used, ramp.optimal_logit_gap) == (0.4, [0.0, 0.2, 0.4], True, None)
    never = SmoothingFacts.of(Smoothing(0.1, schedule=Schedule("constant", warmup_steps=9)), 3, steps=(5, 5))
    assert never.is_used is False and SmoothingFacts(None).is_used is None
    report = make_report()
    rows = [replace(row, epsilon=0.0) for row in report.rows]
    report = replace(report, rows=rows, smoothing=ramp)
    assert [report.epsilon_text(row) for row in rows] == ["0", "0", "0 → 0.4", "0 → 0.4"]
    card = model_card(report)
    assert "with label smoothing (epsilon = 0 → 0.4)" in card and "No label smoothing was used" not in card
    assert CalibrationReport.from_json(report.to_json()) == report
