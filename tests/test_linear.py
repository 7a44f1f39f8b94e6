"""The logits-free loss against the target distribution over dense logits, and the promises of its docstring."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_reference import dense_loss, dense_losses, head_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_ls import linear_cuda
from hf_ls.linear import linear_smoothed_cross_entropy, linear_smoothed_terms
from hf_ls.linear_chunks import PriorRow, default_chunk_rows
from hf_ls.linear_objective import RowLoss
from hf_ls.losses import smoothed_cross_entropy, smoothed_terms
from hf_ls.smoothing import Smoothing

N, D, K = 23, 6, 31


def problem(dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0, n: int = N, k: int = K) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    labels[torch.randperm(n, generator=g)[: n // 4]] = -100
    made = {
        "hidden": torch.randn(n, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(k, D, generator=g, dtype=torch.float64),
        "bias": torch.randn(k, generator=g, dtype=torch.float64),
    }
    made = {name: t.to(dtype).requires_grad_() for name, t in made.items() if bias or name != "bias"}
    return made | {"labels": labels}


def prior_of(kind: str, k: int = K) -> Tensor | None:
    g = torch.Generator().manual_seed(3)
    if kind == "uniform":
        return None
    u = torch.rand((k, k) if kind == "rows" else (k,), generator=g, dtype=torch.float64)
    if kind == "support":
        u[..., : k // 2] = 0
    return u / u.sum(-1, keepdim=True)


def gradients(loss: Tensor, inputs: dict[str, Any], upstream: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    leaves = {name: t for name, t in inputs.items() if t.is_floating_point() and t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), upstream, **kwargs), strict=True))


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: t.detach().double().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}


def assert_same(inputs: dict[str, Any], smoothing: Smoothing, tolerance: float, **options: Any) -> None:
    """Loss and all gradients of the fused loss against dense float64, relative to their largest entry."""
    fused_only = {name: options.pop(name) for name in ("chunk_rows",) if name in options}
    exact = doubled(inputs)
    parts = {"epsilon": smoothing.epsilon, "convention": smoothing.convention, "prior": smoothing.prior}
    want = dense_loss(**exact, **parts, **options)
    got = linear_smoothed_cross_entropy(**inputs, smoothing=smoothing, **options, **fused_only)
    assert got.dtype == (torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    scale = max(1.0, float(want.detach().abs().max()))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)
    wanted = gradients(want, exact, upstream)
    found = gradients(got, inputs, upstream.to(got.dtype))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype
        atol = tolerance * max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- parity ---------------------------------------------------------------------------------------------------------


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
    terms = linear_smoothed_terms(**inputs, smoothing=0.1, reduction="sum")
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
    nll, term = linear_smoothed_terms(**inputs, smoothing=smoothing, **options)[1:]
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


# --- properties -----------------------------------------------------------------------------------------------------


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


# --- extremes -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"reduction": "none"}, {"token_weight": torch.rand(200)}])
def test_half_precision_is_no_worse_than_a_dense_head(dtype: torch.dtype, options: dict) -> None:
    """Against float64 on the same rounded inputs, twice the error of nn.Linear + cross_entropy in that dtype is allowed.

    Both round every logit once (relative 2^-9 or 2^-12) and every gradient at least once; chunks add roundings of dW.
    """
    inputs = problem(dtype, bias=False, n=200, k=300)
    exact = doubled(inputs)
    options = {"reduction": "sum"} | options
    fused = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=64, **options)
    parts = {k: v for k, v in options.items() if k not in ("reduction", "softcap")}
    true = dense_losses(**exact, **parts, softcap=options.get("softcap"))
    logits = F.linear(inputs["hidden"], inputs["weight"]).float()
    logits = logits if "softcap" not in options else 3.0 * torch.tanh(logits / 3.0)
    rough = F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1, reduction="none")
    rough = rough * options["token_weight"] if "token_weight" in options else rough
    assert fused.dtype == torch.float32
    errors = [(x.sum().double() - true.sum()).abs().item() for x in (fused, rough)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * true.sum().item()
    wanted = gradients(true.sum(), exact)
    for name, gradient in gradients(fused.sum(), inputs).items():
        assert gradient.dtype == dtype
        ours, theirs = (
            ((g.double() - wanted[name]).norm() / wanted[name].norm()).item()
            for g in (gradient, gradients(rough.sum(), inputs, retain_graph=True)[name])
        )
        assert ours <= 2 * theirs, (name, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniform_prior_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    """1/K is no half-precision number: rounding it would shift every smoothing term by up to 0.4 %."""
    for k in (999, 32128, 256000):
        labels, hidden = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, dtype=dtype)
        rider = PriorRow.of(RowLoss(Smoothing(0.1)), labels, None, k, hidden)
        assert rider.row.dtype == dtype and len(rider.row.unique()) == 1
        assert float(rider.row[0]) * rider.factor == pytest.approx(1 / k, rel=1e-7)


@pytest.mark.parametrize("peaked", [False, True])
def test_prior_row_stays_in_range_of_float16(peaked: bool) -> None:
    k = 4000
    hidden = torch.full((600, 4), 30.0, dtype=torch.float16).requires_grad_()
    weight = torch.full((k, 4), 20.0, dtype=torch.float16).requires_grad_()
    prior = torch.full((k,), 1e-6)
    prior[7] = 1 - prior[1:].sum() if peaked else prior[7]
    prior = prior / prior.sum()
    inputs = {"hidden": hidden, "weight": weight, "labels": torch.arange(600)}
    found = gradients(linear_smoothed_cross_entropy(**inputs, smoothing=Smoothing(0.5, prior=prior)), inputs)
    assert all(torch.isfinite(g).all() for g in found.values())


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}, {"weight", "bias"}])
def test_frozen_tensors_get_no_gradient(trained: set[str], reduction: str) -> None:
    inputs = problem()
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_(name in trained)
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction=reduction, chunk_rows=6)
    upstream = torch.rand_like(loss)
    found = gradients(loss, inputs, upstream)
    assert found.keys() == trained
    wanted = gradients(dense_loss(**inputs, reduction=reduction), inputs, upstream)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name])


def test_repeated_backward_through_a_retained_graph_is_exact() -> None:
    inputs = problem()
    for reduction in ("mean", "none"):
        loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction=reduction)
        first = gradients(loss, inputs, torch.full_like(loss, 3.0), retain_graph=True)
        second = gradients(loss, inputs, torch.full_like(loss, 1.0), retain_graph=True)
        for name, gradient in first.items():
            torch.testing.assert_close(gradient, 3 * second[name])


def test_frozen_head_repeated_backward_per_item() -> None:
    inputs = problem(bias=False)
    inputs["weight"].requires_grad_(False)
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction="none")
    first = gradients(loss, inputs, torch.full_like(loss, 3.0), retain_graph=True)["hidden"]
    torch.testing.assert_close(first, 3 * gradients(loss, inputs, torch.ones_like(loss))["hidden"])


def test_backward_after_the_graph_is_freed_is_torchs_error() -> None:
    loss = linear_smoothed_cross_entropy(**problem(), smoothing=0.1)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    inputs = problem()
    with pytest.raises(RuntimeError, match="first derivative"):
        gradients(linear_smoothed_cross_entropy(**inputs, smoothing=0.1), inputs, create_graph=True)


def test_gradients_accumulate_and_flow_through_the_model() -> None:
    torch.manual_seed(0)
    body, head = torch.nn.Linear(5, D).double(), torch.nn.Linear(D, K).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(K, (11,))
    for _ in range(2):
        (linear_smoothed_cross_entropy(body(x).tanh(), head.weight, y, 0.1, bias=head.bias) / 7).backward()
    found = [p.grad.clone() for p in (*body.parameters(), *head.parameters())]
    body.zero_grad(), head.zero_grad()
    (F.cross_entropy(head(body(x).tanh()), y, label_smoothing=0.1) * 2 / 7).backward()
    for gradient, p in zip(found, (*body.parameters(), *head.parameters()), strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"objective": lambda z, y: F.cross_entropy(z, y, reduction="none")}])
def test_evaluation_does_no_gradient_work(mode: Any, options: dict) -> None:
    inputs = problem()
    want = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, **options)
    with mode(), Matmuls() as seen:
        got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=1000, **options)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.detach())
    # hWᵀ, and Wᵀu of one row where the prior needs it.
    assert seen.large == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(use_reentrant: bool, reduction: str) -> None:
    inputs = problem()

    def run(hidden: Tensor) -> Tensor:
        return linear_smoothed_cross_entropy(
            hidden * 2, inputs["weight"], inputs["labels"], 0.1, bias=inputs["bias"], reduction=reduction
        )

    names = ("hidden", "weight", "bias")
    for name in names:
        inputs[name].grad = None
    checkpoint(run, inputs["hidden"], use_reentrant=use_reentrant).sum().backward()
    found = {name: inputs[name].grad for name in names}
    wanted = gradients(run(inputs["hidden"]).sum(), inputs)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_works_inside_torch_compile(backend: str) -> None:
    inputs = problem()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return linear_smoothed_cross_entropy(hidden.tanh(), weight, labels, 0.1, bias=bias) * 2

    torch._dynamo.reset()
    want, got = step(**inputs), torch.compile(step, backend=backend)(**inputs)
    torch.testing.assert_close(got, want)
    wanted, found = gradients(want, inputs), gradients(got, inputs)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", ["same", "float32"])
def test_autocast_multiplies_as_a_linear_layer_does(dtype: torch.dtype, hidden_dtype: str) -> None:
    inputs = problem(torch.float32, n=90, k=120)
    if hidden_dtype == "same":
        inputs["hidden"] = inputs["hidden"].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
        got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=32)
    assert logits.dtype == dtype and got.dtype == torch.float32
    want = F.cross_entropy(logits.float(), inputs["labels"], label_smoothing=0.1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    found, wanted = gradients(got, inputs), gradients(want, inputs)
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype
        error = (gradient.double() - wanted[name].double()).norm() / wanted[name].double().norm()
        assert error < (1.5e-2 if dtype == torch.bfloat16 else 2e-3), name


def test_autocast_leaves_float64_alone() -> None:
    inputs = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    torch.testing.assert_close(got, dense_loss(**inputs), rtol=1e-12, atol=1e-12)


def test_float16_hidden_gradient_survives_loss_scaling() -> None:
    """A gradient of 1e-7 is 0 in float16: the upstream scale must come before the rounding."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, D, generator=g).half().requires_grad_()
    weight = (torch.randn(K, D, generator=g) * 1e-3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_smoothed_cross_entropy(hidden, weight, torch.arange(50) % K, 0.1, num_items_in_batch=1e5)
    (loss * 2.0**16).backward()
    exact = hidden.detach().double().requires_grad_()
    wanted = gradients(
        dense_loss(exact, weight.detach().half().double(), torch.arange(50) % K, num_items_in_batch=1e5),
        {"h": exact},
    )
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double() / 2**16, wanted["h"], rtol=0, atol=2e-2 * float(wanted["h"].abs().max()))


# --- memory and work ------------------------------------------------------------------------------------------------


class Matmuls(TorchDispatchMode):
    """Counts matmuls of more than one row and remembers the largest tensor any operator returned."""

    def __enter__(self) -> Matmuls:
        self.large, self.largest = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[0] > 1:
            self.large += 1
        return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"z_loss": 0.1},
        {"objective": lambda z, y: F.cross_entropy(z, y, reduction="none")},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_builds_the_logits(options: dict, dtype: torch.dtype) -> None:
    n, k = 900, 400
    inputs = problem(dtype, n=n, k=k) | {"labels": torch.arange(n) % k}
    with Matmuls() as dense:
        F.cross_entropy(F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]), inputs["labels"]).backward()
    with Matmuls() as fused:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=100, **options).backward()
    assert dense.largest >= n * k
    assert fused.largest <= 101 * k


def test_default_chunks_are_balanced() -> None:
    assert default_chunk_rows(100_000, 512, torch.float32, False) == 384
    assert default_chunk_rows(2048, 512, torch.bfloat16, False) == 512
    assert default_chunk_rows(400, 512, torch.float32, False) == 224  # two alike, not one of 384 and one of 16
    # Half precision rounds dW at each chunk: 16 longer chunks, as long as one is no larger than dW.
    assert default_chunk_rows(16_000, 4096, torch.bfloat16, True) == 1024
    assert default_chunk_rows(16_000, 256, torch.bfloat16, True) == 512


@pytest.mark.parametrize("reduction, trained, matmuls", [
    ("mean", ("hidden", "weight"), 3),
    ("mean", ("hidden",), 2),
    ("mean", ("weight",), 2),
    ("none", ("hidden",), 2),
    ("none", ("hidden", "weight"), 4),
])  # fmt: skip
def test_matmuls_per_chunk(reduction: str, trained: tuple[str, ...], matmuls: int) -> None:
    inputs = problem(bias=False)
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_(name in trained)
    with Matmuls() as seen:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction=reduction, chunk_rows=1000).sum().backward()
    assert seen.large == matmuls


def test_ignored_rows_cost_no_matmul() -> None:
    inputs = problem(n=40) | {"labels": torch.full((40,), -100)}
    inputs["labels"][::10] = 1
    with Matmuls() as seen:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=4).backward()
    assert seen.large == 3


# --- objectives -----------------------------------------------------------------------------------------------------


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-nll).exp()) ** 2 * nll


def entropy_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return F.nll_loss(log_p, labels, reduction="none") + 0.1 * (log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("objective", [focal, entropy_penalty])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.05}])
def test_objective_equals_autograd(objective: Any, reduction: str, head: dict) -> None:
    inputs, head = problem(), dict(head)
    z_loss = head.pop("z_loss", 0.0)
    token_weight = torch.rand(N, dtype=torch.float64)
    logits = head_logits(inputs["hidden"], inputs["weight"], inputs["bias"], **head)
    kept = inputs["labels"] != -100
    losses = torch.zeros(N, dtype=torch.float64)
    losses[kept] = objective(logits[kept], inputs["labels"][kept]) + z_loss * logits[kept].logsumexp(1).square()
    losses = losses * token_weight
    total = token_weight[kept].sum()
    want = {"mean": losses.sum() / total, "sum": losses.sum(), "none": losses}[reduction]
    got = linear_smoothed_cross_entropy(
        **inputs,
        smoothing=0.0,
        objective=objective,
        reduction=reduction,
        chunk_rows=5,
        z_loss=z_loss,
        token_weight=token_weight,
        **head,
    )
    torch.testing.assert_close(got, want)
    upstream = torch.rand_like(want)
    wanted, found = gradients(want, inputs, upstream), gradients(got, inputs, upstream)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_objective_terms_split_into_nll_and_the_rest() -> None:
    inputs = problem()
    terms = linear_smoothed_terms(**inputs, smoothing=0.0, objective=focal)
    nll = dense_losses(**inputs, epsilon=0.0).detach()
    torch.testing.assert_close(terms.nll, nll)
    torch.testing.assert_close(terms.nll + terms.smoothing_term, (1 - (-nll).exp()) ** 2 * nll)


def test_objective_in_bfloat16_sees_float32_logits() -> None:
    inputs, seen = problem(torch.bfloat16), []

    def objective(z: Tensor, y: Tensor) -> Tensor:
        seen.append(z.dtype)
        return F.cross_entropy(z, y, reduction="none")

    linear_smoothed_cross_entropy(**inputs, smoothing=0.0, objective=objective).backward()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("objective", [lambda z, y: z, lambda z, y: z.detach().sum(1), lambda z, y: z.sum()])
def test_objective_of_the_wrong_kind(objective: Any) -> None:
    with pytest.raises(ValueError, match="expected differentiable losses"):
        linear_smoothed_cross_entropy(**problem(), smoothing=0.0, objective=objective)


# --- errors ---------------------------------------------------------------------------------------------------------


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
    ({"backend": "cuda"}, ValueError, "expected backend"),
    ({"backend": "liger"}, ValueError, "expected CUDA tensors"),
    ({"hidden": torch.full((N, D), float("nan"), dtype=torch.float64)}, ValueError, "finite"),
])  # fmt: skip
def test_errors_say_what_was_expected(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear_smoothed_cross_entropy(**({"smoothing": 0.1} | problem() | change))


# --- engines of a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, device, unsupported, liger, operator, engine", [
    ("auto", "cpu", None, True, True, "chunks"),
    ("torch", "cpu", None, True, True, "chunks"),
    ("auto", "mps", None, True, True, "chunks"),
    ("auto", "cuda", None, True, True, "liger"),
    ("auto", "cuda", None, False, True, "torch"),
    ("auto", "cuda", None, False, False, "chunks"),
    ("auto", "cuda", "a soft-cap", True, True, "chunks"),
    ("torch", "cuda", None, True, True, "torch"),
    ("torch", "cuda", None, True, False, "chunks"),
    ("torch", "cuda", "a z-loss", True, True, "chunks"),
    ("liger", "cuda", None, True, False, "liger"),
])  # fmt: skip
def test_choice_of_engine(backend: Any, device: str, unsupported: str | None, liger: bool, operator: bool, engine: str) -> None:
    chosen = linear_cuda.choose_engine(backend, device, unsupported=unsupported, has_liger=liger, has_torch_operator=operator)
    assert chosen == engine


def test_liger_by_name_says_why_it_cannot_serve() -> None:
    for options, match in (
        ({"unsupported": "a soft-cap", "has_liger": True}, "a soft-cap"),
        ({"unsupported": None, "has_liger": False}, "pip install"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cuda.choose_engine("liger", "cuda", **options, has_torch_operator=True)  # type: ignore[arg-type]


def liger_stand_in(monkeypatch: pytest.MonkeyPatch, calls: list[dict]) -> None:
    """A module with Liger's function name and arguments, computing the same nll densely."""

    def liger_fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        logits = F.linear(hidden, weight, options["bias"])
        return F.cross_entropy(logits, labels, reduction=options["reduction"])

    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("engine", ["torch", "liger"])
@pytest.mark.parametrize("prior", ["uniform", "vector", "support"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "logit_scale": 0.4}])
def test_delegated_kernel_with_the_prior_outside_it(
    monkeypatch: pytest.MonkeyPatch, engine: str, prior: str, options: dict
) -> None:
    """torch's operator runs on a CPU too, so the delegation is checked with the real one; Liger has a stand-in."""
    if engine == "torch" and not linear_cuda.has_torch_operator():
        pytest.skip("this torch has no linear_cross_entropy")
    calls: list[dict] = []
    liger_stand_in(monkeypatch, calls)
    monkeypatch.setattr(linear_cuda, "choose_engine", lambda *args, **kwargs: engine)
    for smoothing in (
        Smoothing(0.2, prior=prior_of(prior)),
        Smoothing(0.2, "wrong", prior_of(prior)),
        Smoothing(0.0),
    ):
        assert_same(problem(), smoothing, 1e-12, **options)
        assert_same(problem(torch.float32, bias=False), smoothing, 1e-5, **options)
    assert bool(calls) == (engine == "liger")
    per_item = linear_smoothed_terms(**problem(), smoothing=0.2)
    monkeypatch.undo()
    wanted = linear_smoothed_terms(**problem(), smoothing=0.2)
    for got, want in zip(per_item, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_delegated_frozen_weight_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    liger_stand_in(monkeypatch, [])
    inputs = problem()
    inputs["weight"].requires_grad_(False)
    want = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    monkeypatch.setattr(linear_cuda, "choose_engine", lambda *args, **kwargs: "liger")
    got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    for name, gradient in gradients(got, inputs).items():
        torch.testing.assert_close(gradient, gradients(want, inputs, retain_graph=True)[name])
    with torch.no_grad():
        torch.testing.assert_close(linear_smoothed_cross_entropy(**inputs, smoothing=0.1), want.detach())
