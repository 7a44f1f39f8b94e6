"""The gradients of a chunk of logits from few of its columns, and a certificate of what that costs.

A trained model puts nearly all probability into few classes. The gradient of a chunk is G = a·p − r·e_y [m, K], a and r per row,
without the prior, which the chunk loop takes apart. The columns with the most energy Σ_i G_ij², and those of the labels, are
multiplied as they are; in all others G = a·p is replaced by m_i·t_j: what each row dropped times the mean dropped distribution of
the chunk, both exact in sum. That is of rank one, so the tails of many chunks share two small matmuls, as the prior rides along.

To drop p − q instead, as filters for a plain cross entropy do, would delete the smoothing term itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Columns are dropped until their energy is (tolerance / MARGIN)² of all: a first guess, good for states of SmolLM2-135M. What the
# first chunk would miss by it is then measured, and the guess moved until that is between ENOUGH and 1 tolerance.
MARGIN = 5.0
ENOUGH, AIM, TRIES = 0.6, 0.9, 6
# Where more of the columns would stay, the whole matmuls are as fast.
LARGEST_SHARE = 0.5
# Columns gathered at a time, rows of a chunk, and tails kept before they are added: together less memory than today's logits.
BLOCK_COLUMNS = 2048
SKIPPING_ROWS = 256
MOST_TAILS = 16
# Random signs ω by which errors are measured: E‖A·ω‖² = ‖A‖² over all rows of A, at the cost of a few columns.
PROBES = 8

# Columns are ordered by quarter octaves of their energy, which costs less than to sort them.
_LEVELS_PER_OCTAVE = 4
_LEAST_ENERGY = 1e-37
_ENERGY_ROWS = 16


class GradientCertificate(NamedTuple):
    """What skipping columns has dropped in one call, and the error which that makes.

    The errors are ‖error‖ / ‖gradient‖ over the whole of dH and of dW, measured along random directions (Hutchinson 1989); 0 is
    exact. The rounding of the arithmetic is not in them.
    """

    kept_columns: float  # mean share of the columns in the two gradient matmuls, 0 to 1; 1 where all were taken
    largest_dropped_mass: float  # of a row, 0 to 1
    mean_dropped_mass: float
    hidden_error: float
    weight_error: float

    @property
    def error(self) -> float:
        """The larger of the two errors, to be compared with the tolerance."""
        return max(self.hidden_error, self.weight_error)


class Tail(NamedTuple):
    """What a chunk leaves out of its matmuls: the rank-1 m ⊗ t which stands for it, and what that misses along the probes."""

    mean: Tensor  # t [K], 0 at the kept columns
    mass: Tensor  # m [m]
    rows_missed: Tensor  # [m, PROBES], of dH
    classes_missed: Tensor  # [PROBES, K], of dW


class ColumnSkipping:
    """Adds the gradients of chunk after chunk to dH [n, d] and dW [K, d], either of which may be None.

    Args:
        tolerance: the relative error of the gradients to stay below, e.g. 5e-3.
        alpha: factor of dW; dH gets its own factor from the caller.
        prior: u [K] and what each row takes of it, w_i·e_i [n], or None; the caller takes it from dH, `finish` from dW.
    """

    def __init__(
        self,
        tolerance: float,
        weight: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        alpha: float,
        prior: tuple[Tensor, Tensor] | None,
    ) -> None:
        (self.classes, width), self.weight, self.alpha, self.prior = weight.shape, weight, alpha, prior
        self.grad_hidden, self.grad_weight = grad_hidden, grad_weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.tolerance, self.budget = tolerance, (tolerance / MARGIN) ** 2
        self.on, self.calibrated = True, False
        self.rows = 0
        self.kept = self.largest = self.dropped = self.total = self.rows_missed = 0.0
        # t [K], m [m], the rows, and what t is multiplied by in dW [d]
        self._tails: list[tuple[Tensor, Tensor, slice, Tensor]] = []
        signs = torch.randint(2, (width, PROBES), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self._probes = signs.to(weight)
        # A product with few columns is several times as fast with those as rows.
        self._weight_probes = self._probes.t() @ weight.t()
        self._classes_missed = weight.new_zeros((PROBES, self.classes), dtype=self.dtype)

    def add(self, start: int, gradient: Tensor, hidden: Tensor, labels: Tensor, row_scale: Tensor) -> bool:
        """Add a chunk of rows from `start` on: G [m, K], hidden [m, d], labels [m], and a [m], the mass of a row.

        False, with nothing added, where too many columns would stay; the rest of the call then takes all of them.
        """
        rows = slice(start, start + len(gradient))
        self.rows += len(gradient)
        found = self._choose(rows, gradient, hidden, labels) if self.on else None
        if found is None:
            self.on = False
            self.kept += len(gradient)
            return False
        columns, tail = found
        self.kept += len(gradient) * len(columns) / self.classes
        product = None if self.grad_hidden is None else self.grad_hidden[rows].zero_()
        for some in columns.split(BLOCK_COLUMNS):
            part = gradient.index_select(1, some)
            if product is not None:
                product += torch.mm(part, self.weight.index_select(0, some))
            if self.grad_weight is not None:
                made = torch.mm(part.t(), hidden).to(self.grad_weight.dtype)
                self.grad_weight.index_add_(0, some, made, alpha=self.alpha)
        share = tail.mass / row_scale.clamp_min(torch.finfo(self.dtype).tiny)
        self.largest = max(self.largest, float(share.max()))
        self.dropped, self.total = self.dropped + float(tail.mass.sum()), self.total + float(row_scale.sum())
        self.rows_missed += float(tail.rows_missed.square().sum())
        self._classes_missed += tail.classes_missed
        self._tails.append((tail.mean, tail.mass, rows, torch.mv(hidden.t().to(self.dtype), tail.mass)))
        if len(self._tails) == MOST_TAILS:
            self._add_tails()
        return True

    def finish(self, hidden: Tensor) -> GradientCertificate:
        """Add what is left, and the prior's part of dW for hidden [n, d]; then compare what was missed with what was made."""
        self._add_tails()
        if self.grad_weight is not None and self.prior is not None:
            prior, mixing = self.prior
            partner = torch.mv(hidden.t().to(mixing.dtype), mixing)
            self.grad_weight.addr_(prior.to(self.grad_weight.dtype), partner.to(self.grad_weight.dtype), alpha=-self.alpha)
        hidden_error = weight_error = 0.0
        if self.grad_hidden is not None:
            hidden_error = _ratio((self.rows_missed / PROBES) ** 0.5, _norm(self.grad_hidden))
        if self.grad_weight is not None:
            missed = abs(self.alpha) * float(self._classes_missed.norm()) / PROBES**0.5
            weight_error = _ratio(missed, _norm(self.grad_weight))
        mean = self.dropped / self.total if self.total else 0.0
        return GradientCertificate(self.kept / max(1, self.rows), self.largest, mean, hidden_error, weight_error)

    def _choose(self, rows: slice, gradient: Tensor, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tail] | None:
        """The columns to keep, in order, and the tail of the others; None for all columns."""
        energy = _column_energy(gradient, self.dtype)
        total = energy.sum()
        if not bool(torch.isfinite(total)):
            return None  # the caller refuses such losses
        hidden_probes = hidden @ self._probes
        of_classes = torch.mm(hidden_probes.t(), gradient).to(self.dtype)
        sums = gradient.sum(0, dtype=self.dtype)
        # What rows have in common is no error: a rank-1 tail has it.
        energy -= sums.square() / len(gradient)
        level = energy.clamp_min_(0).clamp_min(_LEAST_ENERGY).log2_().mul_(_LEVELS_PER_OCTAVE).floor_().long()
        level -= level.min()
        up_to = torch.bincount(level, weights=energy).cumsum(0)
        norms = None if self.calibrated else self._norms(rows, gradient, hidden_probes, of_classes)
        best: tuple[Tensor, Tail] | None = None
        for _ in range(1 if norms is None else TRIES):
            kept = level >= (up_to <= self.budget * total).sum()
            kept[labels] = True
            columns = kept.nonzero().squeeze(1)
            if len(columns) > LARGEST_SHARE * self.classes:
                if best is not None or norms is None:
                    break
                self.budget *= 4
                continue
            found = columns, self._tail(gradient, hidden_probes, of_classes, columns, sums)
            if norms is None:
                return found
            missed = found[1].rows_missed, found[1].classes_missed
            error = max(_ratio(float(part.norm()), whole) for part, whole in zip(missed, norms, strict=True))
            if error <= self.tolerance:
                if best is None or len(columns) <= len(best[0]):
                    best, budget = found, self.budget
                if not error or error >= ENOUGH * self.tolerance:
                    break
            self.budget *= (AIM * self.tolerance / error) ** 1.5
        if best is not None:
            self.calibrated, self.budget = True, budget
        return best

    def _tail(self, gradient: Tensor, hidden_probes: Tensor, of_classes: Tensor, columns: Tensor, sums: Tensor) -> Tail:
        """What is outside of the columns; of_classes: hidden_probesᵀ·G [PROBES, K]; sums: of G over its rows [K]."""
        seen = torch.cat((self._weight_probes, self._weight_probes.new_ones(1, self.classes))).index_fill_(1, columns, 0)
        found = torch.mm(gradient, seen.t()).to(self.dtype)
        rows_missed, mass = found[:, :PROBES], found[:, PROBES].clone()
        mean = sums.index_fill(0, columns, 0)
        mean /= mean.sum().clamp_min(torch.finfo(self.dtype).tiny)
        rows_missed = rows_missed.addr(mass, seen[:PROBES].to(self.dtype) @ mean, alpha=-1)
        classes_missed = of_classes.index_fill(1, columns, 0)
        classes_missed.addr_(mass @ hidden_probes.to(self.dtype), mean, alpha=-1)
        return Tail(mean, mass, rows_missed, classes_missed)

    def _norms(self, rows: slice, gradient: Tensor, hidden_probes: Tensor, of_classes: Tensor) -> tuple[float, float]:
        """‖dH‖ and ‖dW‖ of this chunk along the probes; infinite where one is not wanted, so that its error is 0."""
        of_rows = torch.mm(gradient, self._weight_probes.t()).to(self.dtype)
        if self.prior is not None:
            prior, mixing = self.prior[0], self.prior[1][rows]
            of_rows.addr_(mixing, self._weight_probes.to(prior.dtype) @ prior, alpha=-1)
            of_classes = of_classes.addr(mixing @ hidden_probes.to(mixing.dtype), prior, alpha=-1)
        return (
            math.inf if self.grad_hidden is None else float(of_rows.norm()),
            math.inf if self.grad_weight is None else float(of_classes.norm()),
        )

    def _add_tails(self) -> None:
        if not self._tails:
            return
        means = torch.stack([mean for mean, *_ in self._tails])
        if self.grad_hidden is not None:
            products = torch.mm(means.to(self.weight.dtype), self.weight).to(self.dtype)
            for product, (_, mass, rows, _) in zip(products, self._tails, strict=True):
                self.grad_hidden[rows].addr_(mass, product)
        if self.grad_weight is not None:
            parts = torch.stack([part for *_, part in self._tails]).to(self.grad_weight.dtype)
            self.grad_weight.addmm_(means.t().to(self.grad_weight.dtype), parts, alpha=self.alpha)
        self._tails.clear()


def _column_energy(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_i G_ij² [K] of G [m, K], by tiles which stay in the cache: a norm over rows takes eight times as long."""
    energy, tile = gradient.new_zeros(gradient.shape[1], dtype=dtype), None
    for part in gradient.split(_ENERGY_ROWS):
        tile = torch.mul(part, part, out=tile) if tile is not None and len(tile) == len(part) else part * part
        energy += tile.sum(0, dtype=dtype)
    return energy


def _norm(gradient: Tensor) -> float:
    return float(gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm())


def _ratio(error: float, whole: float) -> float:
    """error / whole, 0 without an error."""
    if not error:
        return 0.0
    return error / whole if whole else math.inf
