"""Facts about the findings: each sentence claims what the intervals show, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reports import interval, make_report, make_token_report, with_difference, with_metrics

from hf_ls.metrics import PredictionStatistics, TokenCalibration
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.facts import TrainingFacts
from hf_ls.report.sentences import regime, verdict, warnings


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


@pytest.mark.parametrize(("high", "short"), [(-0.05, False), (-0.15, True)])
def test_a_baseline_far_below_its_accuracy_was_trained_too_short(high: float, short: bool) -> None:
    report = make_report()
    rows = [with_metrics(report.rows[0], signed_gap=interval(-0.3, -0.4, high)), *report.rows[1:]]
    assert ("too short" in regime(replace(report, rows=rows))) == short
    unseen = replace(report, rows=rows, training=None)
    assert "too short" not in regime(unseen), "nobody knows how it was trained"


def test_against_raters_under_confidence_is_told_apart() -> None:
    report = make_report()
    low = with_metrics(report.rows[0], signed_gap=interval(-0.3, -0.4, -0.2))
    soft = with_metrics(low, soft_nll=interval(0.7, 0.6, 0.8))
    assert "raters" in regime(replace(report, rows=[soft, *report.rows[1:]]))
    assert "raters" not in regime(replace(report, rows=[low, *report.rows[1:]]))
    raters = replace(report.rows[2], run="soft labels", epsilon=0.0)
    run = replace(report, rows=[report.rows[0], raters], history={}, published=None)
    assert "training with soft labels is worse" in verdict(with_difference(run, nll=interval(0.3, 0.2, 0.4)))


def test_regime_of_a_smoothed_run_alone_gives_no_advice_to_smooth() -> None:
    report = make_report()
    alone = replace(report, rows=[report.rows[2]], history={}, published=None)
    assert "under-confident" in regime(alone) and "smoothed" in regime(alone)
    assert "it may hurt here" not in regime(alone)
    assert "Smoothing lowers confidence" in regime(report)


@pytest.mark.parametrize("run", ["dft", "evaluated"])
@pytest.mark.parametrize("gap", [0.3, -0.3])
def test_a_run_of_another_objective_gets_no_advice_about_smoothing(run: str, gap: float) -> None:
    report = make_report()
    assert report.training is not None
    row = with_metrics(report.rows[0], signed_gap=interval(gap, gap - 0.05, gap + 0.05))
    training = replace(report.training, objective="dft")
    other = replace(report, rows=[replace(row, run=run)], training=training, history={}, published=None)
    assert "Smoothing" in regime(replace(report, rows=[row, *report.rows[1:]], training=training))
    assert "Smoothing" not in regime(other) and ("temperature" in regime(other)) == (gap > 0)


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (interval(-0.0056, -0.0074, -0.0037), "difference -0.0056 [-0.0074, -0.0037] – smoothing is better"),
        (interval(0.3, 0.2, 0.4), "difference +0.3000 [+0.2000, +0.4000] – smoothing is worse"),
        (interval(-0.1, -0.2, 0.1), "difference -0.1000 [-0.2000, +0.1000] – no difference shown"),
        (interval(-0.1, -0.2, 0.0), "no difference shown"),
        (None, "– not decided (no paired difference)"),
    ],
)
@pytest.mark.parametrize("rows", [(0.5, 0.9), (0.9, 0.5), (0.5, 0.5)])
def test_the_verdict_follows_the_paired_difference_and_never_two_marginal_intervals(
    difference: Any, word: str, rows: tuple[float, float]
) -> None:
    """The two intervals are disjoint in either direction, or equal: the paired difference alone decides."""
    report = make_report()
    for metric in ("nll", "ece"):
        marginal = [interval(value, value - 0.1, value + 0.1) for value in rows]
        changed = {"baseline + temperature": marginal[0], "smoothed": marginal[1]}
        made = [with_metrics(r, **({metric: changed[r.name]} if r.name in changed else {})) for r in report.rows]
        found = verdict(with_difference(replace(report, rows=made), **{metric: difference}))
        clause = next(part for part in found.split(". ") if part.startswith(metric.upper()))
        assert clause.endswith(word)
        assert made[2].show(metric) in clause and made[1].show(metric) in clause
        assert "temperature scaling of the baseline" in found and "One seed" in found
        assert "differences are paired over the same 200 examples" in found


def test_a_report_without_differences_decides_nothing() -> None:
    fields = json.loads(make_report().to_json())
    del fields["differences"]
    report = CalibrationReport.from_json(json.dumps(fields))
    assert report.differences == []
    found = verdict(report)
    assert "only the interval of each row is known" in found and found.count("not decided (no paired difference)") == 2
    assert "better" not in found and "worse" not in found and "no difference shown" not in found


def test_verdict_without_a_pair_says_so() -> None:
    assert "cannot be said: this table has one run only" in verdict(make_report(rows=2))
    plain = make_report()
    two = replace(plain, rows=[plain.rows[0], plain.rows[2]], published=None, training=TrainingFacts())
    assert "against the baseline, test split" in verdict(two)
    assert "number of seeds is not recorded" in verdict(two)
    assert "2 seeds" in verdict(replace(two, training=TrainingFacts(seeds=[0, 1])))


def token_report(**of_smoothed: dict[str, float]) -> CalibrationReport:
    """A report whose rows have every metric at 0.5 ± 0.1, and whose paired differences are around 0 or as told."""
    report = make_token_report()
    same = {metric: interval(0.5, 0.4, 0.6) for metric in ("phoneme_error_rate", "exact_match", "nll", "ece")}
    baseline, baseline_t, smoothed, smoothed_t = report.rows
    rows = [with_metrics(baseline, **same), baseline_t, with_metrics(smoothed, **same), smoothed_t]
    nothing = {metric: interval(0.0, -0.1, 0.1) for metric in same}
    return with_difference(replace(report, rows=rows), **{**nothing, **of_smoothed})


LOW, HIGH = interval(-0.2, -0.3, -0.1), interval(0.2, 0.1, 0.3)


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
        ({"phoneme_error_rate": LOW, "ece": interval(0.2, 0.0, 0.4)}, None),
        ({"phoneme_error_rate": LOW, "ece": None}, None),
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
            assert clause.endswith(f"smoothing is {word}")


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


def _unlearnt(kind: str) -> CalibrationReport:
    """Two sure models: at chance over three even classes; that say "0" to 9 rows of 10; the latter for tokens of 60 sequences."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [100, 100, 100] if kind == "chance" else [270, 20, 10]))
    guesses = rng.integers(0, 3, 300) if kind == "chance" else np.zeros(300, dtype=int)
    rows = []
    for name, epsilon, sure in (("baseline", 0.0, 4.0), ("smoothed", 0.1, 2.5)):
        logits = sure * np.eye(3)[guesses] + rng.normal(size=(300, 3)) * 0.1
        if kind == "tokens":
            stats = PredictionStatistics.from_logits(logits, labels)
            tokens = TokenCalibration(repetitions=50)
            items = np.stack([stats.confidence, stats.correct, stats.nll, stats.brier], -1)
            tokens.update(items.reshape(60, 5, 4), labels.reshape(60, 5))
            rows.append(CalibrationRow.from_tokens(name, epsilon, None, tokens))
        else:
            rows.append(CalibrationRow.from_logits(name, epsilon, None, logits, labels, repetitions=50))
    plain = make_token_report("token-classification", rows=1) if kind == "tokens" else make_report(rows=1)
    size = {"n_sequences": 60} if kind == "tokens" else {}
    dataset = replace(plain.dataset, n=300, class_counts=np.bincount(labels).tolist(), **size)
    return replace(plain, rows=rows, dataset=dataset, label_names=["a", "b", "c"], history={}, published=None, differences=[])


@pytest.mark.parametrize("kind", ["chance", "majority", "tokens"])
def test_a_model_which_has_not_learnt_gets_no_advice(kind: str) -> None:
    report = _unlearnt(kind)
    sentence = regime(report)
    share = "0.333" if kind == "chance" else "0.900"
    assert f"has not learnt: its accuracy {report.rows[0].show('accuracy')} is not measurably above {share}" in sentence
    assert verdict(report).startswith("No verdict: ") and warnings(report) == []
    for text in (sentence, verdict(report)):
        assert not any(word in text for word in ("may help", "may hurt", "smaller epsilon", "better ", "over-confident"))


def test_one_row_which_has_not_learnt_is_named_beside_one_which_has() -> None:
    bad, good = _unlearnt("chance"), make_report(n=300, rows=3)
    rows = [bad.rows[0], good.rows[2]]
    report = replace(good, rows=rows, dataset=bad.dataset, differences=[], history={}, published=None)
    assert "But the model of row 'baseline' has not learnt" in verdict(report)
    assert "has not learnt" not in verdict(good) and "has not learnt" not in regime(good)


def test_a_model_of_rare_classes_may_learn_without_a_better_accuracy() -> None:
    """It says "0" to everybody, and knows who is at risk: its NLL is below the entropy of the classes."""
    rng = np.random.default_rng(0)
    risk = rng.choice([0.01, 0.3], 2000, p=[0.8, 0.2])
    labels = (rng.random(2000) < risk).astype(int)
    row = CalibrationRow.from_logits("baseline", 0.0, None, np.log(np.stack([1 - risk, risk], 1)), labels, repetitions=50)
    counts = np.bincount(labels).tolist()
    report = make_report(rows=1, history={})
    report = replace(report, rows=[row], dataset=replace(report.dataset, n=2000, class_counts=counts), label_names=["no", "yes"])
    assert row.value("accuracy") == max(counts) / 2000 and "has not learnt" not in regime(report)
