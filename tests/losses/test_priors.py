"""Priors and soft targets against independent computations, and exactly no mass where none may be."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import confusion_matrix

from hf_ls.losses.cross_entropy import smoothed_cross_entropy
from hf_ls.losses.priors import (
    confusion_prior,
    count_labels,
    restrict_prior,
    similarity_prior,
    soft_targets,
    support_prior,
    unigram_prior,
)
from hf_ls.losses.smoothing import Smoothing

K = 6
ALLOWED = torch.tensor([True, True, False, True, False, True])


@pytest.mark.parametrize(
    "support",
    [[0, 3, 5], [5, 3, 0, 3], torch.tensor([0, 3, 5]), [i in (0, 3, 5) for i in range(K)], (0, 3, 5)],
)
def test_support_prior_takes_ids_and_masks(support):
    prior = support_prior(support, K)
    assert prior.dtype == torch.float32
    assert torch.equal(prior > 0, torch.tensor([True, False, False, True, False, True]))
    assert torch.equal(prior[prior > 0], torch.full((3,), 1 / 3))


def test_support_prior_of_a_range_leaves_padding_rows_out():
    prior = support_prior(range(32_000), 32_128)
    assert torch.equal(prior[:32_000], torch.full((32_000,), 1 / 32_000))
    assert not prior[32_000:].any()


@pytest.mark.parametrize(
    ("support", "error", "text"),
    [
        ([], ValueError, "got none"),
        ([False] * K, ValueError, "got none"),
        ([True] * (K - 1), ValueError, "mask of shape"),
        ([0, K], ValueError, r"0\.\.6"),
        ([-1, 2], ValueError, r"-1\.\.2"),
        ([0.5], TypeError, "class ids"),
    ],
)
def test_support_prior_refuses(support, error, text):
    with pytest.raises(error, match=text):
        support_prior(support, K)


@pytest.mark.parametrize("power", [1.0, 0.75, 0.0, 3.0])
@pytest.mark.parametrize("additive", [0.0, 0.5])
def test_unigram_prior_against_numpy(power, additive):
    counts = np.array([7, 0, 2, 10**12, 1, 0])
    prior = unigram_prior(torch.from_numpy(counts), power=power, additive=additive)
    weight = np.where(counts + additive > 0, (counts + additive) ** power, 0.0)
    np.testing.assert_allclose(prior.numpy(), weight / weight.sum(), rtol=1e-6)
    if not additive:
        assert prior[1] == 0 and prior[5] == 0
    Smoothing(prior=prior)


def test_unigram_prior_does_not_overflow_with_a_large_power():
    assert unigram_prior([10**12, 10**12, 1], power=100.0).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("counts", "options", "text"),
    [
        ([0, 0], {}, "all zeros"),
        ([1, -1], {}, "finite counts >= 0"),
        ([1.0, float("nan")], {}, "finite counts"),
        ([[1, 2]], {}, "dimension"),
        ([1, 2], {"additive": -1.0}, "additive"),
        ([1, 2], {"power": float("nan")}, "power"),
    ],
)
def test_unigram_prior_refuses(counts, options, text):
    with pytest.raises(ValueError, match=text):
        unigram_prior(counts, **options)


def _ragged_labels(rows=50):
    generator = np.random.default_rng(0)
    return [[int(i) if i < K else -100 for i in generator.integers(0, K + 2, size=generator.integers(0, 9))] for _ in range(rows)]


def _counted(rows):
    counter = Counter(i for row in rows for i in row if i != -100)
    return torch.tensor([counter[k] for k in range(K)])


def test_count_labels_of_every_kind_of_dataset():
    rows = _ragged_labels()
    expected = _counted(rows)
    dataset = Dataset.from_dict({"labels": rows, "text": ["x"] * len(rows)})
    kinds = {
        "dicts": [{"labels": row} for row in rows],
        "lists": rows,
        "tensors": [torch.tensor(row, dtype=torch.int32) for row in rows],
        "arrays": [{"labels": np.array(row, dtype=np.int16)} for row in rows],
        "generator": (row for row in rows),
        "batches": [{"labels": rows[:20]}, {"labels": rows[20:]}],
        "dataset": dataset,
        "shuffled": dataset.shuffle(seed=1),
        "torch": dataset.with_format("torch"),
        "numpy": dataset.with_format("numpy"),
        "streaming": dataset.to_iterable_dataset(),
    }
    for name, kind in kinds.items():
        counts = count_labels(kind, K)
        assert counts.dtype == torch.int64, name
        assert torch.equal(counts, expected), name


def test_count_labels_respects_selection_transforms_columns_and_the_ignored_id():
    rows = _ragged_labels()
    dataset = Dataset.from_dict({"labels": rows, "tags": [[0, 1, 7]] * len(rows)})
    assert torch.equal(count_labels(dataset.select(range(5)), K), _counted(rows[:5]))
    assert count_labels(dataset, K, column="tags", ignore_index=7).tolist() == [50, 50, 0, 0, 0, 0]
    dataset.set_transform(lambda batch: {"labels": [[2]] * len(batch["labels"])})
    assert count_labels(dataset, K).tolist() == [0, 0, 50, 0, 0, 0]


def test_count_labels_of_one_id_per_row():
    assert count_labels(Dataset.from_dict({"label": [0, 2, 2, 5]}), K, column="label").tolist() == [
        1,
        0,
        2,
        0,
        0,
        1,
    ]
    assert count_labels([], K).tolist() == [0] * K


def test_count_labels_is_exact_beyond_float32():
    ones = torch.ones(1 << 20, dtype=torch.int64)
    counts = count_labels([*[ones] * 17, [1]], 3)
    assert counts.tolist() == [0, 17 * (1 << 20) + 1, 0]
    assert int(counts[1].float()) != int(counts[1]), "the case must be one which float32 gets wrong"


@pytest.mark.parametrize(
    ("dataset", "error", "text"),
    [
        ([{"label": [1]}], ValueError, "column 'labels'"),
        ([[K]], ValueError, r"6\.\.6"),
        ([[-1]], ValueError, r"-1\.\.-1"),
        ([[0.5]], TypeError, "torch.float32"),
        ([[True]], TypeError, "torch.bool"),
        ([{"labels": None}], TypeError, "NoneType"),
        ({"train": []}, TypeError, "one split"),
    ],
)
def test_count_labels_refuses(dataset, error, text):
    with pytest.raises(error, match=text):
        count_labels(dataset, K)


def test_confusion_prior_against_sklearn_and_its_fallback():
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, K, 300), generator.integers(0, K, 300)
    predicted[true == 2] = 2
    matrix = confusion_matrix(true, predicted, labels=range(K))
    prior = confusion_prior(torch.from_numpy(matrix))
    for y in range(K):
        errors = Counter(predicted[(true == y) & (predicted != y)].tolist())
        expected = [errors[k] / errors.total() if errors else float(k != y) / (K - 1) for k in range(K)]
        np.testing.assert_allclose(prior[y].numpy(), expected, rtol=1e-6)
    assert prior[2].tolist() == pytest.approx([0.2, 0.2, 0.0, 0.2, 0.2, 0.2])
    assert matrix[2, 2] > 0, "the input is left alone"


def test_class_dependent_priors_mean_the_same_in_both_conventions():
    labels = torch.arange(K)
    for prior in (
        confusion_prior(torch.arange(K * K).view(K, K)),
        similarity_prior(torch.randn(K, 3), temperature=0.1),
    ):
        target = Smoothing(0.1, "all", prior=prior).target(labels, K)
        assert torch.equal(target, Smoothing(0.1, "wrong", prior=prior).target(labels, K))
        assert target.diagonal().tolist() == pytest.approx([0.9] * K)


@pytest.mark.parametrize("confusion", [[[1, 2]], [[1]], [[1, -1], [0, 1]], [1, 2]])
def test_confusion_prior_refuses(confusion):
    with pytest.raises(ValueError, match="confusion"):
        confusion_prior(confusion)


@pytest.mark.parametrize("top_k", [None, 2, K - 1])
def test_similarity_prior_against_a_loop(top_k):
    embedding = torch.randn(K, 4, generator=torch.Generator().manual_seed(0))
    prior = similarity_prior(embedding, temperature=0.3, top_k=top_k)
    vectors = embedding.double().numpy()
    for y in range(K):
        cosine = {
            k: float(vectors[y] @ vectors[k] / np.linalg.norm(vectors[y]) / np.linalg.norm(vectors[k]))
            for k in range(K)
            if k != y
        }
        best = sorted(cosine, key=cosine.__getitem__, reverse=True)[:top_k]
        total = sum(np.exp(cosine[k] / 0.3) for k in best)
        expected = [np.exp(cosine[k] / 0.3) / total if k in best else 0.0 for k in range(K)]
        np.testing.assert_allclose(prior[y].numpy(), expected, rtol=1e-6)
        assert int((prior[y] > 0).sum()) == len(best)
    Smoothing(prior=prior)


def test_similarity_prior_limits_of_the_temperature():
    embedding = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 0.0]])
    flat = similarity_prior(embedding, temperature=1e9)
    assert torch.allclose(flat, (1 - torch.eye(4)) / 3, atol=1e-6)
    peaked = similarity_prior(embedding, temperature=1e-4)
    assert peaked[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert peaked[3].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0]), "a zero vector is similar to none"


@pytest.mark.parametrize(
    ("embedding", "options", "text"),
    [
        (torch.ones(K), {"temperature": 1.0}, "embedding"),
        (torch.ones(1, 3), {"temperature": 1.0}, "embedding"),
        (torch.full((3, 2), torch.nan), {"temperature": 1.0}, "finite"),
        (torch.ones(3, 2), {"temperature": 0.0}, "temperature"),
        (torch.ones(3, 2), {"temperature": 1.0, "top_k": 3}, "top_k"),
        (torch.ones(3, 2), {"temperature": 1.0, "top_k": 0}, "top_k"),
    ],
)
def test_similarity_prior_refuses(embedding, options, text):
    with pytest.raises(ValueError, match=text):
        similarity_prior(embedding, **options)


def test_restrict_prior_renormalises_and_falls_back_to_the_support():
    prior = confusion_prior([[0, 1, 3], [1, 0, 0], [1, 1, 0]])
    restricted = restrict_prior(prior, [1, 2])
    assert restricted.tolist() == [[0.0, 0.25, 0.75], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("additive", [0.0, 0.5])
def test_soft_targets_are_the_loss_of_the_annotators(additive):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (2, 7, K), generator=generator)
    counts[..., 0] += 1
    logits = torch.randn(2, 7, K, generator=generator)
    targets = soft_targets(counts, additive=additive)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(-1), torch.ones(2, 7))
    weights = counts.double() + additive
    expected = -(weights * logits.double().log_softmax(-1)).sum(-1) / weights.sum(-1)
    loss = smoothed_cross_entropy(logits, targets, 0.0, reduction="none")
    torch.testing.assert_close(loss, expected.float())


def test_soft_targets_refuse_rows_without_annotation():
    with pytest.raises(ValueError, match="row of zeros"):
        soft_targets([[1, 2], [0, 0]])
    assert soft_targets([[1, 2], [0, 0]], additive=1.0)[1].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="counts"):
        soft_targets([[1, -2]])


def _masked_priors():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (K, K), generator=generator)
    embedding = torch.randn(K, 3, generator=generator)
    return {
        "support": support_prior(ALLOWED, K),
        "unigram": unigram_prior(torch.arange(1, K + 1) * ALLOWED, power=0.5),
        "confusion": restrict_prior(confusion_prior(counts), ALLOWED),
        "similarity": restrict_prior(similarity_prior(embedding, temperature=0.2, top_k=3), ALLOWED),
    }


@pytest.mark.parametrize("name", list(_masked_priors()))
@pytest.mark.parametrize("convention", ["all", "wrong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_mass_on_minus_inf_classes_is_the_sliced_problem(name, convention, dtype):
    prior = _masked_priors()[name]
    sliced_prior = prior[..., ALLOWED] if prior.dim() == 1 else prior[ALLOWED][:, ALLOWED]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, K, generator=generator, dtype=dtype).masked_fill(~ALLOWED, -torch.inf)
    sliced = logits[:, ALLOWED].clone().requires_grad_()
    logits.requires_grad_()
    sliced_labels = torch.randint(0, int(ALLOWED.sum()), (20,), generator=generator)
    labels = ALLOWED.nonzero().squeeze(1)[sliced_labels]

    loss = smoothed_cross_entropy(logits, labels, Smoothing(0.2, convention, prior=prior))
    expected = smoothed_cross_entropy(sliced, sliced_labels, Smoothing(0.2, convention, prior=sliced_prior))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[:, ALLOWED], torch.autograd.grad(expected, sliced)[0])
    assert torch.equal(gradient[:, ~ALLOWED], torch.zeros_like(gradient[:, ~ALLOWED]))


def test_soft_targets_with_no_mass_on_minus_inf_classes_are_the_sliced_problem():
    counts = torch.randint(1, 9, (20, K), generator=torch.Generator().manual_seed(0)) * ALLOWED
    logits = torch.randn(20, K, dtype=torch.float64).masked_fill(~ALLOWED, -torch.inf).requires_grad_()
    loss = smoothed_cross_entropy(logits, soft_targets(counts), 0.0)
    expected = smoothed_cross_entropy(logits[:, ALLOWED], soft_targets(counts[:, ALLOWED]), 0.0)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, ~ALLOWED].any()


def test_mass_on_a_minus_inf_class_is_refused_with_the_remedy():
    logits = torch.zeros(2, K).masked_fill(~ALLOWED, -torch.inf)
    with pytest.raises(ValueError, match=r"Smoothing\(prior="):
        smoothed_cross_entropy(logits, torch.tensor([0, 1]), Smoothing(0.1, prior=unigram_prior([1] * K)))
