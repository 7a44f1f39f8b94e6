"""Objectives inside the chunk loop against autograd over dense logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_reference import (
    D,
    K,
    N,
    dense_losses,
    gradients,
    head_logits,
    problem,
    terms_of,
)
from torch import Tensor

from hf_ls.losses.linear import linear_smoothed_cross_entropy
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Smoothing


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-nll).exp()) ** 2 * nll


def entropy_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return F.nll_loss(log_p, labels, reduction="none") + 0.1 * (log_p.exp() * log_p).sum(1)


def named(name: str, epsilon: float = 0.0) -> Any:
    objective, smoothing = Objective(name), Smoothing(epsilon)
    return lambda logits, labels: objective(logits, labels, smoothing)


def naive_dft(logits: Tensor, labels: Tensor) -> Tensor:
    p_y = logits.softmax(1)[torch.arange(len(labels)), labels]
    return p_y.detach() * -p_y.log()


def naive_eaft(logits: Tensor, labels: Tensor) -> Tensor:
    top = logits.detach().sort(1, descending=True).values[:, :20].softmax(1)
    return torch.special.entr(top).sum(1) / torch.tensor(20.0).double().log() * F.cross_entropy(logits, labels, reduction="none")


def naive_brier(epsilon: float) -> Any:
    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        target = (1 - epsilon) * F.one_hot(labels, logits.shape[1]) + epsilon / logits.shape[1]
        return (logits.softmax(1) - target).pow(2).sum(1)

    return losses


# What the chunks get, and the same over dense logits.
OBJECTIVES = {
    "focal": (focal, focal),
    "entropy penalty": (entropy_penalty, entropy_penalty),
    "dft": (named("dft"), naive_dft),
    "eaft": (named("eaft"), naive_eaft),
    "brier": (named("brier"), naive_brier(0.0)),
    "smoothed brier": (named("brier", 0.2), naive_brier(0.2)),
}
HEADS = [{}, {"bias": None}, {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.05}]


@pytest.mark.parametrize("objective, dense", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)])
def test_objective_equals_autograd(objective: Any, dense: Any, reduction: str, head: dict, frozen: tuple[str, ...]) -> None:
    head = dict(head)
    inputs = problem(bias="bias" not in head)
    head.pop("bias", None)
    for name in frozen:
        if name in inputs:
            inputs[name].requires_grad_(False)
    z_loss = head.pop("z_loss", 0.0)
    token_weight = torch.rand(N, dtype=torch.float64)
    logits = head_logits(inputs["hidden"], inputs["weight"], inputs.get("bias"), **head)
    kept = inputs["labels"] != -100
    losses = torch.zeros(N, dtype=torch.float64)
    losses[kept] = dense(logits[kept], inputs["labels"][kept]) + z_loss * logits[kept].logsumexp(1).square()
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
    assert found.keys() == wanted.keys() == {name for name in ("hidden", "weight", "bias") if name in inputs} - {*frozen}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("objective", [ours for ours, _ in OBJECTIVES.values()], ids=OBJECTIVES)
@pytest.mark.parametrize("rows", [0, 4], ids=["empty", "all ignored"])
def test_an_objective_of_nothing_is_a_differentiable_zero(objective: Any, rows: int) -> None:
    hidden = torch.full((rows, D), torch.nan, requires_grad=True)
    weight = torch.randn(K, D, requires_grad=True)
    loss = linear_smoothed_cross_entropy(hidden, weight, torch.full((rows,), -100), 0.0, objective=objective)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_objective_terms_split_into_nll_and_the_rest() -> None:
    inputs = problem()
    terms = terms_of(**inputs, smoothing=0.0, objective=focal)
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
