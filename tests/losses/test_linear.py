"""The logits-free loss against the target distribution over dense logits; its properties and its errors."""

from __future__ import annotations

import pytest
import torch
from linear_reference import (
    D,
    K,
    N,
    assert_same,
    dense_losses,
    doubled,
    gradients,
    head_logits,
    prior_of,
    problem,
    terms_of,
)

from hf_ls.losses.cross_entropy import smoothed_cross_entropy, smoothed_terms
from hf_ls.losses.linear import linear_smoothed_cross_entropy
from hf_ls.losses.smoothing import Smoothing


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("convention", ["all", "wrong"])
@pytest.mark.parametrize("prior", ["uniform", "vector", "support", "rows"])
@pytest.mark.parametrize(
    "head", [{}, {"logit_scale": 0.3}, {"softcap": 2.5}, {"softcap": 4.0, "logit_scale": 1.7, "z_loss": 0.01}]
)
def test_equals_dense_float64(
    dtype: torch.dtype, tolerance: float, reduction: str, convention: str, prior: str, head: dict
) -> None:
    smoothing = Smoothing(0.2, convention, prior_of(prior))  # type: ignore[arg-type]
    assert_same(problem(dtype), smoothing, tolerance, reduction=reduction, chunk_rows=5, **head)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, -0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"z_loss": 0.02}, {"token_weight": torch.rand(N, dtype=torch.float64)}, {"num_items_in_batch": 41}],
)
def test_equals_dense_without_bias(epsilon: float, options: dict) -> None:
    smoothing = Smoothing(epsilon, allow_negative=True)
    assert_same(problem(bias=False), smoothing, 1e-12, **options)
    assert_same(problem(bias=False), smoothing, 1e-12, **options, softcap=3.0, chunk_rows=7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight_with_z_loss_and_prior(reduction: str) -> None:
    token_weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    options = {"token_weight": token_weight, "z_loss": 0.03, "reduction": reduction, "chunk_rows": 4}
    for prior in ("vector", "rows"):
        assert_same(problem(), Smoothing(0.3, "wrong", prior_of(prior)), 1e-12, **options)


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 17, 18, 1000, None])
def test_chunk_size_changes_nothing(chunk_rows: int | None) -> None:
    assert_same(problem(), Smoothing(0.1), 1e-12, chunk_rows=chunk_rows)


def test_default_chunks_and_tiles_of_a_long_batch() -> None:
    # More rows than a chunk, more classes than a tile holds rows of: both loops take several turns.
    assert_same(problem(n=700, k=2100), Smoothing(0.1), 1e-11)
    assert_same(problem(torch.float32, n=700, k=2100), Smoothing(0.1), 1e-5)


def test_same_value_as_the_dense_function_of_this_package() -> None:
    inputs = problem()
    logits = head_logits(inputs["hidden"], inputs["weight"], inputs["bias"])
    terms = terms_of(**inputs, smoothing=0.1, reduction="sum")
    wanted = smoothed_terms(logits, inputs["labels"], Smoothing(0.1))
    torch.testing.assert_close(terms.loss, smoothed_cross_entropy(logits, inputs["labels"], 0.1, reduction="sum"))
    torch.testing.assert_close(terms.nll, wanted.nll.detach())
    torch.testing.assert_close(terms.smoothing_term, wanted.smoothing_term.detach())
    assert terms.loss.requires_grad and not terms.nll.requires_grad and not terms.smoothing_term.requires_grad


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"prior": "rows"}, {"token_weight": torch.full((N,), 3.0), "z_loss": 0.1}],
)
def test_terms_are_unweighted_and_sum_to_the_loss(options: dict) -> None:
    inputs, options = problem(), dict(options)
    smoothing = Smoothing(0.2, prior=prior_of(options.pop("prior", "uniform")))
    _, nll, term, _ = terms_of(**inputs, smoothing=smoothing, **options)
    plain = {"softcap": options.get("softcap"), "prior": smoothing.prior, "epsilon": 0.2}
    torch.testing.assert_close(nll + term, dense_losses(**inputs, **plain).detach())
    torch.testing.assert_close(nll, dense_losses(**inputs, **(plain | {"epsilon": 0.0})).detach())


def test_extra_dimensions_and_non_contiguous_hidden() -> None:
    inputs = problem(n=24)
    hidden = inputs["hidden"].detach().reshape(4, D, 6).transpose(1, 2).requires_grad_()
    shaped = inputs | {"hidden": hidden, "labels": inputs["labels"].reshape(4, 6)}
    assert not hidden.is_contiguous()
    for reduction in ("mean", "none"):
        assert_same(shaped, Smoothing(0.1), 1e-12, reduction=reduction)
    row = linear_smoothed_cross_entropy(hidden[0, 0], inputs["weight"], torch.tensor(3), 0.1, reduction="none")
    assert row.shape == ()


def test_four_by_three_example_of_the_seed() -> None:
    logits = torch.tensor([[2, 0.5, -1], [0.1, 1.8, 0.2], [1.2, 0.7, 0.3], [0, -0.2, 2.4]], dtype=torch.float64)
    loss = linear_smoothed_cross_entropy(logits, torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 0, 2]), 0.1)
    assert loss.item() == pytest.approx(0.473107826, abs=1e-9)


def test_masking_equals_slicing() -> None:
    inputs = problem()
    kept = inputs["labels"] != -100
    sliced = inputs | {
        "hidden": inputs["hidden"].detach()[kept].requires_grad_(),
        "labels": inputs["labels"][kept],
    }
    whole, part = (linear_smoothed_cross_entropy(**i, smoothing=0.1) for i in (inputs, sliced))
    torch.testing.assert_close(whole, part)
    from_whole, from_part = gradients(whole, inputs), gradients(part, sliced)
    torch.testing.assert_close(from_whole["hidden"][kept], from_part["hidden"])
    assert not from_whole["hidden"][~kept].any()
    torch.testing.assert_close(from_whole["weight"], from_part["weight"])


def test_ignored_rows_may_hold_nan() -> None:
    inputs = problem()
    with torch.no_grad():
        inputs["hidden"][inputs["labels"] == -100] = float("nan")
    found = gradients(linear_smoothed_cross_entropy(**inputs, smoothing=0.1), inputs)
    assert all(torch.isfinite(g).all() for g in found.values())


def test_split_batch_with_item_count_equals_whole() -> None:
    inputs = problem()
    items = int((inputs["labels"] != -100).sum())
    whole = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    halves = [
        linear_smoothed_cross_entropy(
            **(inputs | {"hidden": inputs["hidden"][s], "labels": inputs["labels"][s]}),
            smoothing=0.1,
            num_items_in_batch=torch.tensor(items),
        )
        for s in (slice(0, 9), slice(9, N))
    ]
    torch.testing.assert_close(sum(halves), whole)
    for name, gradient in gradients(sum(halves), inputs).items():  # type: ignore[arg-type]
        torch.testing.assert_close(gradient, gradients(linear_smoothed_cross_entropy(**inputs, smoothing=0.1), inputs)[name])


def test_permuting_the_classes_permutes_the_gradient() -> None:
    inputs, order = problem(), torch.randperm(K, generator=torch.Generator().manual_seed(5))
    place, prior = order.argsort(), prior_of("vector")
    assert prior is not None
    labels = torch.where(inputs["labels"] == -100, -100, place[inputs["labels"].clamp_min(0)])
    moved = inputs | {
        "weight": inputs["weight"].detach()[order].requires_grad_(),
        "bias": inputs["bias"].detach()[order].requires_grad_(),
        "labels": labels,
    }
    a = linear_smoothed_cross_entropy(**inputs, smoothing=Smoothing(0.2, prior=prior))
    b = linear_smoothed_cross_entropy(**moved, smoothing=Smoothing(0.2, prior=prior[order]))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, inputs)["weight"][order], gradients(b, moved)["weight"])


def test_zero_token_weight_equals_ignoring() -> None:
    inputs = problem()
    token_weight = (torch.arange(N) % 3 > 0).double()
    masked = inputs | {"labels": inputs["labels"].masked_fill(token_weight == 0, -100)}
    a = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, token_weight=token_weight)
    b = linear_smoothed_cross_entropy(**masked, smoothing=0.1)
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients(a, inputs).values(), gradients(b, masked).values(), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 4])
def test_all_ignored_gives_a_differentiable_zero(reduction: str, n: int) -> None:
    inputs = problem(n=n) | {"labels": torch.full((n,), -100)}
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction=reduction).sum()
    assert loss.item() == 0
    for name, gradient in gradients(loss, inputs).items():
        assert gradient.shape == inputs[name].shape and not gradient.any()


def test_all_token_weights_zero_gives_zero() -> None:
    inputs = problem()
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, token_weight=torch.zeros(N))
    assert loss.item() == 0 and not gradients(loss, inputs)["weight"].any()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kind", ["support", "rows"])
def test_class_without_prior_mass_may_be_masked_with_minus_infinity(kind: str, softcap: float | None) -> None:
    inputs, prior = problem(), prior_of("support")
    assert prior is not None
    prior = prior if kind == "support" else prior.expand(K, K)
    dead = torch.arange(K) < K // 2
    with torch.no_grad():
        inputs["bias"][dead] = float("-inf")
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, inputs["labels"].clamp_min(K // 2))
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=Smoothing(0.2, prior=prior), softcap=softcap)
    found = gradients(loss, inputs)
    if softcap is None:
        alive = inputs | {
            "weight": inputs["weight"].detach()[~dead].requires_grad_(),
            "bias": inputs["bias"].detach()[~dead].requires_grad_(),
            "labels": torch.where(inputs["labels"] == -100, -100, inputs["labels"] - K // 2),
        }
        part = prior[..., ~dead] if kind == "support" else prior[~dead][:, ~dead]
        wanted = linear_smoothed_cross_entropy(**alive, smoothing=Smoothing(0.2, prior=part))
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(found["hidden"], gradients(wanted, alive)["hidden"])
    assert torch.isfinite(loss) and not found["weight"][dead].any() and not found["bias"][dead].any()


def test_mass_or_label_on_a_masked_class_is_an_error() -> None:
    inputs = problem()
    with torch.no_grad():
        inputs["bias"][0] = float("-inf")
    with pytest.raises(ValueError, match="finite logits"):
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    inputs["labels"][0] = 0
    with pytest.raises(ValueError, match="finite logits"):
        linear_smoothed_cross_entropy(**inputs, smoothing=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_underflowing_label_probability_is_exact(dtype: torch.dtype, z_loss: float) -> None:
    # Losses of 1000 nats: p_y is 0 in float32, so its logarithm says nothing.
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 500.0], [1.0, 1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    inputs = {"hidden": hidden, "weight": weight, "labels": torch.tensor([1, 2, 0])}
    exact = doubled(inputs)
    got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction="none", z_loss=z_loss)
    want = dense_losses(**exact, z_loss=z_loss)
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-2)
    wanted = gradients(want.sum(), exact)
    for name, gradient in gradients(got.sum(), inputs).items():
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-3)


@pytest.mark.parametrize("change, error, match", [
    ({"labels": torch.full((N,), K)}, ValueError, "expected labels in"),
    ({"labels": torch.full((N,), -1)}, ValueError, "expected labels in"),
    ({"labels": torch.zeros(N)}, TypeError, "integer labels"),
    ({"labels": torch.zeros(N, dtype=torch.bool)}, TypeError, "integer labels"),
    ({"labels": torch.zeros(N - 1, dtype=torch.long)}, ValueError, "expected labels"),
    ({"weight": torch.zeros(K, D + 1, dtype=torch.float64)}, ValueError, "expected hidden"),
    ({"weight": torch.zeros(1, D, dtype=torch.float64), "bias": None}, ValueError, "at least 2 classes"),
    ({"weight": torch.zeros(K, D)}, TypeError, "one dtype"),
    ({"weight": torch.zeros(K, D, dtype=torch.int8)}, TypeError, "floating-point"),
    ({"bias": torch.zeros(1, K)}, ValueError, "expected bias"),
    ({"reduction": "average"}, ValueError, "expected reduction"),
    ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "num_items_in_batch"),
    ({"token_weight": torch.ones(N - 1)}, ValueError, "token_weight"),
    ({"token_weight": -torch.ones(N)}, ValueError, "token_weight"),
    ({"token_weight": torch.ones(N, requires_grad=True)}, ValueError, "without a gradient"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows"),
    ({"smoothing": 1.5}, ValueError, "epsilon"),
    ({"smoothing": Smoothing(prior=torch.ones(K + 1) / (K + 1))}, ValueError, "expected a prior over"),
    ({"z_loss": -0.1}, ValueError, r"z_loss >= 0, got -0.1"),
    ({"z_loss": float("nan")}, ValueError, "z_loss"),
    ({"hidden": torch.full((N, D), float("nan"), dtype=torch.float64)}, ValueError, "finite"),
])  # fmt: skip
def test_errors_say_what_was_expected(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear_smoothed_cross_entropy(**({"smoothing": 0.1} | problem() | change))
