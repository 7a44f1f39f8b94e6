"""What a chunk of logits costs and its gradient, computed in place, tile by tile.

`RowLoss` turns logits [m, K] into per-row terms and into the gradient of Σ w_i·loss_i with respect to the logits before the
soft-cap: smoothed cross entropy where ⟨u, z⟩ is known without the logits, the same where it is not (soft-cap, prior per label),
and any objective by autograd.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ls.losses import _checks
from hf_ls.losses.smoothing import Smoothing

RowObjective = Callable[[Tensor, Tensor], Tensor]
# Sees final logits [m, K], which it must not change, and labels [m], chunk by chunk in the order of the rows.
Observer = Callable[[Tensor, Tensor], None]

# 1 MiB of float32 per thread, half of a second-level cache: the passes of a softmax do not wait for memory.
TILE_ELEMENTS = 1 << 18
# On a GPU, where a launch costs more than a cache miss: 256 MiB of float32.
GPU_TILE_ELEMENTS = 1 << 26
# Logits which an observer sees at a time: 16 MiB of float32.
OBSERVED_ELEMENTS = 1 << 22
# Below this probability float32 loses digits (and then all of them), so lse cannot be read off log p_y.
SMALLEST_PROBABILITY = 1e-30


class ChunkTerms(NamedTuple):
    """Per-row parts [m], float32 or float64, unweighted and without the z-loss, in nats."""

    nll: Tensor
    label_logit: Tensor
    smoothing_term: Tensor  # left 0 where `RowLoss.rides_along`: the caller knows ⟨u, z⟩ without the logits


@dataclass(frozen=True, eq=False)
class RowLoss:
    """What a row x = h·Wᵀ + b of a head costs: lse(z) − (1−e)·z_y − e·⟨u, z⟩ + λ·lse(z)² with z = c·tanh(s·x/c), in nats.

    Args:
        smoothing: e and u.
        objective: another loss per row, objective(z [n, K], labels [n]) -> [n]; with it a row costs objective(z, y) + λ·lse(z)².
        logit_scale, softcap: s > 0, and c > 0 or None for no soft-cap.
        z_loss: λ ≥ 0.
        observer: sees the z and labels of the kept rows, a chunk at a time, before they are overwritten.

    Raises: ValueError for values out of range.
    """

    smoothing: Smoothing
    objective: RowObjective | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    observer: Observer | None = None

    def __post_init__(self) -> None:
        for name, value in (("logit_scale", self.logit_scale), ("softcap", self.softcap)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected {name} > 0, got {value}; leave it out for none")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"expected z_loss >= 0, got {self.z_loss}; 1e-4 is a usual weight")

    @property
    def rides_along(self) -> bool:
        """Whether ⟨u, z⟩ is needed and is h·(Wᵀu) + ⟨u, b⟩: one prior for all rows and no soft-cap."""
        one_prior = self.smoothing.prior is None or self.smoothing.prior.dim() == 1
        return bool(self.smoothing.epsilon) and one_prior and self.softcap is None and self.objective is None

    def chunk_(
        self,
        logits: Tensor,
        labels: Tensor,
        label_share: Tensor | None,
        row_weight: Tensor | None,
        grad_bias: Tensor | None,
        needs_gradient: bool,
        logits_of_rows: Callable[[Tensor], Tensor],
    ) -> ChunkTerms:
        """The terms of scaled logits s·x [m, K] for labels [m], which become the gradient in place.

        Args:
            label_share: [m], 1 − e_i where `rides_along`; the caller then subtracts the rank-1 w_i·e_i·u.
            grad_bias: [K] or None; the column sums of the gradient are added to it.
            needs_gradient: False leaves the content of the logits undefined.
            logits_of_rows: computes the logits of a few row numbers afresh, for rows whose p_y underflows.
        """
        if self.observer is not None:
            observe(self.observer, logits, labels, self.softcap)
        if self.objective is not None:
            return _objective_chunk_(self, self.objective, logits, labels, row_weight, grad_bias, needs_gradient)
        plain = self.softcap is None and (self.rides_along or not self.smoothing.epsilon)
        if not plain:
            return _capped_chunk_(self, logits, labels, row_weight, grad_bias)
        if logits.is_cuda and grad_bias is None and logits.dtype != torch.float64 and has_triton():
            from hf_ls.losses import _cuda

            nll, label_logit = _cuda.plain_chunk_(logits, labels, label_share, row_weight, self.z_loss, needs_gradient)
            return ChunkTerms(nll, label_logit, torch.zeros_like(nll))
        return _plain_chunk_(self, logits, labels, label_share, row_weight, grad_bias, logits_of_rows)


def observe(observer: Observer, logits: Tensor, labels: Tensor, softcap: float | None = None) -> None:
    """Show logits [m, K] and labels [m] to an observer, in `exact_dtype` and in pieces, so that its temporaries stay small."""
    rows = max(1, OBSERVED_ELEMENTS // logits.shape[1])
    for raw, y in zip(logits.detach().split(rows), labels.split(rows), strict=True):
        z = raw.to(exact_dtype(raw.dtype))
        observer(z if softcap is None else softcap * torch.tanh(z / softcap), y)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmaxes for logits of `dtype`: float32 for half precision, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@cache
def has_triton() -> bool:
    """Whether Triton can be imported, as torch for CUDA on Linux brings it."""
    return importlib.util.find_spec("triton") is not None


def prior_dot(prior: Tensor, values: Tensor) -> Tensor:
    """⟨u, v⟩ over [K]; a class without prior mass adds exactly 0, also where v is −inf."""
    return (values.to(prior.dtype).masked_fill(prior == 0, 0) * prior).sum()


def tile_rows(logits: Tensor) -> int:
    """Rows of logits [m, K] in one tile."""
    if not logits.is_cpu:
        return max(1, GPU_TILE_ELEMENTS // logits.shape[1])
    return max(1, TILE_ELEMENTS // logits.shape[1]) * torch.get_num_threads()


def tiles(logits: Tensor, *, in_place: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of a chunk and their values in `exact_dtype`; what is left in a tile goes back.

    With `in_place` the caller makes no temporaries, so that a chunk which needs no cast is one tile.
    """
    exact, step = exact_dtype(logits.dtype), tile_rows(logits)
    scratch = None
    if exact != logits.dtype:
        scratch = logits.new_empty((min(step, logits.shape[0]), logits.shape[1]), dtype=exact)
    elif in_place:
        step = logits.shape[0]
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        part = logits[rows]
        if scratch is None:
            yield rows, part
            continue
        tile = scratch[: part.shape[0]].copy_(part)
        yield rows, tile
        part.copy_(tile)


def _plain_chunk_(
    loss: RowLoss,
    logits: Tensor,
    labels: Tensor,
    label_share: Tensor | None,
    row_weight: Tensor | None,
    grad_bias: Tensor | None,
    logits_of_rows: Callable[[Tensor], Tensor],
) -> ChunkTerms:
    """Leaves w·((1 + 2λ·lse)·p − label_share·e_y): the smoothed gradient without its rank-1 prior part."""
    terms = _new_terms(logits)
    column = labels.unsqueeze(1)
    terms.label_logit.copy_(logits.gather(1, column).squeeze(1))
    label_probability = torch.empty_like(terms.nll)
    scale = row_weight
    if loss.z_loss:
        scale = torch.ones_like(terms.nll) if row_weight is None else row_weight.clone()
    waits = _checks.reading_waits(logits)
    for rows, tile in tiles(logits, in_place=not loss.z_loss):
        if loss.z_loss and scale is not None:
            scale[rows] *= 1 + 2 * loss.z_loss * tile.logsumexp(1)
        highest = tile.max(1, keepdim=True) if waits else None
        torch.softmax(tile, 1, out=tile)
        torch.gather(tile, 1, column[rows], out=label_probability[rows].unsqueeze(1))
        if highest is not None:
            # lse from the largest probability, which never underflows: no row needs a second look.
            lse = highest.values.squeeze(1) - tile.gather(1, highest.indices).squeeze(1).log()
            terms.nll[rows] = lse - terms.label_logit[rows]
        if scale is not None:
            tile.mul_(scale[rows].unsqueeze(1))
        if grad_bias is not None:
            grad_bias += tile.sum(0)
    if not waits:
        terms.nll.copy_(label_probability.log().neg_())
        lost = (label_probability < SMALLEST_PROBABILITY).nonzero().squeeze(1)
        for some in lost.split(tile_rows(logits)):
            terms.nll[some] = logits_of_rows(some).logsumexp(1) - terms.label_logit[some]
    removed = torch.ones_like(terms.nll) if label_share is None else label_share
    if row_weight is not None:
        removed = removed * row_weight
    if scale is not None:
        label_probability *= scale
    # The difference in float32, then one rounding: p_y − 1 is small for most rows of a trained model.
    # By flat position, since scatter_ on half precision allocates a float32 copy of the chunk.
    position = torch.arange(0, logits.numel(), logits.shape[1], device=logits.device) + labels
    logits.view(-1).index_copy_(0, position, (label_probability - removed).to(logits.dtype))
    if grad_bias is not None:
        grad_bias.index_add_(0, labels, -removed)
    return terms


def _capped_chunk_(
    loss: RowLoss, logits: Tensor, labels: Tensor, row_weight: Tensor | None, grad_bias: Tensor | None
) -> ChunkTerms:
    """With real ⟨u, z⟩ passes: leaves w·((1 + 2λ·lse)·p − (1−e)·e_y − e·u)·(1 − tanh²(x/c))."""
    terms = _new_terms(logits)
    for rows, tile in tiles(logits):
        y = labels[rows]
        column = y.unsqueeze(1)
        slope = None
        if loss.softcap is not None:
            tile.div_(loss.softcap).tanh_()
            slope = tile.square().neg_().add_(1)
            tile.mul_(loss.softcap)
        label_logit = tile.gather(1, column).squeeze(1)
        lse = tile.logsumexp(1)
        mixing, prior, term = torch.zeros_like(lse), None, torch.zeros_like(lse)
        if loss.smoothing.epsilon:
            prior = loss.smoothing.prior_for(y, tile.shape[1], tile.dtype)
            mixing = loss.smoothing.mixing(y, prior)
            # 0·(−inf) is NaN, but a class without prior mass must add exactly 0.
            term = mixing * (label_logit - (tile.masked_fill(prior == 0, 0) * prior).sum(1))
        _store(terms, rows, lse - label_logit, label_logit, term)
        torch.softmax(tile, 1, out=tile)
        if loss.z_loss:
            tile.mul_((1 + 2 * loss.z_loss * lse).unsqueeze(1))
        tile.scatter_add_(1, column, (mixing - 1).unsqueeze(1))
        if prior is not None:
            tile.sub_(mixing.unsqueeze(1) * prior)
        if slope is not None:
            tile.mul_(slope)
        _weigh(tile, rows, row_weight, grad_bias)
    return terms


def _objective_chunk_(
    loss: RowLoss,
    objective: RowObjective,
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    grad_bias: Tensor | None,
    needs_gradient: bool,
) -> ChunkTerms:
    """Any objective, differentiated by autograd inside each tile; its `smoothing_term` is its loss − nll.

    Raises: ValueError when the objective returns another shape, or losses without a gradient.
    """
    terms = _new_terms(logits)
    for rows, tile in tiles(logits):
        y = labels[rows]
        gradient = None
        with torch.set_grad_enabled(needs_gradient):
            raw = tile.detach().requires_grad_(needs_gradient)
            z = raw if loss.softcap is None else loss.softcap * torch.tanh(raw / loss.softcap)
            losses = objective(z, y)
            if losses.shape != y.shape or (needs_gradient and not losses.requires_grad):
                got = f"{tuple(losses.shape)}{'' if losses.requires_grad else ' without a gradient'}"
                raise ValueError(
                    f"expected differentiable losses {tuple(y.shape)} from the objective, got {got}; "
                    "return one loss per row, computed from the logits"
                )
            if needs_gradient:
                total = losses + loss.z_loss * z.logsumexp(1).square() if loss.z_loss else losses
                (gradient,) = torch.autograd.grad(total, raw, torch.ones_like(total))
        z, losses = z.detach(), losses.detach()
        label_logit = z.gather(1, y.unsqueeze(1)).squeeze(1)
        nll = z.logsumexp(1) - label_logit
        _store(terms, rows, nll, label_logit, losses - nll)
        if gradient is not None:
            _weigh(tile.copy_(gradient), rows, row_weight, grad_bias)
    return terms


def _new_terms(logits: Tensor) -> ChunkTerms:
    terms = logits.new_zeros((3, logits.shape[0]), dtype=exact_dtype(logits.dtype))
    return ChunkTerms(*terms.unbind())


def _store(terms: ChunkTerms, rows: slice, nll: Tensor, label_logit: Tensor, smoothing_term: Tensor) -> None:
    for whole, part in zip(terms, (nll, label_logit, smoothing_term), strict=True):
        whole[rows] = part


def _weigh(tile: Tensor, rows: slice, row_weight: Tensor | None, grad_bias: Tensor | None) -> None:
    if row_weight is not None:
        tile.mul_(row_weight[rows].unsqueeze(1))
    if grad_bias is not None:
        grad_bias += tile.sum(0)
