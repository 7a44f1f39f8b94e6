"""Facts about the findings: each sentence claims what the intervals show, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reports import interval, make_report, make_token_report, with_metrics

from hf_ls.metrics import TokenCalibration
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.facts import TrainingFacts
from hf_ls.report.sentences import regime, verdict


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
    sentence = regime(replace(report, rows=[first, *report.rows[1:]]))
    assert word in sentence
    assert "baseline" in sentence and "n = 200" in sentence and first.show("signed_gap") in sentence
    assert "still above" not in sentence


def test_regime_sees_errors_which_cancel() -> None:
    report = make_report()
    gap, ece = interval(0.0, -0.02, 0.02), {"value": 0.2, "null": 0.02, "null_q95": 0.03}
    rows = [with_metrics(report.rows[0], signed_gap=gap, ece=ece), *report.rows[1:]]
    assert "ECE of 0.200 is still above 0.030" in regime(replace(report, rows=rows))


def test_regime_does_not_trust_a_bootstrap_without_an_error() -> None:
    """Five of five right at confidence 0.9 happen with probability 0.59: no sign of under-confidence."""
    logits = np.log([[0.9, 0.05, 0.05]] * 5) + np.linspace(0, 1e-3, 5)[:, None] * [1, 0, 0]
    row = CalibrationRow.from_logits("baseline", 0.0, None, logits, [0] * 5, repetitions=50)
    assert row.metrics["signed_gap"]["high"] is not None and row.metrics["signed_gap"]["high"] < 0
    dataset = replace(make_report().dataset, n=5, class_counts=[5, 0, 0])
    report = replace(make_report(rows=1, history={}), rows=[row], dataset=dataset)
    assert "not distinguishable" in regime(report)


def test_regime_of_a_smoothed_run_alone_gives_no_advice_to_smooth() -> None:
    report = make_report()
    alone = replace(report, rows=[report.rows[2]], history={}, published=None)
    assert "under-confident" in regime(alone) and "smoothed" in regime(alone)
    assert "it may hurt here" not in regime(alone)
    assert "Smoothing lowers confidence" in regime(report)


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
        found = verdict(replace(report, rows=rows))
        clause = next(part for part in found.split(". ") if part.startswith(metric.upper()))
        assert clause.endswith(word)
        assert rows[2].show(metric) in clause and rows[1].show(metric) in clause
        assert "temperature scaling of the baseline" in found and "One seed" in found


def test_verdict_without_a_pair_says_so() -> None:
    assert "Nothing to compare" in verdict(make_report(rows=2))
    plain = make_report()
    two = replace(plain, rows=[plain.rows[0], plain.rows[2]], published=None, training=TrainingFacts())
    assert "against the baseline, test split" in verdict(two)
    assert "number of seeds is not recorded" in verdict(two)
    assert "2 seeds" in verdict(replace(two, training=TrainingFacts(seeds=[0, 1])))


def token_report(**of_smoothed: dict[str, float]) -> CalibrationReport:
    """A report whose baseline has every metric at 0.5 ± 0.1, and whose smoothed row differs as told."""
    report = make_token_report()
    same = {metric: interval(0.5, 0.4, 0.6) for metric in ("phoneme_error_rate", "exact_match", "nll", "ece")}
    baseline, baseline_t, smoothed, smoothed_t = report.rows
    rows = [with_metrics(baseline, **same), baseline_t, with_metrics(smoothed, **{**same, **of_smoothed}), smoothed_t]
    return replace(report, rows=rows)


LOW, HIGH = interval(0.2, 0.1, 0.3), interval(0.8, 0.7, 0.9)


def test_verdict_on_tokens_sets_quality_nll_and_ece_side_by_side() -> None:
    report = token_report()
    found = verdict(report)
    assert "against the baseline, test split, n = 381 tokens in 80 sequences" in found
    order = [found.index(f"{name} 0.500 [0.400, 0.600] against") for name in ("Phoneme error rate", "Exact match", "NLL", "ECE")]
    assert order == sorted(order) and "move apart" not in found
    tempered = report.rows[3], report.rows[1]
    assert "With a temperature each (T = 0.60 against 1.40): NLL " in found
    for metric in ("nll", "ece"):
        assert f"{tempered[0].show(metric)} against {tempered[1].show(metric)}" in found
    assert "the choice of test sequences, not the seed" in found
    assert "With a temperature" not in verdict(replace(report, rows=[report.rows[0], report.rows[2]], history={}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"phoneme_error_rate": LOW, "ece": HIGH, "nll": HIGH}, "phoneme error rate better, NLL and ECE worse;"),
        ({"exact_match": LOW, "ece": LOW}, "ECE better, exact match worse;"),
        ({"nll": LOW, "ece": HIGH}, "NLL better, ECE worse;"),
        ({"phoneme_error_rate": LOW, "exact_match": HIGH, "nll": LOW, "ece": LOW}, None),
        ({"phoneme_error_rate": LOW, "ece": interval(0.7, 0.6, 0.8)}, None),
        ({"phoneme_error_rate": LOW, "ece": {"value": 0.9}}, None),
    ],
)
def test_verdict_says_when_metrics_move_apart_and_only_if_the_intervals_do(changes: dict[str, Any], sentence: str | None) -> None:
    found = verdict(token_report(**changes))
    assert ("They move apart" in found) == (sentence is not None)
    assert sentence is None or f"They move apart: {sentence}" in found


def test_each_metric_is_judged_in_its_own_direction() -> None:
    better = verdict(token_report(phoneme_error_rate=LOW, exact_match=HIGH))
    worse = verdict(token_report(phoneme_error_rate=HIGH, exact_match=LOW))
    for name in ("Phoneme error rate", "Exact match"):
        for found, word in ((better, "better"), (worse, "worse")):
            clause = next(part for part in found.split(". ") if part.startswith(name))
            assert clause.endswith(f"smoothing is {word} (the intervals are disjoint)")


def test_verdict_without_a_task_metric_takes_the_token_accuracy() -> None:
    report = make_token_report("text-generation")
    assert f"Token accuracy {report.rows[2].show('accuracy')} against" in verdict(report)
    assert "Token accuracy" not in verdict(make_token_report()) and "accuracy" not in verdict(make_report()).lower()


def test_regime_counts_sequences_where_every_token_is_right() -> None:
    """Three sequences of five right tokens each say less than 15 independent tokens, and a bootstrap says too much."""
    items = np.tile([0.8, 1.0, 0.22, 0.1], (3, 5, 1)) + np.linspace(0, 1e-3, 3)[:, None, None] * [1, 0, 0, 0]
    tokens = TokenCalibration(repetitions=50)
    tokens.update(items, np.ones((3, 5), dtype=int))
    row = CalibrationRow.from_tokens("baseline", 0.0, None, tokens)
    assert row.interval("signed_gap")[1] < 0
    dataset = replace(make_token_report(rows=1).dataset, n=15, n_sequences=3)
    report = replace(make_token_report(rows=1), rows=[row], dataset=dataset, history={})
    assert "not distinguishable" in regime(report) and "n = 15 tokens in 3 sequences" in regime(report)
