"""The same loss for a head whose vocabulary is divided among processes (tensor parallelism): the engine behind `group=`.

Per chunk of m rows each process gathers two numbers per row from every other, its part of lse(z) and of z_y (three with a
soft-cap or a prior per label, whose ⟨u, z⟩ needs the logits). Per call it adds up Wᵀu and ⟨u, b⟩, d + 1 numbers, and dH.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import tensor as distributed
from torch.distributed.tensor import DTensor

from hf_ls.losses import _checks
from hf_ls.losses._chunks import (
    CLASS_BLOCK,
    Needs,
    RowsAndGradients,
    accumulate,
    default_chunk_rows,
    in_parameter_dtype,
    rows_times_weight,
)
from hf_ls.losses._rows import RowLoss, exact_dtype


class Shard(NamedTuple):
    """Which classes this process holds, and with whom it shares the rest."""

    start: int
    stop: int
    classes: int  # K, of all processes
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None) -> Shard:
        """The rows of `weight` among those of all processes; collective."""
        mine = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = [int(size) for size in _gathered(mine, group)]
        start = sum(sizes[: dist.get_rank(group)])
        return cls(start, start + weight.shape[0], sum(sizes), group)

    def gather(self, values: Tensor) -> Tensor:
        """The values of every process, [R, ...]."""
        return torch.stack(_gathered(values, self.group))

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.group)
        return values


def divided(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, loss: RowLoss
) -> tuple[Tensor, Tensor | None, Shard | None]:
    """This process's rows of the head and which they are; (weight, bias, None) if nothing is divided.

    Raises: ValueError without a process group, for placements other than Shard(0), and for an objective or an observer, which
    need all logits of a row.
    """
    if isinstance(hidden, DTensor):
        raise ValueError(f"expected hidden as a plain tensor, the same everywhere, got a DTensor {hidden.placements}; gather it")
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                f"expected the weight as Shard(0) on a mesh of one dimension, got {weight.placements} on "
                f"{weight.device_mesh.ndim}; gather the other dimensions first"
            )
        group = weight.device_mesh.get_group() if group is None else group
        weight = weight.to_local()
    if isinstance(bias, DTensor):
        if tuple(bias.placements) != (distributed.Shard(0),):
            raise ValueError(f"expected the bias as Shard(0) like the weight, got {bias.placements}; redistribute it")
        bias = bias.to_local()
    if group is None:
        return weight, bias, None
    for what, given in (("objective", loss.objective), ("observer", loss.observer)):
        if given is not None:
            raise ValueError(
                f"expected no {what} with a divided head, got {given!r}; it needs all logits of a row: gather the head"
            )
    return weight, bias, Shard.of(weight, group)


def shard_chunk_loop(
    loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    *,
    shard: Shard,
    factor: float | Tensor,
    needs: Needs,
    weight_dtype: torch.dtype,
    chunk_rows: int | None,
) -> RowsAndGradients:
    """`_chunks.chunk_loop` of a shard: terms of the kept rows, the whole gradient of hidden, those of this process's rows."""
    (n, width), exact = hidden.shape, exact_dtype(hidden.dtype)
    scale = loss.logit_scale * factor
    alpha = loss.logit_scale * (factor if isinstance(factor, float) else 1.0)
    sum_dtype = exact if _checks.reading_waits(hidden) else weight_dtype
    rounds = needs[1] and sum_dtype != exact
    rows = chunk_rows or default_chunk_rows(n, width, hidden.dtype, rounds, cuda=hidden.is_cuda)
    losses, nll, smoothing_term = (hidden.new_zeros(n, dtype=exact) for _ in range(3))
    grad_hidden = hidden.new_zeros((n, width), dtype=exact) if needs[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=sum_dtype) if needs[1] else None
    grad_bias = hidden.new_zeros(len(weight), dtype=exact) if needs[2] else None
    rider = _PriorMean.of(loss, shard, labels, weight, bias, exact) if loss.rides_along else None
    offset, beta = (hidden.new_zeros(1), 0.0) if bias is None else (bias, loss.logit_scale)
    for start in range(0, n, rows):
        part = slice(start, min(n, start + rows))
        chunk, y = hidden[part], labels[part]
        z = torch.addmm(offset, chunk, weight.t(), beta=beta, alpha=loss.logit_scale).to(exact)
        expected = None if loss.smoothing.epsilon else z.new_zeros(len(z))
        if rider is not None:
            expected = rider.expected(chunk, loss.logit_scale)
        weights = None if row_weight is None else row_weight[part]
        losses[part], nll[part], smoothing_term[part] = _chunk_(loss, shard, z, y, expected, weights)
        if grad_bias is not None:
            grad_bias += z.sum(0)
        gradient = z.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[part] = rows_times_weight(gradient, weight)
        if grad_weight is not None:
            accumulate(grad_weight, gradient, chunk, alpha, fresh=False)
    if grad_hidden is not None:
        shard.add_up(grad_hidden)
    if rider is not None:
        mixing = rider.mixing if row_weight is None else rider.mixing * row_weight
        if grad_hidden is not None:
            grad_hidden.addr_(mixing, rider.mean, alpha=-1)
        if grad_weight is not None:
            total = torch.mv(hidden.t().to(exact), mixing)
            grad_weight.addr_(rider.prior.to(sum_dtype), total.mul_(-alpha).to(sum_dtype))
        if grad_bias is not None:
            grad_bias -= mixing.sum() * rider.prior
    for small in (grad_hidden, grad_bias):
        if small is not None:
            small.mul_(scale)
    if grad_weight is not None:
        grad_weight = in_parameter_dtype(grad_weight, factor, weight_dtype)
    return RowsAndGradients(losses, nll, smoothing_term, grad_hidden, grad_weight, grad_bias)


def _chunk_(
    loss: RowLoss, shard: Shard, z: Tensor, labels: Tensor, expected: Tensor | None, row_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nll and smoothing term of logits [m, K_r] for labels [m]; the logits become their gradient in place.

    With `expected` = ⟨u, z⟩ known, the rank-1 −e·u is left to the caller.
    """
    slope = None
    if loss.softcap is not None:
        z.div_(loss.softcap).tanh_()
        slope = z.square().neg_().add_(1)
        z.mul_(loss.softcap)
    local = labels - shard.start
    mine = ((local >= 0) & (local < z.shape[1])).nonzero().squeeze(1)
    column = local[mine]
    mixing, prior = _mixing(loss, shard, labels, z.dtype)
    parts = torch.zeros((3 if expected is None else 2, len(z)), dtype=z.dtype, device=z.device)
    parts[0] = z.logsumexp(1)
    parts[1, mine] = z[mine, column]
    if expected is None:
        # 0·(−inf) is NaN, but a class without prior mass must add exactly 0.
        parts[2] = (z.masked_fill(prior == 0, 0) * prior).sum(1)
    gathered = shard.gather(parts)
    lse, label_logit = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)
    known = gathered[:, 2].sum(0) if expected is None else expected
    nll, smoothing_term = lse - label_logit, mixing * (label_logit - known)
    z.sub_(lse.unsqueeze(1)).exp_()
    if loss.z_loss:
        z.mul_((1 + 2 * loss.z_loss * lse).unsqueeze(1))
    z[mine, column] -= 1 - mixing[mine]
    if expected is None:
        z.sub_(mixing.unsqueeze(1) * prior)
    if slope is not None:
        z.mul_(slope)
    if row_weight is not None:
        z.mul_(row_weight.unsqueeze(1))
    return nll + smoothing_term + loss.z_loss * lse.square(), nll, smoothing_term


def _mixing(loss: RowLoss, shard: Shard, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights e [m] and this process's part of the prior, [K_r] or [m, K_r]."""
    whole = loss.smoothing.prior_for(labels, shard.classes, dtype)
    return loss.smoothing.mixing(labels, whole), whole[..., shard.start : shard.stop]


class _PriorMean(NamedTuple):
    """What ⟨u, z⟩ = s·(h·(Wᵀu) + ⟨u, b⟩) needs beside the hidden states."""

    prior: Tensor  # u of this process [K_r]
    mixing: Tensor  # e_i [n]
    mean: Tensor  # Wᵀu over all processes [d]
    offset: Tensor  # ⟨u, b⟩ over all processes

    @classmethod
    def of(
        cls, loss: RowLoss, shard: Shard, labels: Tensor, weight: Tensor, bias: Tensor | None, exact: torch.dtype
    ) -> _PriorMean:
        mixing, prior = _mixing(loss, shard, labels, exact)
        sums = torch.zeros(weight.shape[1] + 1, dtype=exact, device=weight.device)
        for some, rows in zip(prior.split(CLASS_BLOCK), weight.split(CLASS_BLOCK), strict=True):
            sums[:-1] += torch.mv(rows.t().to(exact), some)
        if bias is not None:
            sums[-1] = (bias.to(exact).masked_fill(prior == 0, 0) * prior).sum()
        shard.add_up(sums)
        return cls(prior, mixing, sums[:-1], sums[-1])

    def expected(self, hidden: Tensor, logit_scale: float) -> Tensor:
        """⟨u, z⟩ of rows hidden [m, d]."""
        return logit_scale * (torch.mv(hidden.to(self.mean.dtype), self.mean) + self.offset)


def _gathered(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, values.contiguous(), group=group)
    return every
