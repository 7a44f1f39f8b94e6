"""The gradients of a chunk of logits from few of its columns, and a certificate of what that costs.

A trained model puts nearly all probability into few classes. The gradient of a chunk is G = a·p − r·e_y [m, K], a and r per row,
without the prior, which the chunk loop takes apart. The columns with the most energy Σ_i G_ij², and those of the labels, are
multiplied as they are; in all others G = a·p is replaced by m_i·t_j: what each row dropped times the mean dropped distribution of
the chunk, both exact in sum. That is of rank one, so the tails of many chunks share two small matmuls, as the prior rides along.

To drop p − q instead, as filters for a plain cross entropy do, would delete the smoothing term itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Columns are dropped until their energy is (tolerance / MARGIN)² of all. On real states the error of dH was 3.3 to 3.6 times the
# root of the dropped share, that of dW 1.5 times.
MARGIN = 5.0
# Where more of the columns would stay, the whole matmuls are as fast.
LARGEST_SHARE = 0.5
# Columns gathered at a time, rows of a chunk, and tails kept before they are added: together less memory than today's logits.
BLOCK_COLUMNS = 2048
SKIPPING_ROWS = 256
MOST_TAILS = 16
# What the certificate looks at: rows of dH and of dW, computed in full.
SAMPLED_ROWS = 16
SAMPLED_CLASSES = 64

# Columns are ordered by quarter octaves of their energy, which costs less than to sort them.
_LEVELS_PER_OCTAVE = 4
_LEAST_ENERGY = 1e-37
_ENERGY_ROWS = 16


class GradientCertificate(NamedTuple):
    """What skipping columns has dropped in one call, and the error which that makes.

    The errors are of samples computed in full: ‖error‖ / ‖gradient‖ over rows of dH, and over the whole of dW, estimated from
    64 of its rows. 0 is exact; the arithmetic's own rounding is not in it.
    """

    kept_columns: float  # mean share of the columns in the two gradient matmuls, 0 to 1; 1 where all were taken
    largest_dropped_mass: float  # of a row, 0 to 1 (of its weight)
    mean_dropped_mass: float
    hidden_error: float
    weight_error: float

    @property
    def error(self) -> float:
        """The larger of the two errors, to be compared with the tolerance."""
        return max(self.hidden_error, self.weight_error)


class ColumnSkipping:
    """Adds the gradients of chunk after chunk to dH [n, d] and dW [K, d], either of which may be None.

    Args:
        tolerance: the relative error of the gradients to stay below, e.g. 5e-3.
        alpha: factor of dW; dH gets its own factor from the caller.
    """

    def __init__(
        self, tolerance: float, weight: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None, n: int, alpha: float
    ) -> None:
        (self.classes, width), self.weight, self.alpha, self.n = weight.shape, weight, alpha, n
        self.grad_hidden, self.grad_weight = grad_hidden, grad_weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.budget = (tolerance / MARGIN) ** 2
        self.on = True
        self.kept = self.rows = 0.0
        self.largest = self.dropped = self.weights = 0.0
        self._tails: list[tuple[Tensor, Tensor, slice | None, Tensor | None]] = []  # t [K], part of dW [d], rows, m
        self._sampled_rows = ((torch.arange(SAMPLED_ROWS, device=weight.device) + 0.5) * n / SAMPLED_ROWS).long().unique()
        step = max(1, self.classes // SAMPLED_CLASSES)
        self._sampled_classes = torch.arange(step // 2, self.classes, step, device=weight.device)
        self._row_errors: list[Tensor] = []
        self._class_error = weight.new_zeros((len(self._sampled_classes), width), dtype=self.dtype)

    def add(self, start: int, gradient: Tensor, hidden: Tensor, labels: Tensor, row_sum: Tensor, row_scale: Tensor) -> bool:
        """Add a chunk of rows from `start` on: G [m, K], hidden [m, d], labels [m], Σ_j G_ij [m] and a [m].

        False, with nothing added, where too many columns would stay; the rest of the call then takes all of them.
        """
        size = len(gradient)
        self.rows += size
        columns = self._columns(gradient, labels) if self.on else None
        if columns is None:
            self.on = False
            self.kept += size
            return False
        self.kept += size * len(columns) / self.classes
        rows, dropped = slice(start, start + size), row_sum.clone()
        product = None if self.grad_hidden is None else self.grad_hidden[rows].zero_()
        for some in columns.split(BLOCK_COLUMNS):
            part = gradient.index_select(1, some)
            dropped -= part.sum(1, dtype=self.dtype)
            if product is not None:
                product += torch.mm(part, self.weight.index_select(0, some))
            if self.grad_weight is not None:
                found = torch.mm(part.t(), hidden).to(self.grad_weight.dtype)
                self.grad_weight.index_add_(0, some, found, alpha=self.alpha)
        tail = gradient.sum(0, dtype=self.dtype).index_fill_(0, columns, 0)
        total = tail.sum()
        if total > 0:
            tail /= total
        share = dropped / row_scale.clamp_min(torch.finfo(self.dtype).tiny)
        self.largest = max(self.largest, float(share.max()))
        self.dropped, self.weights = self.dropped + float(dropped.sum()), self.weights + float(row_scale.sum())
        lost = torch.mv(hidden.t().to(self.dtype), dropped)
        self._sample(start, gradient, hidden, columns, tail, dropped, lost)
        self._tails.append((tail, self.alpha * lost, rows, dropped))
        if len(self._tails) == MOST_TAILS:
            self._add_tails()
        return True

    def finish(self, prior: Tensor | None = None, partner: Tensor | None = None) -> GradientCertificate:
        """Add what is left, and to dW the rank-1 prior [K] ⊗ partner [d]; then look at the samples."""
        if prior is not None and partner is not None:
            self._tails.append((prior.to(self.dtype), partner, None, None))
        self._add_tails()
        hidden_error = weight_error = 0.0
        if self._row_errors and self.grad_hidden is not None:
            missed = torch.mm(torch.cat(self._row_errors).to(self.weight.dtype), self.weight)
            hidden_error = _ratio(missed, self.grad_hidden[self._sampled_rows])
        if self.grad_weight is not None:
            share = len(self._sampled_classes) / self.classes
            weight_error = _ratio(self._class_error, self.grad_weight) / share**0.5
        mean = self.dropped / self.weights if self.weights else 0.0
        return GradientCertificate(self.kept / max(1, self.rows), self.largest, mean, hidden_error, weight_error)

    def _columns(self, gradient: Tensor, labels: Tensor) -> Tensor | None:
        """The columns to keep, in order; None for all."""
        energy = _column_energy(gradient, self.dtype)
        total = energy.sum()
        if not bool(torch.isfinite(total)):
            return None  # the caller refuses such losses
        level = energy.clamp_min(_LEAST_ENERGY).log2_().mul_(_LEVELS_PER_OCTAVE).floor_().long()
        level -= level.min()
        up_to = torch.bincount(level, weights=energy).cumsum(0)
        kept = level >= (up_to <= self.budget * total).sum()
        kept[labels] = True
        columns = kept.nonzero().squeeze(1)
        return columns if len(columns) <= LARGEST_SHARE * self.classes else None

    def _sample(
        self, start: int, gradient: Tensor, hidden: Tensor, columns: Tensor, tail: Tensor, dropped: Tensor, lost: Tensor
    ) -> None:
        """Keep what this chunk misses in the sampled rows of dH and of dW."""
        some = self._sampled_rows
        some = some[(some >= start) & (some < start + len(gradient))] - start
        if self.grad_hidden is not None and len(some):
            missed = gradient[some].to(self.dtype).index_fill_(1, columns, 0)
            self._row_errors.append(missed.addr_(dropped[some], tail, alpha=-1))
        if self.grad_weight is not None:
            chosen = self._sampled_classes
            exact = torch.mm(gradient.index_select(1, chosen).t().to(self.dtype), hidden.to(self.dtype))
            is_kept = torch.isin(chosen, columns, assume_unique=True).unsqueeze(1)
            missed = exact.addr_(tail[chosen], lost, alpha=-1).masked_fill_(is_kept, 0)
            self._class_error.add_(missed, alpha=self.alpha)

    def _add_tails(self) -> None:
        if not self._tails:
            return
        tails = torch.stack([tail for tail, _, _, _ in self._tails]).to(self.weight.dtype)
        if self.grad_hidden is not None:
            means = torch.mm(tails, self.weight).to(self.dtype)
            for mean, (_, _, rows, dropped) in zip(means, self._tails, strict=True):
                if rows is not None:
                    self.grad_hidden[rows].addr_(dropped, mean)
        if self.grad_weight is not None:
            parts = torch.stack([part for _, part, _, _ in self._tails]).to(self.grad_weight.dtype)
            self.grad_weight.addmm_(tails.t().to(self.grad_weight.dtype), parts)
        self._tails.clear()


def _column_energy(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_i G_ij² [K] of G [m, K], by tiles which stay in the cache: a norm over rows takes eight times as long."""
    energy, tile = gradient.new_zeros(gradient.shape[1], dtype=dtype), None
    for part in gradient.split(_ENERGY_ROWS):
        tile = torch.mul(part, part, out=tile) if tile is not None and len(tile) == len(part) else part * part
        energy += tile.sum(0, dtype=dtype)
    return energy


def _ratio(error: Tensor, gradient: Tensor) -> float:
    """‖error‖ / ‖gradient‖, 0 without an error."""
    missed = float(torch.linalg.vector_norm(error, dtype=torch.float32))
    return missed / float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) if missed else 0.0
