"""The chunk loop of the linear-head loss: three matmuls per chunk of rows and one buffer of logits.

Owns: chunk sizes, the matmuls, the prior's rank-1 part, the accumulation of gradients.
Does not own: what a chunk of logits costs (`linear_objective`); autograd, reductions, kept rows (`linear`).

The rank-1 part: ⟨u, z_i⟩ = s·(h_i·(Wᵀu) + ⟨u, b⟩), so dH_i gets −w_i·e_i·Wᵀu and dW gets −u ⊗ Σ w_i·e_i·h_i.
Both come from the prior as one more row under the first chunk: [G; u]·W ends in Wᵀu, and the product
[G; u]ᵀ·[H; −Σ w_i·e_i·h_i] contains the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls.losses._rows import RowLoss, exact_dtype, prior_dot

# Rows per chunk by bytes per element: fewer starve the matmuls (each chunk reads W), more cost memory.
CHUNK_ROWS = {2: 512, 4: 384, 8: 192}
# A half-precision dW is rounded at each chunk, so long batches take longer chunks instead of more roundings.
MAX_HALF_CHUNKS = 16
# Half-precision products for a float32 dW pass through a buffer of this many classes.
CLASS_BLOCK = 16384

Needs = tuple[bool, bool, bool]  # gradients of (hidden, weight, bias)


class RowsAndGradients(NamedTuple):
    """What an engine makes of n rows: unweighted parts in nats, and the gradients of factor·Σ w_i·loss_i."""

    losses: Tensor  # [n], with the z-loss
    nll: Tensor  # [n]
    smoothing_term: Tensor  # [n]
    grad_hidden: Tensor | None  # [n, d], float32 or float64
    grad_weight: Tensor | None  # [K, d], dtype of the parameter
    grad_bias: Tensor | None  # [K], float32 or float64


@dataclass
class PriorRow:
    """The prior u as one more row under the first chunk, and its partner row under the hidden states."""

    prior: Tensor  # u [K]
    mixing: Tensor  # e_i [n]
    weighted_mixing: Tensor  # w_i·e_i [n]
    row: Tensor  # [K], u = row·factor, in the dtype of the matmuls
    factor: float
    mean: Tensor | None = None  # Wᵀ·row [d], once a matmul has made it

    @classmethod
    def of(cls, loss: RowLoss, labels: Tensor, row_weight: Tensor | None, classes: int, hidden: Tensor) -> PriorRow:
        """The prior of a `RowLoss.rides_along` for rows hidden [n, d] with labels [n] and weights [n]."""
        prior = loss.smoothing.prior_for(labels, classes, exact_dtype(hidden.dtype))
        mixing = loss.smoothing.mixing(labels, prior)
        # A power of two as largest entry keeps the uniform prior exact in any dtype; about √(max u) keeps
        # both Wᵀ·row and the partner within the range of float16.
        peak = float(prior.max())
        top = 2.0 ** round(math.log2(peak) / 2)
        row = (prior * (top / peak)).to(hidden.dtype)
        return cls(prior, mixing, mixing if row_weight is None else mixing * row_weight, row, peak / top)

    def partner(self, hidden: Tensor) -> Tensor:
        """−factor·Σ w_i·e_i·h_i as [1, d]."""
        total = torch.mv(hidden.t().to(self.mixing.dtype), self.weighted_mixing)
        return total.mul_(-self.factor).to(hidden.dtype).unsqueeze(0)

    def prior_mean(self, weight: Tensor) -> Tensor:
        """Wᵀu [d]."""
        mean = torch.mm(self.row.unsqueeze(0), weight)[0] if self.mean is None else self.mean
        return mean.to(self.prior.dtype) * self.factor


def chunk_loop(
    loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    *,
    logit_scale: float,
    factor: float,
    needs: Needs,
    weight_dtype: torch.dtype,
    chunk_rows: int | None,
) -> RowsAndGradients:
    """Terms and gradients of rows hidden [n, d] under weight [K, d] and bias [K], all of one dtype, with
    labels [n].

    Memory beyond the results: chunk_rows × K logits and, in half precision, one tile of float32.
    """
    (n, width), classes, exact = hidden.shape, weight.shape[0], exact_dtype(hidden.dtype)
    needs_hidden, needs_weight, needs_bias = needs
    rider = PriorRow.of(loss, labels, row_weight, classes, hidden) if loss.rides_along and n else None
    rows = chunk_rows or default_chunk_rows(n, width, hidden.dtype, needs_weight and weight_dtype != exact_dtype(weight_dtype))
    nll, label_logit, smoothing_term = (hidden.new_zeros(n, dtype=exact) for _ in range(3))
    grad_hidden = hidden.new_empty((n, width), dtype=exact) if needs_hidden else None
    # Empty, because the first chunk overwrites it: clearing [K, d] costs as much as 1 % of the matmuls.
    grad_weight = weight.new_empty((classes, width), dtype=weight_dtype) if needs_weight else None
    grad_bias = hidden.new_zeros(classes, dtype=exact) if needs_bias else None
    offset = hidden.new_zeros(1) if bias is None else bias

    def logits_of(some: Tensor, out: Tensor | None = None) -> Tensor:
        beta = 0.0 if bias is None else logit_scale
        return torch.addmm(offset, some, weight.t(), beta=beta, alpha=logit_scale, out=out)

    def logits_again(chunk: Tensor, some: Tensor) -> Tensor:
        return logits_of(chunk[some]).to(exact)

    buffer = hidden.new_empty((_aligned(min(rows, n) + (rider is not None), hidden.dtype), classes))
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        used, chunk = stop - start, hidden[start:stop]
        nll[start:stop], label_logit[start:stop], smoothing_term[start:stop] = loss.chunk_(
            logits_of(chunk, buffer[:used]),
            labels[start:stop],
            None if rider is None else 1 - rider.mixing[start:stop],
            None if row_weight is None else row_weight[start:stop],
            grad_bias,
            any(needs),
            partial(logits_again, chunk),
        )
        riding = rider if start == 0 else None
        if riding is not None:
            buffer[used] = riding.row
            used += 1
        if grad_hidden is not None:
            product = rows_times_weight(buffer[:used], weight)
            grad_hidden[start:stop] = product[: stop - start]
            if riding is not None:
                riding.mean = product[-1]
        if grad_weight is not None:
            partner = chunk if riding is None else torch.cat((chunk, riding.partner(hidden)))
            padding = _aligned(used, hidden.dtype) - used
            if padding:
                buffer[used : used + padding] = 0
                partner = F.pad(partner, (0, 0, 0, padding))
            accumulate(grad_weight, buffer[: used + padding], partner, factor * logit_scale, fresh=start == 0)
    if grad_weight is not None and not n:
        grad_weight.zero_()

    if rider is not None:
        prior_mean = rider.prior_mean(weight)
        expected = torch.mv(hidden.to(exact), prior_mean)
        if bias is not None:
            expected += prior_dot(rider.prior, bias)
        smoothing_term = rider.mixing * (label_logit - logit_scale * expected)
        if grad_hidden is not None:
            grad_hidden.addr_(rider.weighted_mixing, prior_mean, alpha=-1)
        if grad_bias is not None:
            grad_bias -= rider.weighted_mixing.sum() * rider.prior
    for small in (grad_hidden, grad_bias):
        if small is not None:
            small.mul_(factor * logit_scale)
    losses = nll + smoothing_term
    if loss.z_loss:
        losses += loss.z_loss * (nll + label_logit).square()
    return RowsAndGradients(losses, nll, smoothing_term, grad_hidden, grad_weight, grad_bias)


def default_chunk_rows(n: int, width: int, dtype: torch.dtype, rounds_each_chunk: bool) -> int:
    """Rows per chunk for n rows: balanced, multiples of 32; more when dW [K, width] is rounded at each chunk.

    Beyond the usual size a chunk stays no larger than dW itself: at most `width` rows.
    """
    rows = CHUNK_ROWS[dtype.itemsize]
    if rounds_each_chunk:
        rows = max(rows, min(-(-n // MAX_HALF_CHUNKS), width))
    balanced = -(-n // max(1, -(-n // rows)))
    return max(32, -(-balanced // 32) * 32)


def _aligned(rows: int, dtype: torch.dtype) -> int:
    """`rows` as inner dimension of dW: in half precision a multiple of 32; others took 20 % longer (measured)."""
    return -(-rows // 32) * 32 if dtype.itemsize == 2 else rows


def rows_times_weight(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [m, K] · weight [K, d], in blocks of about 256 rows on a CPU."""
    if not rows.is_cpu:
        return torch.mm(rows, weight)
    # Measured: from 384 rows on oneDNN takes twice the time per row in bfloat16.
    product = rows.new_empty((rows.shape[0], weight.shape[1]))
    blocks = max(1, round(rows.shape[0] / 256))
    for part, out in zip(rows.tensor_split(blocks), product.tensor_split(blocks), strict=True):
        torch.mm(part, weight, out=out)
    return product


def accumulate(grad_weight: Tensor, gradient: Tensor, rows: Tensor, factor: float, *, fresh: bool) -> None:
    """grad_weight [K, d] += factor · gradientᵀ [K, m] · rows [m, d]; `fresh` overwrites."""
    if grad_weight.dtype == gradient.dtype:
        torch.addmm(grad_weight, gradient.t(), rows, beta=0.0 if fresh else 1.0, alpha=factor, out=grad_weight)
        return
    for start in range(0, grad_weight.shape[0], CLASS_BLOCK):
        classes = slice(start, start + CLASS_BLOCK)
        product = torch.mm(gradient[:, classes].t(), rows)
        if fresh:
            grad_weight[classes].copy_(product).mul_(factor)
        else:
            grad_weight[classes].add_(product, alpha=factor)
