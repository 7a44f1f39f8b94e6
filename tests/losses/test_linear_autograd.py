"""The logits-free loss under autograd: frozen parts, repeated backwards, checkpointing, compile, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_reference import (
    D,
    K,
    Matmuls,
    dense_loss,
    gradients,
    problem,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_ls.losses.linear import linear_smoothed_cross_entropy


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
