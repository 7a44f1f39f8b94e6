"""The smoothed cross entropy of a head whose vocabulary is divided among processes (tensor parallelism).

Owns: `vocab_parallel_smoothed_cross_entropy`, `vocab_parallel_smoothed_terms`, the chunk loop over a shard of the head and
what its processes tell one another.
Does not own: the head on one process (`linear`), whose autograd and checks it shares; data parallelism (`trainer`).

Per chunk of m rows each process gathers two numbers per row from every other, its part of lse(z) and of z_y (three with a
soft-cap or a prior per label, whose ⟨u, z⟩ needs the logits). Per call it adds up Wᵀu and ⟨u, b⟩, d + 1 numbers, and dH.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_ls.losses._chunks import CLASS_BLOCK, Needs, RowsAndGradients, accumulate, default_chunk_rows, rows_times_weight
from hf_ls.losses._rows import RowLoss, exact_dtype
from hf_ls.losses.cross_entropy import Reduction, check_finite, check_options, check_range
from hf_ls.losses.linear import LinearCall, LinearLoss, LinearTerms, check_tensors, gather_rows, matmul_dtype, mean_factor
from hf_ls.losses.smoothing import Smoothing


def vocab_parallel_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """`linear.linear_smoothed_cross_entropy` of a head [K, d] of which each process holds some rows; nats.

    loss = lse(z) − (1−e)·z_y − e·⟨u, z⟩ + λ·lse(z)²  over the whole vocabulary K = Σ_r K_r, the same number on every process.
    Shapes: hidden [..., d] and labels [...], the same on every process; weight [K_r, d] and bias [K_r], in the order of the
    ranks, of any sizes, 0 too. A prior in `smoothing` covers all K classes.

    Args:
        weight: this process's rows, or a DTensor with the placement Shard(0) on a mesh of one dimension.
        group: the processes which share the head; None: the mesh of the DTensor, or else all processes.
        others: as in `linear.linear_smoothed_cross_entropy`.

    Every process gets the whole gradient of `hidden` (do not reduce it again) and that of its own rows, if the upstream
    gradient is the same on every process. All processes must call it, and its backward, in the same order.

    Megatron's `vocab_parallel_cross_entropy(label_smoothing=ε)` computes another loss on R > 1 processes: each takes the mean
    log-probability of its own K_r classes only, s = ε·K_r/(K_r−1), (1−s)·nll − s·mean_{k in shard} log p_k. The processes
    disagree about the loss; and as each spreads the mass s over its shard, the target of the gradient sums to 1 + (R−1)·s,
    so that all logits are pushed up.

    Raises: as `linear.linear_smoothed_cross_entropy`; ValueError without a process group and for other placements.
    """
    return vocab_parallel_smoothed_terms(
        hidden,
        weight,
        labels,
        smoothing,
        group=group,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        z_loss=z_loss,
        chunk_rows=chunk_rows,
    ).loss


@torch.compiler.disable
def vocab_parallel_smoothed_terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> LinearTerms:
    """`vocab_parallel_smoothed_cross_entropy` with the nll and the smoothing term of each item. Arguments and errors as there."""
    if not isinstance(smoothing, Smoothing):
        smoothing = Smoothing(smoothing)
    weight, bias, group = _local(hidden, weight, bias, group)
    shard = _Vocabulary.of(weight, group)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}] as this process's rows, got {tuple(bias.shape)}; shard it alike")
    whole = torch.empty((shard.classes, *weight.shape[1:]), dtype=weight.dtype, device="meta")  # what the checks speak of
    check_tensors(hidden, whole, None, labels, token_weight)
    check_options(reduction, "example", None, num_items_in_batch, shard.classes)
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("chunk_rows", chunk_rows)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"expected {name} > 0, got {value}; leave it out for none")
    is_kept = labels != ignore_index
    check_range(labels, is_kept, shard.classes, ignore_index)
    kept = None if bool(is_kept.all()) else is_kept.flatten().nonzero().squeeze(1)
    dtype = matmul_dtype(hidden, weight)
    call = _ShardCall(
        loss=RowLoss(smoothing, softcap=softcap, z_loss=float(z_loss)),
        labels=gather_rows(labels.reshape(-1), kept).long(),
        kept=kept,
        shape=labels.shape,
        row_weight=None if token_weight is None else gather_rows(token_weight.reshape(-1), kept).to(exact_dtype(dtype)),
        logit_scale=float(logit_scale),
        reduction=reduction,
        factor=1.0,
        chunk_rows=chunk_rows,
        engine="chunks",
        per_item=True,
        dtype=dtype,
        shard=shard,
    )
    call = replace(call, factor=mean_factor(call, num_items_in_batch))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return LinearTerms(*LinearLoss.apply(hidden, weight, bias, call))
    return call.terms(call.solve(hidden, weight, bias, (False, False, False)))


class _Vocabulary(NamedTuple):
    """Which classes this process holds, and with whom it shares the rest."""

    start: int
    stop: int
    classes: int  # K
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None) -> _Vocabulary:
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


@dataclass(frozen=True, eq=False)
class _ShardCall(LinearCall):
    """A call of which this process sees the classes `shard.start` to `shard.stop`."""

    shard: _Vocabulary

    def solve(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> RowsAndGradients:
        """Terms of the kept rows, the whole gradient of hidden, and the gradients of this process's rows."""
        rows = gather_rows(hidden.reshape(-1, hidden.shape[-1]), self.kept).to(self.dtype)
        # These casts are all that autocast stands for.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            found = self._chunk_loop(
                rows, weight.to(self.dtype), None if bias is None else bias.to(self.dtype), needs, weight.dtype
            )
        check_finite(found.losses, found.nll)
        return found

    def _chunk_loop(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, weight_dtype: torch.dtype
    ) -> RowsAndGradients:
        (n, width), exact = hidden.shape, exact_dtype(hidden.dtype)
        scale = self.factor * self.logit_scale
        rows = self.chunk_rows or default_chunk_rows(
            n, width, hidden.dtype, needs[1] and weight_dtype != exact_dtype(weight_dtype)
        )
        losses, nll, smoothing_term = (hidden.new_zeros(n, dtype=exact) for _ in range(3))
        grad_hidden = hidden.new_zeros((n, width), dtype=exact) if needs[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=weight_dtype) if needs[1] else None
        grad_bias = hidden.new_zeros(len(weight), dtype=exact) if needs[2] else None
        rider = _PriorMean.of(self, weight, bias, exact) if self.loss.rides_along else None
        offset, beta = (hidden.new_zeros(1), 0.0) if bias is None else (bias, self.logit_scale)
        for start in range(0, n, rows):
            part = slice(start, min(n, start + rows))
            chunk, y = hidden[part], self.labels[part]
            z = torch.addmm(offset, chunk, weight.t(), beta=beta, alpha=self.logit_scale).to(exact)
            expected = None if self.loss.smoothing.epsilon else z.new_zeros(len(z))
            if rider is not None:
                expected = rider.expected(chunk, self.logit_scale)
            row_weight = None if self.row_weight is None else self.row_weight[part]
            losses[part], nll[part], smoothing_term[part] = self._chunk_(z, y, expected, row_weight)
            if grad_bias is not None:
                grad_bias += z.sum(0)
            gradient = z.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = rows_times_weight(gradient, weight)
            if grad_weight is not None:
                accumulate(grad_weight, gradient, chunk, scale, fresh=False)
        if grad_hidden is not None:
            self.shard.add_up(grad_hidden)
        if rider is not None:
            mixing = rider.mixing if self.row_weight is None else rider.mixing * self.row_weight
            if grad_hidden is not None:
                grad_hidden.addr_(mixing, rider.mean, alpha=-1)
            if grad_weight is not None:
                total = torch.mv(hidden.t().to(exact), mixing)
                grad_weight.addr_(rider.prior.to(weight_dtype), total.mul_(-scale).to(weight_dtype))
            if grad_bias is not None:
                grad_bias -= mixing.sum() * rider.prior
        for small in (grad_hidden, grad_bias):
            if small is not None:
                small.mul_(scale)
        return RowsAndGradients(losses, nll, smoothing_term, grad_hidden, grad_weight, grad_bias)

    def _chunk_(
        self, z: Tensor, labels: Tensor, expected: Tensor | None, row_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, nll and smoothing term of logits [m, K_r] for labels [m]; the logits become their gradient in place.

        With `expected` = ⟨u, z⟩ known, the rank-1 −e·u is left to the caller.
        """
        slope = None
        if self.loss.softcap is not None:
            z.div_(self.loss.softcap).tanh_()
            slope = z.square().neg_().add_(1)
            z.mul_(self.loss.softcap)
        local = labels - self.shard.start
        mine = ((local >= 0) & (local < z.shape[1])).nonzero().squeeze(1)
        column = local[mine]
        mixing, prior = self._mixing(labels, z.dtype)
        parts = torch.zeros((3 if expected is None else 2, len(z)), dtype=z.dtype, device=z.device)
        parts[0] = z.logsumexp(1)
        parts[1, mine] = z[mine, column]
        if expected is None:
            # 0·(−inf) is NaN, but a class without prior mass must add exactly 0.
            parts[2] = (z.masked_fill(prior == 0, 0) * prior).sum(1)
        gathered = self.shard.gather(parts)
        lse, label_logit = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)
        known = gathered[:, 2].sum(0) if expected is None else expected
        nll, smoothing_term = lse - label_logit, mixing * (label_logit - known)
        z.sub_(lse.unsqueeze(1)).exp_()
        if self.loss.z_loss:
            z.mul_((1 + 2 * self.loss.z_loss * lse).unsqueeze(1))
        z[mine, column] -= 1 - mixing[mine]
        if expected is None:
            z.sub_(mixing.unsqueeze(1) * prior)
        if slope is not None:
            z.mul_(slope)
        if row_weight is not None:
            z.mul_(row_weight.unsqueeze(1))
        return nll + smoothing_term + self.loss.z_loss * lse.square(), nll, smoothing_term

    def _mixing(self, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights e [m] and this process's part of the prior, [K_r] or [m, K_r]."""
        whole = self.loss.smoothing.prior_for(labels, self.shard.classes, dtype)
        return self.loss.smoothing.mixing(labels, whole), whole[..., self.shard.start : self.shard.stop]


class _PriorMean(NamedTuple):
    """What ⟨u, z⟩ = s·(h·(Wᵀu) + ⟨u, b⟩) needs beside the hidden states."""

    prior: Tensor  # u of this process [K_r]
    mixing: Tensor  # e_i [n]
    mean: Tensor  # Wᵀu over all processes [d]
    offset: Tensor  # ⟨u, b⟩ over all processes

    @classmethod
    def of(cls, call: _ShardCall, weight: Tensor, bias: Tensor | None, exact: torch.dtype) -> _PriorMean:
        mixing, prior = call._mixing(call.labels, exact)
        sums = torch.zeros(weight.shape[1] + 1, dtype=exact, device=weight.device)
        for some, rows in zip(prior.split(CLASS_BLOCK), weight.split(CLASS_BLOCK), strict=True):
            sums[:-1] += torch.mv(rows.t().to(exact), some)
        if bias is not None:
            sums[-1] = (bias.to(exact).masked_fill(prior == 0, 0) * prior).sum()
        call.shard.add_up(sums)
        return cls(prior, mixing, sums[:-1], sums[-1])

    def expected(self, hidden: Tensor, logit_scale: float) -> Tensor:
        """⟨u, z⟩ of rows hidden [m, d]."""
        return logit_scale * (torch.mv(hidden.to(self.mean.dtype), self.mean) + self.offset)


def _local(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """The rows of this process and the group which holds the others."""
    if isinstance(hidden, DTensor):
        raise ValueError(f"expected hidden as a plain tensor, the same everywhere, got a DTensor {hidden.placements}; gather it")
    if not dist.is_initialized():
        raise ValueError("expected a process group, got none; use linear_smoothed_cross_entropy on one process")
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                f"expected the weight as Shard(0) on a mesh of one dimension, got {weight.placements} on "
                f"{weight.device_mesh.ndim}; gather the other dimensions first"
            )
        group = weight.device_mesh.get_group() if group is None else group
        weight = weight.to_local()
    if isinstance(bias, DTensor):
        if tuple(bias.placements) != (Shard(0),):
            raise ValueError(f"expected the bias as Shard(0) like the weight, got {bias.placements}; redistribute it")
        bias = bias.to_local()
    return weight, bias, group


def _gathered(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, values.contiguous(), group=group)
    return every
