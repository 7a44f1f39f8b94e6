"""Scores by class against scikit-learn and seqeval, their intervals, and the calibration of each class."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

from hf_ls.metrics.classes import CLASS_SCORES, ClassCounts, class_scores, class_table, soft_scores
from hf_ls.metrics.core import ece_classwise
from hf_ls.metrics.entities import EntityCounts, words_of
from hf_ls.metrics.paired import differences
from hf_ls.metrics.tokens import TokenCalibration


def drawn(seed, n=300, k=6, classes=None):
    """Skewed labels, of which some classes may have none."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes or k, size=n, p=random.dirichlet(np.full(classes or k, 0.4)))
    logits = random.normal(size=(n, k)) + 1.2 * np.eye(k)[labels]
    return logits, labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "classes"), [(2, None), (6, None), (6, 4), (40, 30)])
def test_scores_are_those_of_scikit_learn(seed, k, classes):
    logits, y = drawn(seed, k=k, classes=classes)
    best = logits.argmax(1)
    found, draws = class_scores(logits, y, repetitions=200)
    theirs = {
        "f1_macro": f1_score(y, best, average="macro", zero_division=0),
        "f1_weighted": f1_score(y, best, average="weighted", zero_division=0),
        "balanced_accuracy": balanced_accuracy_score(y, best),
    }
    for name, value in theirs.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["low"] <= np.median(draws.draws[name]) <= found[name]["high"]
    halves = ClassCounts.of(best[:100], y[:100], k).plus(ClassCounts.of(best[100:], y[100:], k))
    assert {name: float(score(halves)) for name, score in CLASS_SCORES.items()} == {n: found[n]["value"] for n in CLASS_SCORES}


def test_a_replicate_is_the_score_of_the_drawn_rows():
    logits, y = drawn(3, n=5000)
    _, draws = class_scores(logits, y, repetitions=3, seed=7)
    weights = np.concatenate([np.random.default_rng((7, b)).poisson(1.0, (3, w)) for b, w in ((0, 4096), (1, 904))], axis=1)
    for r in range(3):
        rows = np.repeat(np.arange(5000), weights[r])
        assert draws.draws["f1_macro"][r] == pytest.approx(f1_score(y[rows], logits.argmax(1)[rows], average="macro"), abs=1e-12)


def test_many_classes_need_no_matrix_of_examples_and_classes():
    """50,000 classes, of which few occur: dense, the one-hot rows alone would be 360 MB and the draws 1.2 GB."""
    n, k = 300, 50_000
    labels = np.random.default_rng(0).integers(0, k, n)
    logits = np.zeros((n, k), dtype=np.float32)
    logits[np.arange(n), np.where(np.arange(n) % 3, labels, 7)] = 1
    check = logits.argmax(1)
    tracemalloc.start()
    found, draws = class_scores(logits, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert found["f1_macro"]["value"] == pytest.approx(f1_score(labels, check, average="macro", zero_division=0))
    assert all(len(drawn) == 1000 for drawn in draws.draws.values())


def test_draws_come_in_parts_which_are_those_of_one(monkeypatch):
    logits, y = drawn(3, n=5000)
    q = np.random.default_rng(0).dirichlet(np.ones(6), size=5000)
    whole, _ = class_scores(logits, y, q, repetitions=50)
    monkeypatch.setattr("hf_ls.metrics.paired._CELLS", 20 * 7)
    assert class_scores(logits, y, q, repetitions=50)[0] == whole


def test_an_interval_without_width_is_none():
    """All right in two classes, all wrong in the third: no draw shows anything else."""
    logits, y = np.eye(3)[[0] * 50 + [1] * 20 + [1] * 5], np.array([0] * 50 + [1] * 20 + [2] * 5)
    found, _ = class_scores(logits, y)
    assert found["balanced_accuracy"] == {"value": pytest.approx(2 / 3)} and found["f1_macro"]["low"] < found["f1_macro"]["high"]


def test_two_models_on_the_same_examples_are_paired():
    logits, y = drawn(0)
    better = logits + np.eye(6)[y]
    rows = {"first": [class_scores(logits, y)[1]], "second": [class_scores(better, y)[1]]}
    found = {d.metric: d for d in differences(rows)}
    assert set(found) == set(CLASS_SCORES) and found["f1_macro"].finding == "better"
    assert not differences(rows | {"second": [class_scores(better, (y + 1) % 6)[1]]})


@pytest.mark.parametrize("seed", range(3))
def test_scores_against_distributions(seed):
    logits, y = drawn(seed, k=4)
    q = np.random.default_rng(seed).dirichlet(np.ones(4), size=len(y))
    q[0] = [1, 0, 0, 0]
    nll, brier = soft_scores(logits, q)
    np.testing.assert_allclose(nll, -(q * log_softmax(logits, axis=1)).sum(1), atol=1e-12)
    np.testing.assert_allclose(brier, ((softmax(logits, axis=1) - q) ** 2).sum(1), atol=1e-12)
    found, _ = class_scores(logits, y, q, repetitions=100)
    assert found["soft_nll"]["value"] == pytest.approx(nll.mean()) and found["soft_brier"]["low"] < found["soft_brier"]["high"]
    with pytest.raises(ValueError, match="one distribution per row"):
        soft_scores(logits, q[:, :2] / q[:, :2].sum(1, keepdims=True))


def test_the_table_of_classes():
    logits, y = drawn(1, k=5, classes=4)
    table = class_table(logits, y)
    precision, recall, f1, n = precision_recall_fscore_support(y, logits.argmax(1), labels=range(5), zero_division=np.nan)
    p = softmax(logits, axis=1)
    for k, row in enumerate(table):
        for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert row[name] is None if np.isnan(values[k]) else row[name] == pytest.approx(values[k])
        assert row["n"] == n[k] and row["probability"] == pytest.approx(p[:, k].mean())
        assert row["signed_gap"] == pytest.approx(p[:, k].mean() - np.mean(y == k), abs=1e-12)
    assert np.mean([row["ece"] for row in table]) == pytest.approx(ece_classwise(p, y), abs=1e-12)
    assert table[4]["recall"] is None and table[4]["n"] == 0


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def sentences(seed, count=40):
    random = np.random.default_rng(seed)
    labels = [random.choice(5, size=random.integers(1, 12), p=[0.6, 0.1, 0.1, 0.1, 0.1]) for _ in range(count)]
    return labels, [np.where(random.random(len(row)) < 0.8, row, random.integers(0, 5, len(row))) for row in labels]


def test_entities_are_those_of_seqeval_and_do_not_depend_on_batches():
    labels, predicted = sentences(0)
    named = [[[TAGS[i] for i in row] for row in rows] for rows in (labels, predicted)]
    results = []
    for size in (40, 7):
        tokens = TokenCalibration(repetitions=300, **words_of(TAGS))
        for start in range(0, 40, size):
            part, guess = labels[start : start + size], predicted[start : start + size]
            shape = (len(part), 12)
            items, y, best = np.full((*shape, 4), np.nan), np.full(shape, -100), np.full(shape, -100)
            for i, (row, other) in enumerate(zip(part, guess, strict=True)):
                y[i, : len(row)], best[i, : len(row)] = row, other
                items[i, : len(row)] = np.column_stack(
                    [np.full(len(row), 0.8), row == other, np.full(len(row), 0.3), np.full(len(row), 0.2)]
                )
            tokens.update(items, y, best)
        results.append((tokens.entity_f1(), tokens.groups()))
        assert tokens.draws()[1]["entity_f1"] == tokens.entity_f1()["value"]
    assert results[0][0] == results[1][0]
    assert results[0][0]["value"] == pytest.approx(seqeval_f1(*named), abs=1e-12)
    assert results[0][0]["low"] < results[0][0]["value"] < results[0][0]["high"]
    flat, best = np.concatenate(labels), np.concatenate(predicted)
    groups = {group["name"]: group for group in results[0][1] if group["kind"] == "word"}
    sizes = {"labelled O": flat == 0, "labelled otherwise": flat != 0, "predicted other than O": best != 0}
    assert {name: groups[name]["n"] for name in sizes} == {name: rows.sum() for name, rows in sizes.items()}
    for name, rows in sizes.items():
        assert groups[name]["accuracy"] == pytest.approx((flat == best)[rows].mean())
        assert groups[name]["signed_gap"] == pytest.approx(0.8 - (flat == best)[rows].mean())


def test_classes_which_are_no_tags_have_no_entities():
    assert words_of(["bad", "good"]) == {} and "entities" not in words_of(["O", "NOUN"])
    assert words_of(["B-X", "O"])["outside_id"] == 1 and EntityCounts(TAGS)(np.array([0, 0]), np.array([0, 0])) == (0, 0, 0)


def test_balanced_weights_are_those_of_scikit_learn():
    from datasets import Dataset

    from hf_ls.run.training import balanced_weights

    y = drawn(5, k=4)[1]
    present = np.unique(y)
    ours = balanced_weights(Dataset.from_dict({"labels": y.tolist()}), 5).numpy()
    np.testing.assert_allclose(ours[present], compute_class_weight("balanced", classes=present, y=y), rtol=1e-6)
    assert set(ours[np.setdiff1d(np.arange(5), present)]) <= {1.0}
    tagged = Dataset.from_dict({"labels": [[-100, int(k), -100] for k in y]})
    np.testing.assert_array_equal(balanced_weights(tagged, 5).numpy(), ours)
