"""The chunk loop of the linear-head loss: three matmuls per chunk of the rows which it keeps, and one buffer of logits.

Ignored rows are left out. In training on CUDA their number is known to the device alone: there all rows are put in order, the
kept ones first, and the number travels to the host while the first chunk runs, so that no later chunk has ignored rows.

The rank-1 part: ⟨u, z_i⟩ = s·(h_i·(Wᵀu) + ⟨u, b⟩), so dH_i gets −w_i·e_i·Wᵀu and dW gets −u ⊗ Σ w_i·e_i·h_i.
Both come from the prior as one more row under the first chunk: [G; u]·W ends in Wᵀu, and the product
[G; u]ᵀ·[H; −Σ w_i·e_i·h_i] contains the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls.losses import _checks
from hf_ls.losses._rows import RowLoss, exact_dtype, prior_dot
from hf_ls.losses._skipping import SKIPPING_ROWS, GradientCertificate, Skipping, Thresholds

# Rows per chunk by bytes per element: fewer starve the matmuls (each chunk reads W), more cost memory.
CHUNK_ROWS = {2: 512, 4: 384, 8: 192}
# On CUDA each chunk also reads and writes all of a float32 dW: with 512 rows that took longer than the matmuls save.
CUDA_CHUNK_ROWS = 4096
# On a CPU a half-precision dW is rounded at each chunk, so long batches take longer chunks instead of more roundings.
MAX_HALF_CHUNKS = 16
# Classes of a matmul per thread on a CPU: over all at once logits take 1.2 to 1.5 times as long (MKL on AMD EPYC, measured).
FORWARD_COLUMNS = 512
# Half-precision products for a float32 dW pass through a buffer of this many classes.
CLASS_BLOCK = 16384

# The first chunk where the number of rows is still unknown: enough work for a host to launch the next one meanwhile.
_FIRST_ROWS = 512

Needs = tuple[bool, bool, bool]  # gradients of (hidden, weight, bias)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """n rows chosen from a flat batch of N: the kept ones, and where `mask` is given, ignored ones after them."""

    n: int
    order: Tensor | None  # [n] positions in the batch; None: all as they are
    mask: Tensor | None  # [n] True where kept; None: everywhere
    count: Callable[[], int]  # how many are kept; may wait for the device

    @classmethod
    def of(cls, is_kept: Tensor, *, wait: bool = False) -> KeptRows:
        """The rows of a mask [N]; `wait` reads their number at once."""
        total = is_kept.numel()
        if total and not wait and _checks.reading_waits(is_kept):
            # Stable, so that the kept rows stay in the order of the batch.
            order = torch.argsort(is_kept.to(torch.uint8), descending=True, stable=True)
            return cls(total, order, is_kept[order], later(is_kept.sum()))
        if bool(is_kept.all()):
            return cls(total, None, None, lambda: total)
        order = is_kept.nonzero().squeeze(1)
        return cls(len(order), order, None, lambda: len(order))

    def gather(self, values: Tensor) -> Tensor:
        """The chosen rows [n, ...] of values [N, ...]; an ignored label becomes class 0."""
        chosen = values if self.order is None else values.index_select(0, self.order)
        return chosen if self.mask is None or chosen.dim() > 1 else chosen.masked_fill(~self.mask, 0)

    def without_ignored(self, chosen: Tensor) -> Tensor:
        """Chosen rows [n, d] with 0 in the ignored ones, so that nothing in them reaches a sum."""
        return chosen if self.mask is None else chosen.masked_fill(~self.mask.unsqueeze(1), 0)

    def total(self, row_weight: Tensor | None) -> Tensor | int:
        """What a mean divides by: the number of kept rows, or the sum of their weights."""
        if row_weight is not None:
            return row_weight.sum()
        return self.n if self.mask is None else self.mask.sum()

    def scatter(self, values: Tensor, total: int) -> Tensor:
        """Values [n, ...] at their places in [N, ...], 0 at ignored ones."""
        if self.order is None:
            return values
        return values.new_zeros((total, *values.shape[1:])).index_copy_(0, self.order, values)


class RowsAndGradients(NamedTuple):
    """What an engine makes of n rows: unweighted parts in nats, and the gradients of factor·Σ w_i·loss_i.

    Where only the device knows the factor, the gradient of the weight is still without it (`scaled_sum`).
    """

    losses: Tensor  # [n], with the z-loss
    nll: Tensor  # [n]
    smoothing_term: Tensor  # [n]
    grad_hidden: Tensor | None  # [n, d], float32 or float64
    grad_weight: Tensor | None  # [K, d], dtype of the parameter
    grad_bias: Tensor | None  # [K], float32 or float64
    certificate: GradientCertificate | None = None  # of gradients made with a tolerance


@dataclass
class PriorRow:
    """The prior u as one more row under the first chunk, and its partner row under the hidden states."""

    prior: Tensor  # u [K]
    mixing: Tensor  # e_i [n]
    weighted_mixing: Tensor  # w_i·e_i [n]
    row: Tensor  # [K], u = row·factor, in the dtype of the matmuls
    factor: Tensor  # a scalar
    mean: Tensor | None = None  # Wᵀ·row [d], once a matmul has made it

    @classmethod
    def of(cls, loss: RowLoss, labels: Tensor, row_weight: Tensor | None, classes: int, hidden: Tensor) -> PriorRow:
        """The prior of a `RowLoss.rides_along` for rows hidden [n, d] with labels [n] and weights [n]."""
        prior = loss.smoothing.prior_for(labels, classes, exact_dtype(hidden.dtype))
        mixing = loss.smoothing.mixing(labels, prior)
        # A power of two as largest entry keeps the uniform prior exact in any dtype; about √(max u) keeps
        # both Wᵀ·row and the partner within the range of float16.
        if loss.smoothing.prior is None:
            peak, top = prior[0], torch.full_like(prior[0], 2.0 ** round(math.log2(1 / classes) / 2))
        else:
            peak = prior.max()
            top = torch.exp2((peak.log2() / 2).round())
        row = prior * (top / peak)
        weighted_mixing = mixing if row_weight is None else mixing * row_weight
        return cls(prior, mixing, weighted_mixing, row.to(hidden.dtype), peak / top)

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
    rows: KeptRows,
    factor: float | Tensor,
    needs: Needs,
    weight_dtype: torch.dtype,
    chunk_rows: int | None,
    tolerance: float | None = None,
    thresholds: Thresholds | None = None,
) -> RowsAndGradients:
    """Terms and gradients of rows hidden [n, d] under weight [K, d] and bias [K], all of one dtype, with
    labels [n].

    tolerance: of the gradients' relative error, for `_skipping`; None for exact ones. The terms are exact either way. thresholds:
    where to begin, of an earlier certificate.
    Memory beyond the results: chunk_rows × K logits and, in half precision, one tile of float32; on CUDA a float32 dW.
    """
    (n, width), classes, exact, scale = hidden.shape, weight.shape[0], exact_dtype(hidden.dtype), loss.logit_scale
    needs_hidden, needs_weight, needs_bias = needs
    if row_weight is None and needs_bias and rows.mask is not None:
        row_weight = rows.mask.to(exact)  # ignored rows add nothing to dW, since their hidden states are 0, but to db
    rider = PriorRow.of(loss, labels, row_weight, classes, hidden) if loss.rides_along and n else None
    if not (n and (needs_hidden or needs_weight) and can_skip(loss, hidden)):
        tolerance = None
    skips = tolerance is not None
    # In half precision each addition to dW rounds, and skipping makes more of them.
    sum_dtype = exact if skips or _checks.reading_waits(hidden) else weight_dtype
    rounds = needs_weight and sum_dtype != exact
    size = chunk_rows or default_chunk_rows(n, width, hidden.dtype, rounds, cuda=hidden.is_cuda, skips=skips)
    nll, label_logit, smoothing_term = (hidden.new_zeros(n, dtype=exact) for _ in range(3))
    grad_hidden = hidden.new_empty((n, width), dtype=exact) if needs_hidden else None
    # Empty, because the first chunk overwrites it: clearing [K, d] costs as much as 1 % of the matmuls.
    grad_weight = weight.new_empty((classes, width), dtype=sum_dtype) if needs_weight else None
    grad_bias = hidden.new_zeros(classes, dtype=exact) if needs_bias else None
    # A factor which only the device knows multiplies the sums at the end.
    alpha = scale * factor if isinstance(factor, float) else scale
    skipping = None
    if tolerance is not None:
        prior = None if rider is None else (rider.prior, rider.weighted_mixing)
        skipping = Skipping(tolerance, thresholds, weight, hidden, grad_hidden, grad_weight, alpha, prior)

    def logits_again(chunk: Tensor, some: Tensor) -> Tensor:
        return logits_(hidden.new_empty((len(some), classes)), chunk[some], weight, bias, scale).to(exact)

    buffer = hidden.new_empty((_aligned(min(size, n) + (rider is not None), hidden.dtype), classes))
    for start, stop in chunks(rows, size):
        used, chunk = stop - start, hidden[start:stop]
        nll[start:stop], label_logit[start:stop], smoothing_term[start:stop] = loss.chunk_(
            logits_(buffer[:used], chunk, weight, bias, scale),
            labels[start:stop],
            None if rider is None else 1 - rider.mixing[start:stop],
            None if row_weight is None else row_weight[start:stop],
            grad_bias,
            any(needs),
            partial(logits_again, chunk),
        )
        if skipping is not None:
            mass = (1 + 2 * loss.z_loss * (nll + label_logit)[start:stop]).to(exact)
            mass = mass if row_weight is None else mass * row_weight[start:stop]
            if skipping.add(start, buffer[:used], chunk, labels[start:stop], mass):
                continue
        riding = rider if start == 0 and skipping is None else None
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
            accumulate(grad_weight, buffer[: used + padding], partner, alpha, fresh=start == 0 and skipping is None)
    if grad_weight is not None and not n:
        grad_weight.zero_()

    if rider is not None:
        prior_mean = rider.prior_mean(weight)
        expected = torch.mv(hidden.to(exact), prior_mean)
        if bias is not None:
            expected += prior_dot(rider.prior, bias)
        smoothing_term = rider.mixing * (label_logit - scale * expected)
        if grad_hidden is not None:
            grad_hidden.addr_(rider.weighted_mixing, prior_mean, alpha=-1)
        if grad_bias is not None:
            grad_bias -= rider.weighted_mixing.sum() * rider.prior
    certificate = None if skipping is None else skipping.finish()
    for small in (grad_hidden, grad_bias):
        if small is not None:
            small.mul_(factor * scale)
    losses = nll + smoothing_term
    if loss.z_loss:
        losses += loss.z_loss * (nll + label_logit).square()
    if rows.mask is not None:
        ignored = ~rows.mask
        losses, nll, smoothing_term = (part.masked_fill_(ignored, 0) for part in (losses, nll, smoothing_term))
        if grad_hidden is not None:
            grad_hidden.masked_fill_(ignored.unsqueeze(1), 0)
    if grad_weight is not None:
        grad_weight = in_parameter_dtype(grad_weight, factor, weight_dtype)
    return RowsAndGradients(losses, nll, smoothing_term, grad_hidden, grad_weight, grad_bias, certificate)


def can_skip(loss: RowLoss, hidden: Tensor) -> bool:
    """Whether columns may be skipped: the plain smoothed cross entropy on a CPU; float16 cannot hold the tails of p.

    With a soft-cap each column has a slope of its own, so that its tail is not of rank one. On CUDA to choose the entries would
    wait for the device in every chunk; a fixed number of whole columns needs no waiting, but of SmolLM2-135M 40 % of them still
    left an error of 0.007 in dH (measured, 1,024 rows), which is too many to gain from.
    """
    plain = loss.objective is None and loss.softcap is None and (loss.rides_along or not loss.smoothing.epsilon)
    return plain and hidden.is_cpu and hidden.dtype != torch.float16


def in_parameter_dtype(grad_weight: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A sum [K, d] in the dtype of its parameter; one whose factor only the device knows stays a sum, for `scaled_sum`."""
    return grad_weight.to(dtype) if isinstance(factor, float) else grad_weight


def scaled_sum(grad_weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · sum [K, d] in the dtype of its parameter, in one pass: the backward's factor costs no pass of its own."""
    return torch.mul(
        grad_weight, factor, out=grad_weight if grad_weight.dtype == dtype else grad_weight.new_empty((0,), dtype=dtype)
    )


def chunks(rows: KeptRows, size: int) -> Iterator[tuple[int, int]]:
    """Where each chunk of at most `size` rows starts and stops.

    Where the number of kept rows is still on its way from the device, a first chunk of a quarter of the rows gives it time:
    it may hold ignored rows, the others have none.
    """
    start, stop = 0, rows.n
    if rows.mask is not None:
        first = min(size, max(_FIRST_ROWS, -(-rows.n // 128) * 32), rows.n)
        yield 0, first
        if first == rows.n:
            return
        start, stop = first, rows.count()
        left = max(0, stop - start)
        size = min(size, max(32, -(-left // max(1, -(-left // size)) // 32) * 32))
    for begin in range(start, stop, size):
        yield begin, min(stop, begin + size)


def later(number: Tensor) -> Callable[[], int]:
    """A number on a device, sent to the host now and waited for when it is needed."""
    if not number.is_cuda:
        return lambda: int(number)
    host = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def value() -> int:
        arrived.synchronize()
        return int(host)

    return value


def default_chunk_rows(
    n: int, width: int, dtype: torch.dtype, rounds_each_chunk: bool, *, cuda: bool = False, skips: bool = False
) -> int:
    """Rows per chunk for n rows: balanced, multiples of 32; more when dW [K, width] is rounded at each chunk.

    Beyond the usual size a chunk stays no larger than dW itself: at most `width` rows.
    """
    rows = CUDA_CHUNK_ROWS if cuda else CHUNK_ROWS[dtype.itemsize]
    rows = min(rows, SKIPPING_ROWS) if skips else rows
    if rounds_each_chunk:
        rows = max(rows, min(-(-n // MAX_HALF_CHUNKS), width))
    balanced = -(-n // max(1, -(-n // rows)))
    return max(32, -(-balanced // 32) * 32)


def _aligned(rows: int, dtype: torch.dtype) -> int:
    """`rows` as inner dimension of dW: in half precision a multiple of 32; others took 20 % longer (measured)."""
    return -(-rows // 32) * 32 if dtype.itemsize == 2 else rows


def logits_(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale·(rows [m, d] · weightᵀ [d, K] + bias [K]) into [m, K]."""
    offset, beta = (out.new_zeros(1), 0.0) if bias is None else (bias, scale)
    step = FORWARD_COLUMNS * torch.get_num_threads()
    if not out.is_cpu or out.dtype.itemsize == 2 or step >= weight.shape[0]:
        return torch.addmm(offset, rows, weight.t(), beta=beta, alpha=scale, out=out)
    for start in range(0, weight.shape[0], step):
        some = slice(start, start + step)
        torch.addmm(offset if bias is None else offset[some], rows, weight[some].t(), beta=beta, alpha=scale, out=out[:, some])
    return out


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
    if gradient.is_cuda:
        # The matmul itself adds to a float32 sum: no rounding between the chunks and no pass over [K, d] beside it.
        beta = 0.0 if fresh else 1.0
        torch.addmm(grad_weight, gradient.t(), rows, beta=beta, alpha=factor, out_dtype=grad_weight.dtype, out=grad_weight)
        return
    for start in range(0, grad_weight.shape[0], CLASS_BLOCK):
        classes = slice(start, start + CLASS_BLOCK)
        product = torch.mm(gradient[:, classes].t(), rows)
        if fresh:
            grad_weight[classes].copy_(product).mul_(factor)
        else:
            grad_weight[classes].add_(product, alpha=factor)
