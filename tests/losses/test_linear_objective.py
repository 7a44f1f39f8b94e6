"""Objectives inside the chunk loop against autograd over dense logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_reference import (
    N,
    dense_losses,
    gradients,
    head_logits,
    problem,
    terms_of,
)
from torch import Tensor

from hf_ls.losses.linear import linear_smoothed_cross_entropy


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
