"""Comparisons of sequences: intervals against plain resampling of whole sequences, and verdicts on cases whose truth is known."""

import dataclasses

import numpy as np
import pytest
from constructed import truth_of
from constructed_sequences import CASES, at_chance, sequence_results
from token_streams import simulated

from hf_ls.compare.cells import Cell
from hf_ls.compare.comparison import Comparison, Result, TokenStatistics, Variant
from hf_ls.compare.results import Sequences, clearly_worse
from hf_ls.compare.statistics import compare
from hf_ls.metrics import TokenCalibration, ece
from hf_ls.metrics.paired import draws_of_tokens
from hf_ls.metrics.text import draws_of_texts
from hf_ls.report.calibration_report import CalibrationRow

BASE, SMOOTHED = Variant("baseline", 0, False), Variant("smoothed", 0.1, False)


def results_of(items, labels, variant, texts=None, seed=0):
    """The result of one run with these items [n, T, 4], and texts of which "right" is the reference."""
    tokens = TokenCalibration()
    tokens.update(items, labels)
    draws, quality = [draws_of_tokens(tokens)], {}
    if texts is not None:
        draws.append(draws_of_texts(texts, ["right"] * len(texts), ["exact_match"]))
        quality = {"exact_match": {"value": draws[1].values["exact_match"]}}
    row = CalibrationRow.from_tokens(variant.name, variant.epsilon, None, tokens, quality)
    stats = {"test": TokenStatistics(row, draws, tokens.sequences, tokens.label_counts.tolist())}
    return Result(variant, seed, 1.0, row.value("nll"), stats)


def pair(n=150, cluster=0.15, seed=0):
    """Two models on the same sequences of up to 15 tokens: the second better where the sequence is easy."""
    items, labels = simulated(n, 0.05, cluster, seed)
    rng = np.random.default_rng((seed, 1))
    better = items.copy()
    better[..., 2] -= 0.02 + 0.3 * rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=items.shape[:2])
    better[..., 0] = np.clip(items[..., 0] - 0.06, 0, 1)
    return items, better, labels


def test_differences_spread_as_whole_sequences_drawn_by_numpy():
    """NLL, accuracy and ECE of tokens and the exact match of texts, against resampling of rows and the closed form."""
    one, two, labels = pair()
    rng = np.random.default_rng(3)
    texts = [["right" if hit else "wrong" for hit in rng.random(len(one)) < share] for share in (0.5, 0.65)]
    results = [results_of(items, labels, v, t) for items, v, t in zip((one, two), (BASE, SMOOTHED), texts, strict=True)]
    found = compare(results, quality="exact_match")
    assert found.clusters == {"test": 150} and found.quality == "exact_match" and found.repetitions == 1000
    kept, hits = ~np.isnan(one[..., 0]), np.array(texts) == "right"

    def difference(rows):
        flat = [items[rows][kept[rows]] for items in (one, two)]
        nll = flat[1][:, 2].mean() - flat[0][:, 2].mean()
        error = ece(flat[1][:, 0], flat[1][:, 1].astype(bool)) - ece(flat[0][:, 0], flat[0][:, 1].astype(bool))
        return nll, error, hits[1, rows].mean() - hits[0, rows].mean()

    plain = np.array([difference(rng.integers(0, 150, 150)) for _ in range(1500)])
    for metric, drawn, value in zip(("nll", "ece", "exact_match"), plain.T, difference(np.arange(150)), strict=True):
        contrast = found.contrast(SMOOTHED, BASE, metric)
        assert contrast.value == pytest.approx(value, abs=1e-12), metric
        half = (contrast.high - contrast.low) / 2
        assert half == pytest.approx(1.96 * drawn.std(), rel=0.12), metric
    sums, counts = np.nansum(two[..., 2] - one[..., 2], axis=1), kept.sum(1)
    residual = sums - sums.sum() / counts.sum() * counts
    closed = 1.976 * np.sqrt(150 / 149 * (residual**2).sum()) / counts.sum()  # t with 149 degrees of freedom
    contrast = found.contrast(SMOOTHED, BASE, "nll")
    assert (contrast.high - contrast.low) / 2 == pytest.approx(closed, rel=0.08)
    apart = 1.96 * (two[kept] - one[kept])[:, 2].std() / np.sqrt(kept.sum())
    assert closed > 2 * apart  # tokens taken as independent would say far too much
    assert Comparison.from_json(found.to_json()) == found


def test_runs_on_other_sequences_or_in_another_order_are_refused():
    one, two, labels = pair(40)
    first = results_of(one, labels, BASE)
    for items, message in ((two[::-1], "the same sequences on 'test' of smoothed"), (two[:-1], "predictions, got")):
        with pytest.raises(ValueError, match=message):
            compare([first, results_of(items, labels[: len(items)], SMOOTHED)])
    with pytest.raises(ValueError, match="a quality which every run measured, got 'bleu'"):
        compare([first, results_of(two, labels, SMOOTHED)], quality="bleu")
    with pytest.raises(ValueError, match=r"level 0\.95 with sums over tokens"):
        compare([first, results_of(two, labels, SMOOTHED)], level=0.9)


def with_f1(result, value):
    stats = result.statistics["test"]
    row = dataclasses.replace(stats.row, metrics={**stats.row.metrics, "entity_f1": {"value": value}})
    return dataclasses.replace(result, statistics={"test": dataclasses.replace(stats, row=row)})


def test_a_quality_without_draws_is_compared_over_seeds_alone():
    """As the F1 of entities where some draw of sequences has none."""
    one, two, labels = pair(40)
    results = [
        with_f1(results_of(items, labels, variant, seed=seed), f1 + by_seed * seed)
        for seed in range(3)
        for items, variant, f1, by_seed in ((one, BASE, 0.5, 0.0), (two, SMOOTHED, 0.6, 0.01))
    ]
    contrast = compare(results, quality="entity_f1").contrast(SMOOTHED, BASE, "entity_f1")
    assert (
        contrast.per_seed == pytest.approx([0.1, 0.11, 0.12]) and contrast.per_seed_low is None and contrast.finding == "better"
    )


def cell_of(epsilon, sums, count, outcomes=None):
    return Sequences(Cell("smoothed", "smoothed_ce", None, epsilon, 0), outcomes or {}, count, sums, sums + 0.1, 0.3)


def test_what_is_dropped_early_is_told_by_whole_sequences():
    rng = np.random.default_rng(0)
    count = rng.integers(1, 30, 80).astype(float)
    base = count * rng.normal(1.0, 0.3, 80)
    noise = count * rng.normal(0.0, 0.5, 80)  # of a whole sequence
    found = {0.0: [cell_of(0.0, base, count)], 0.1: [cell_of(0.1, base + 0.01 * count, count)],
             0.2: [cell_of(0.2, base + 0.02 * count + noise - noise.sum() / count.sum() * count, count)],
             0.3: [cell_of(0.3, base + 0.4 * count + noise, count)]}  # fmt: skip
    dropped = clearly_worse(found)
    assert list(dropped) == [0.3]
    difference = 0.4 * count + noise
    mean = difference.sum() / count.sum()
    spread = np.sqrt(80 / 79 * ((difference - mean * count) ** 2).sum()) / count.sum()
    assert dropped[0.3] == pytest.approx((mean, mean - 2.374 * spread), rel=1e-3)  # t of 79 degrees at 99 %


def test_sequences_of_models_which_have_not_learnt_get_no_advice():
    found = compare(at_chance(0), quality="exact_match")
    assert found.verdict.kind == "not_learnt" and "the most frequent token of test" in found.verdict.sentence
    assert sum(found.class_counts) == found.sets["test"]


@pytest.mark.parametrize(
    "name",
    ["few long sequences, which err together", "quality rises, and the NLL is worse", "one seed, smoothing takes noise away"],
)
def test_the_verdict_of_some_constructed_cases(name):
    found = compare(sequence_results(CASES[name], 0), quality="exact_match").verdict
    assert found.kind == CASES[name].kind
    if found.kind == "trade_off":
        assert found.sentence.startswith("Smoothing trades NLL for exact_match: with smoothed ε=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_the_verdict_is_right_in_18_of_20_constructed_cases_of_sequences(draw):
    assert len(CASES) == 20
    wrong = {}
    for name, case in CASES.items():
        found = compare(sequence_results(case, draw), quality="exact_match").verdict.kind
        if found != case.kind:
            wrong[name] = (case.kind, found)
    print(f"\ndraw {draw}: {20 - len(wrong)} of 20 right; wrong (truth, verdict): {wrong}")
    assert len(wrong) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_stated_truth_of_the_tokens_is_that_of_their_process(name):
    assert truth_of(CASES[name].tokens) == CASES[name].tokens.truth
