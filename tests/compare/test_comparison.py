"""Comparisons: what is refused, what is shown, JSON, and verdicts on cases whose truth is known from their making."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from constructed import CASES, Case, Model, results_of, softer, truth_of

from hf_ls.compare.comparison import METRICS, Comparison, Result, Variant
from hf_ls.compare.statistics import compare
from hf_ls.metrics import PredictionStatistics, aurc, e_aurc, ece, null_ece, rmsce_debiased, smooth_ece
from hf_ls.metrics.paired import COMPARED

BASE, TEMPERED = Variant("baseline", 0, False), Variant("baseline", 0, True)
NOISY = Case("smooth", Model(2.0, 1.5), softer(Model(), 1.4, 1.2, 1.0, noise=0.7), n=400)


@pytest.fixture(scope="module")
def results():
    return [
        dataclasses.replace(r, extra={"test": {"f1": float(r.statistics["test"].correct.mean())}}) for r in results_of(NOISY, 0)
    ]


@pytest.fixture(scope="module")
def comparison(results):
    return compare(results, repetitions=200)


def changed(results, index, **changes):
    return [dataclasses.replace(r, **changes) if i == index else r for i, r in enumerate(results)]


def test_labels_of_variants():
    assert [v.label for v in (BASE, TEMPERED)] == ["baseline", "baseline + temperature"]
    assert Variant("smoothed", 0.1, True).label == "smoothed ε=0.1 + temperature"
    assert Variant("online", 0, False).label == "online"
    for name, epsilon in [("", 0.1), ("baseline", 0.1), ("smoothed", float("nan"))]:
        with pytest.raises(ValueError, match="expected a name and a finite epsilon"):
            Variant(name, epsilon, False)


def test_every_metric_of_every_variant_is_there_with_every_seed(results, comparison):
    assert comparison.seeds == [0, 1, 2] and comparison.sets == {"test": 400} and comparison.clusters == {}
    assert [v.label for v in comparison.variants[:3]] == ["baseline", "baseline + temperature", "smoothed ε=0.05"]
    assert comparison.metrics() == [*METRICS, "f1"]
    by_cell = {(r.variant, r.seed): r.statistics["test"] for r in results}
    for variant in comparison.variants:
        stats = by_cell[variant, 1]
        pair = (stats.confidence, stats.correct)
        expected = {
            "accuracy": stats.correct.mean(), "f1": stats.correct.mean(), "nll": stats.nll.mean(), "brier": stats.brier.mean(),
            "ece": ece(*pair), "smooth_ece": smooth_ece(*pair), "rmsce_debiased": rmsce_debiased(*pair), "aurc": aurc(*pair),
            "e_aurc": e_aurc(*pair), "signed_gap": (stats.confidence - stats.correct).mean(),
        }  # fmt: skip
        for metric, value in expected.items():
            found = comparison.measurement(variant, metric)
            assert found.per_seed[1] == pytest.approx(value, abs=1e-12), metric
            assert found.mean == pytest.approx(np.mean(found.per_seed))
            t = scipy.stats.ttest_1samp(found.per_seed, 0.0).confidence_interval(0.95)
            assert (found.low, found.high) == pytest.approx((t.low, t.high)), metric
            if metric in ("nll", "accuracy", "ece", "smooth_ece", "rmsce_debiased"):
                assert all(low < high for low, high in zip(found.per_seed_low, found.per_seed_high, strict=True))
        null = null_ece(stats.confidence, repetitions=2000, seed=5)
        assert comparison.measurement(variant, "null_ece").per_seed[1] == pytest.approx(null[0], rel=0.1)
        value, limit = (comparison.measurement(variant, m).per_seed for m in ("ece", "null_ece_q95"))
        assert comparison.consistent(variant) == [v <= q for v, q in zip(value, limit, strict=True)]


def test_contrasts_are_differences_of_measurements_and_holm_grows_with_the_grid(comparison, results):
    variant = Variant("smoothed", 0.1, True)
    for reference in (BASE, TEMPERED):
        for metric in (*COMPARED, "f1"):
            contrast = comparison.contrast(variant, reference, metric)
            mine, theirs = (comparison.measurement(v, metric).per_seed for v in (variant, reference))
            assert contrast.per_seed == pytest.approx(np.subtract(mine, theirs), abs=1e-12)
            assert contrast.p <= contrast.p_holm <= 1.0
    grid = [c for c in comparison.contrasts if (c.against, c.metric) == (TEMPERED.label, "nll") and c.row.startswith("smoothed")]
    assert len(grid) == 6 and min(c.p_holm for c in grid) == pytest.approx(6 * min(c.p for c in grid))
    own = comparison.contrast(TEMPERED, BASE, "nll")
    assert own.p_holm == own.p and own.finding == "better"
    alone = compare([r for r in results if r.variant in (BASE, TEMPERED, variant)], repetitions=200).contrast(
        variant, TEMPERED, "nll"
    )
    assert alone.p == pytest.approx(comparison.contrast(variant, TEMPERED, "nll").p) and alone.p_holm == alone.p


def test_a_finding_follows_the_direction_of_the_metric_and_the_p_value(comparison):
    contrast = comparison.contrast(TEMPERED, BASE, "nll")
    assert contrast.finding == contrast.corrected() == "better"
    assert dataclasses.replace(contrast, metric="accuracy").finding == "worse"
    assert dataclasses.replace(contrast, metric="signed_gap").finding == "none"
    assert dataclasses.replace(contrast, p_holm=0.2).corrected() == "none"
    assert dataclasses.replace(contrast, p_holm=0.2).finding == "better"
    assert dataclasses.replace(contrast, p=None, p_holm=None, low=None, high=None).finding == "none"


def test_json_gives_the_same_comparison_back(comparison):
    assert Comparison.from_json(comparison.to_json()) == comparison
    with pytest.raises(ValueError, match="written by to_json"):
        Comparison.from_json("{}")
    with pytest.raises(ValueError, match="Expecting"):
        Comparison.from_json("no JSON")


def test_the_same_results_in_any_order_give_the_same_comparison(results, comparison):
    assert compare(results[::-1], repetitions=200) == comparison


def test_validation_picks_and_test_is_not_asked(results, comparison):
    means = {label: np.mean(values) for label, values in comparison.validation_nll.items() if label.startswith("smoothed")}
    assert comparison.picked.label == min(means, key=means.get)
    worst = Variant("smoothed", 0.05, False)
    rigged = [dataclasses.replace(r, validation_nll=0.01) if r.variant == worst else r for r in results]
    assert compare(rigged, repetitions=200).picked == worst


def test_smooth_names_epsilon_and_both_rivals(comparison):
    verdict = comparison.verdict
    assert (verdict.kind, verdict.variant, verdict.epsilon) == ("smooth", comparison.picked, comparison.picked.epsilon)
    assert verdict.sentence.startswith(f"Smooth with ε={verdict.epsilon:g}") and "baseline + temperature" in verdict.sentence
    contrast = comparison.contrast(comparison.picked, TEMPERED, "nll")
    numbers = [
        f"{contrast.value:+.4f}",
        f"{contrast.low:+.4f} to {contrast.high:+.4f}",
        *(f"{d:+.4f}" for d in contrast.per_seed),
    ]
    assert any(all(number in sentence for number in numbers) for sentence in verdict.evidence)
    assert verdict.caveats == []


def test_beating_only_the_plain_baseline_is_no_reason_to_smooth():
    results = results_of(Case("temperature", Model(2.5), softer(Model(), 1.6, 1.2, 0.9)), 0)
    comparison = compare(results, repetitions=200)
    assert comparison.contrast(comparison.picked, BASE, "nll").finding == "better"
    assert (comparison.verdict.kind, comparison.verdict.variant) == ("temperature", TEMPERED)
    without = compare([r for r in results if r.variant != TEMPERED], repetitions=200).verdict
    assert without.kind == "smooth" and "No baseline + temperature" in without.caveats[0]


def accurate(shift, smoothed_nll, seeds=3, n=2000):
    """A smoothed variant right on `shift` more of the wrong examples, or wrong on more of the right, with a NLL of its own."""
    results = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        confidence, nll, brier = rng.uniform(0.5, 0.9, n), rng.uniform(0.4, 0.6, n), np.full(n, 0.4)
        right = rng.random(n) < 0.7
        better = (right | (rng.random(n) < shift)) & (rng.random(n) >= -shift)
        for variant, correct, loss in ((BASE, right, nll), (Variant("smoothed", 0.1, False), better, nll + smoothed_nll)):
            stats = {"test": PredictionStatistics(confidence, correct, loss, brier)}
            results.append(Result(variant, seed, 1.0, float(loss.mean()), stats))
    return compare(results, repetitions=200).verdict


def test_the_verdict_says_how_both_moved_the_nll_and_the_quality():
    found = {(shift, nll): accurate(shift, nll) for shift in (-0.2, 0.0, 0.2) for nll in (-0.1, 0.0, 0.1)}
    assert {key: verdict.kind for key, verdict in found.items()} == {
        (-0.2, -0.1): "trade_off", (-0.2, 0.0): "no_difference", (-0.2, 0.1): "no_difference",
        (0.0, -0.1): "smooth", (0.0, 0.0): "no_difference", (0.0, 0.1): "no_difference",
        (0.2, -0.1): "smooth", (0.2, 0.0): "smooth", (0.2, 0.1): "trade_off",
    }  # fmt: skip
    said = {key: verdict.sentence for key, verdict in found.items()}
    assert "its accuracy is measurably better" in said[0.2, 0.0] and "its NLL shows no such difference." in said[0.2, 0.0]
    assert "its NLL is measurably better" in said[0.0, -0.1] and "its accuracy shows no such difference." in said[0.0, -0.1]
    assert "its NLL and accuracy are measurably better" in said[0.2, -0.1]
    assert said[0.2, 0.1].startswith("Smoothing trades NLL for accuracy: with smoothed ε=0.1 the accuracy is measurably better")
    assert said[-0.2, -0.1].startswith("Smoothing trades accuracy for NLL: ")
    assert said[-0.2, 0.1].endswith("keep the baseline; with smoothed ε=0.1 its NLL and accuracy are measurably worse.")
    assert found[0.2, 0.1].epsilon == 0.1 and found[0.0, 0.1].epsilon is None


def test_one_seed_is_judged_and_says_so(results):
    one = compare([r for r in results if r.seed == 1], repetitions=200)
    assert one.seeds == [1] and one.verdict.caveats[0].startswith("One seed: the intervals cover only which examples")
    measurement, contrast = one.measurement(BASE, "nll"), one.contrast(TEMPERED, BASE, "nll")
    assert (measurement.low, contrast.seed_low) == (None, None) and contrast.low < contrast.high
    assert one.contrast(TEMPERED, BASE, "f1").p is None
    assert Comparison.from_json(one.to_json()) == one
    two = compare([r for r in results if r.seed != 1], repetitions=200)
    assert two.verdict.caveats[0].startswith("Two seeds")


def test_a_baseline_alone_has_nothing_to_recommend(results):
    alone = compare([r for r in results if r.variant == BASE], repetitions=200)
    assert (alone.verdict.kind, alone.picked, alone.contrasts) == ("no_difference", None, [])
    assert "No smoothed variant" in alone.verdict.evidence[0]


def test_other_sets_are_columns_without_a_vote(results):
    worse = {r.seed: r.statistics["test"] for r in results if r.variant == BASE}
    both = [dataclasses.replace(r, statistics={**r.statistics, "ood": worse[r.seed]}) for r in results]
    comparison = compare(both, repetitions=200)
    assert list(comparison.sets) == ["test", "ood"] and comparison.verdict.kind == "smooth"
    assert comparison.contrast(comparison.picked, BASE, "nll", "ood").value == 0.0


def test_what_does_not_belong_together_is_refused(results):
    test, labels = results[3].statistics["test"], results[3].labels["test"]
    shorter = PredictionStatistics(*(column[:-1] for column in (test.confidence, test.correct, test.nll, test.brier)))
    infinite = dataclasses.replace(test, nll=np.where(np.arange(400) == 3, np.inf, test.nll))
    reversed_ = dataclasses.replace(test, correct=test.correct[::-1])
    for bad, message in [
        ([r for r in results if r.variant != BASE], r"expected Variant\('baseline', 0, False\)"),
        (results[:-1], r"every variant with every seed, got none of smoothed ε=0.2 \+ temperature with seed 2"),
        ([*results, results[0]], "each variant once per seed, got 1 repeated"),
        (changed(results, 3, statistics={"test": shorter}), "400 predictions, got 399 on 'test' of baseline with seed 1|got 399"),
        (changed(results, 3, statistics={"dev": test}), r"the sets \['test'\], got \['dev'\]"),
        (changed(results, 3, statistics={"test": infinite}), "finite nll on 'test'"),
        (changed(results, 3, statistics={"test": reversed_}), "with and without temperature"),
        (changed(results, 3, labels={"test": labels[::-1]}), "the same labels on 'test'"),
        (changed(results, 3, labels=None), "the same labels on 'test'"),
        (changed(results, 3, cluster={"test": np.arange(400)}), "the same cluster on 'test'"),
        ([dataclasses.replace(r, cluster={"test": np.arange(7)}) for r in results], r"cluster \[400\] on 'test'"),
        (changed(results, 0, temperature=1.2), "temperature 1.0 without tempering"),
        (changed(results, 1, temperature=0.0), "temperature above 0|temperature 1.0 without"),
        (changed(results, 3, validation_nll=float("nan")), "finite validation_nll"),
        (changed(results, 3, extra={}), "task metrics"),
        ([dataclasses.replace(r, statistics={"dev": r.statistics["test"]}, labels=None) for r in results], "a set named 'test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(bad)
    for empty in ([], ["baseline"]):
        with pytest.raises(TypeError, match="list of Result"):
            compare(empty)
    with pytest.raises(ValueError, match="level"):
        compare(results, level=95)


def test_asking_for_what_was_not_measured_is_refused(comparison):
    with pytest.raises(ValueError, match="'bleu' of 'baseline'"):
        comparison.measurement(BASE, "bleu")
    with pytest.raises(ValueError, match="the references are baseline"):
        comparison.contrast(BASE, Variant("smoothed", 0.1, True), "nll")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_stated_truth_of_a_case_is_that_of_its_process(name):
    assert truth_of(CASES[name]) == CASES[name].truth


@pytest.mark.slow
@pytest.mark.parametrize("draw", [0, 1, 2, 3, 4])
def test_the_verdict_is_right_in_18_of_20_constructed_cases(draw):
    assert len(CASES) == 20
    wrong = {}
    for name, case in CASES.items():
        found = compare(results_of(case, draw), repetitions=300).verdict.kind
        if found != case.truth:
            wrong[name] = (case.truth, found)
    print(f"\ndraw {draw}: {20 - len(wrong)} of 20 right; wrong (truth, verdict): {wrong}")
    assert len(wrong) <= 2


def test_models_which_have_not_learnt_get_no_advice():
    """Two sure models at chance: temperature scaling improves the NLL measurably, and would be advised."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 600), 4 * rng.normal(size=(600, 3))
    results = [
        Result(
            Variant(name, e, t != 1), 0, t, 1.1, {"test": PredictionStatistics.from_logits(s * logits / t, labels)}, labels=known
        )
        for known in ({"test": labels},)
        for name, e, s in (("baseline", 0.0, 1.0), ("smoothed", 0.1, 0.5))
        for t in (1.0, 40.0 * s)
    ]
    found = compare(results, repetitions=100)
    assert (found.verdict.kind, found.verdict.epsilon, found.class_counts) == ("not_learnt", None, np.bincount(labels).tolist())
    assert found.verdict.sentence.startswith("No verdict, the models have not learnt: no accuracy is measurably above 0.3")
    assert compare([dataclasses.replace(r, labels=None) for r in results], repetitions=100).verdict.kind == "temperature"
    assert Comparison.from_json(found.to_json()) == found
    one_learnt = PredictionStatistics.from_logits(9 * np.eye(3)[labels] + logits, labels)
    better = [dataclasses.replace(r, statistics={"test": one_learnt}) if r.variant.epsilon else r for r in results]
    assert compare(better, repetitions=100).verdict.kind == "smooth"
