"""The loss of a linear head written from the target distribution over dense logits, for the tests of `hf_ls.linear`."""

from __future__ import annotations

import torch
from torch import Tensor


def target(labels: Tensor, classes: int, epsilon: float, convention: str, prior: Tensor | None) -> Tensor:
    """t [n, K] in float64: (1−ε)·e_y plus ε spread by the prior, over all classes or over the wrong ones."""
    u = torch.full((classes,), 1 / classes, dtype=torch.float64) if prior is None else prior.double()
    rows = u.expand(len(labels), classes) if u.dim() == 1 else u[labels]
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    if convention == "wrong":
        rows = rows * (1 - one_hot)
        rows = rows / rows.sum(1, keepdim=True)
    return (1 - epsilon) * one_hot + epsilon * rows


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.1,
    convention: str = "all",
    prior: Tensor | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    **head: object,
) -> Tensor:
    """Per-item losses [...], weighted, 0 where ignored: −Σ t·log p + λ·lse², with 0·(−inf) = 0."""
    logits = head_logits(hidden, weight, **head)  # type: ignore[arg-type]
    flat, y = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = y != ignore_index
    t = target(y.masked_fill(~kept, 0), flat.shape[1], epsilon, convention, prior).to(flat.dtype)
    losses = -(t * flat.log_softmax(1).masked_fill(t == 0, 0)).sum(1)
    if z_loss:
        losses = losses + z_loss * flat.logsumexp(1).square()
    losses = losses.masked_fill(~kept, 0).reshape(labels.shape)
    return losses if token_weight is None else losses * token_weight


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
    **options: object,
) -> Tensor:
    losses = dense_losses(hidden, weight, labels, **options)  # type: ignore[arg-type]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    kept = (labels != options.get("ignore_index", -100)).to(losses.dtype)
    token_weight = options.get("token_weight")
    total = float((kept if token_weight is None else kept * token_weight).sum())
    return losses.sum() / (num_items_in_batch or total or 1.0)
