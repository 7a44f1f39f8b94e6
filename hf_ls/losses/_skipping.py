"""The gradients of a chunk of logits from few of its entries, and a certificate of what that costs.

A trained model puts nearly all probability of a row into few classes. The gradient of a chunk is G = a·p − r·e_y [m, K], a and
r per row, without the prior, which the chunk loop takes apart. Its entries above a threshold and the columns of the labels are
multiplied as they are, so are other columns with many such entries. All else, G = a·p, is replaced by m_i·t_j: what each row
dropped times the mean dropped distribution of the chunk, both exact in sum. That is of rank one, so the tails of many chunks
share two small matmuls, as the prior rides along.

To drop p − q instead, as filters for a plain cross entropy do, would delete the smoothing term itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The first threshold is GUESS·tolerance^POWER of a row's mass, right for states of SmolLM2-135M. What the first chunk would miss
# by it is then measured, and the threshold moved until that is between ENOUGH and 1 tolerance; later chunks follow the error
# so far.
GUESS, POWER = 0.22, 1.6
ENOUGH, AIM, TRIES = 0.6, 0.9, 6
# What an entry costs beside one of a whole matmul, and so the share of the rows from which on a class is taken as a column.
COST = 8.0
# Where the work would be more than this share of the whole matmuls, those are as fast.
LARGEST_SHARE = 0.5
# Columns at a time, rows of a chunk, and tails kept before they are added: together less memory than exact gradients take.
BLOCK_COLUMNS = 2048
SKIPPING_ROWS = 256
MOST_TAILS = 16
# Random signs ω by which errors are measured: E‖A·ω‖² = ‖A‖² over all rows of A, at the cost of a few columns.
PROBES = 8
# Rows of a chunk at a time where each leaves a mask, or where few rows times a chunk are summed in the cache.
TILE_ROWS = 16
# Rows of a chunk which tell what columns are taken whole.
SAMPLE_ROWS = 32


class GradientCertificate(NamedTuple):
    """What skipping entries has dropped in one call, and the error which that makes.

    The errors are ‖error‖ / ‖gradient‖ over the whole of dH and of dW, measured along random directions (Hutchinson 1989); 0 is
    exact. The rounding of the arithmetic is not in them.
    """

    kept_entries: float  # mean share of the entries in the two gradient matmuls, 0 to 1; 1 where all were taken
    largest_dropped_mass: float  # of a row, 0 to 1
    mean_dropped_mass: float
    hidden_error: float
    weight_error: float

    @property
    def error(self) -> float:
        """The larger of the two errors, to be compared with the tolerance."""
        return max(self.hidden_error, self.weight_error)


@dataclass(frozen=True, eq=False)
class Kept:
    """What of a chunk G [m, K] is multiplied: whole columns, and single entries, which are 0 in G meanwhile."""

    gradient: Tensor  # G
    columns: Tensor  # in order
    whole: Tensor  # the columns themselves
    at: Tensor  # places of the entries in the flat chunk, in order
    values: Tensor
    by_class: Tensor  # the order of the entries by their classes
    classes: Tensor  # these classes, in order
    starts: Tensor  # where the entries of each of them start in `by_class`
    counts: Tensor  # and how many they are

    @classmethod
    def of(cls, gradient: Tensor, labels: Tensor, threshold: float, *, signed: bool) -> Kept | None:
        """The entries above a threshold and the columns of the labels; None, with G as it was, where that is too much work.

        signed: whether rows have negative weights; without them only the entries of labels may be below 0.
        """
        (m, classes), bound = gradient.shape, gradient.new_tensor(threshold)

        def above(rows: Tensor) -> Tensor:
            return _places((rows.abs() if signed else rows) > bound)

        sample = gradient[:: max(1, m // SAMPLE_ROWS)]
        counts = torch.bincount(above(sample) % classes, minlength=classes)
        often = counts > len(sample) / COST
        if _work(int(often.sum()), int(counts[~often].sum()), sample) > LARGEST_SHARE:
            return None
        often[labels] = True  # whole, so that rare classes, too, get their gradient
        bound = torch.where(often, math.inf, bound)
        rows = gradient.split(TILE_ROWS)
        at = torch.cat([above(some).add_(tile * TILE_ROWS * classes) for tile, some in enumerate(rows)])
        columns = often.nonzero().squeeze(1)
        if _work(len(columns), len(at), gradient) > LARGEST_SHARE:
            return None
        by_class = (at % classes).argsort()
        single, counts = torch.unique_consecutive(at[by_class] % classes, return_counts=True)
        flat = gradient.view(-1)
        values = flat[at]
        flat[at] = 0
        return cls(
            gradient, columns, gradient.index_select(1, columns), at, values, by_class, single, counts.cumsum(0) - counts, counts
        )

    def put_back(self) -> None:
        """Make G whole again."""
        self.gradient.view(-1)[self.at] = self.values

    def times_classes(self, matrix: Tensor) -> Tensor:
        """The kept part of G times a matrix [K, c]: [m, c]."""
        m, classes = self.gradient.shape
        starts = torch.searchsorted(self.at, torch.arange(0, m * classes, classes))
        product = _bags(self.at % classes, matrix, starts, self.values)
        for some, part in zip(self.columns.split(BLOCK_COLUMNS), self.whole.split(BLOCK_COLUMNS, 1), strict=True):
            product += torch.mm(part, matrix.index_select(0, some))
        return product

    def add_times_rows(self, matrix: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        """out [K, c] += alpha · the kept part of Gᵀ times a matrix [m, c]."""
        for some, part in zip(self.columns.split(BLOCK_COLUMNS), self.whole.split(BLOCK_COLUMNS, 1), strict=True):
            out.index_add_(0, some, torch.mm(part.t(), matrix).to(out.dtype), alpha=alpha)
        row, values = self.at[self.by_class] // self.gradient.shape[1], self.values[self.by_class]
        for start in range(0, len(self.classes), BLOCK_COLUMNS):
            some = slice(start, start + BLOCK_COLUMNS)
            starts = self.starts[some]
            its = slice(int(starts[0]), int(starts[-1]) + int(self.counts[some][-1]))
            product = _bags(row[its], matrix, starts - starts[0], values[its])
            out.index_add_(0, self.classes[some], product.to(out.dtype), alpha=alpha)


class Tail(NamedTuple):
    """The rank-1 m ⊗ t which stands for what a chunk leaves out of its matmuls."""

    mean: Tensor  # t [K], 0 at the kept columns
    mass: Tensor  # m [m]


class Missed(NamedTuple):
    """What the gradients of some rows miss, and these gradients, both along the probes."""

    rows_missed: float  # ‖·‖² over dH
    rows: float
    classes_missed: Tensor  # [PROBES, K], of dW
    classes: Tensor  # [K, PROBES]

    def plus_(self, other: Missed) -> Missed:
        """With those of other rows; the tensors of dW are added in place."""
        return Missed(
            self.rows_missed + other.rows_missed,
            self.rows + other.rows,
            self.classes_missed.add_(other.classes_missed),
            self.classes.add_(other.classes),
        )


class Skipping:
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
        self.tolerance = tolerance
        self.threshold = GUESS * tolerance**POWER  # of an entry, as a share of the mean mass of a row
        self.on = True
        self.rows = 0
        self.kept = self.largest = self.dropped = self.total = 0.0
        self.missed: Missed | None = None  # None before the first chunk
        # t [K], m [m], the rows, and what t is multiplied by in dW [d]
        self._tails: list[tuple[Tensor, Tensor, slice, Tensor]] = []
        signs = torch.randint(2, (PROBES, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self._probes = signs.to(weight)
        # A product with few columns is several times as fast with those as rows.
        self._weight_probes = self._probes @ weight.t()
        self._probes_of_classes = self._weight_probes.t().contiguous()

    def add(self, start: int, gradient: Tensor, hidden: Tensor, labels: Tensor, row_scale: Tensor) -> bool:
        """Add a chunk of rows from `start` on: G [m, K], hidden [m, d], labels [m], and a [m], the mass of a row.

        False, with nothing added, where too many entries would stay; the rest of the call then takes all of them.
        """
        rows = slice(start, start + len(gradient))
        self.rows += len(gradient)
        found = self._divide(rows, gradient, hidden, labels, row_scale) if self.on else None
        if found is None:
            self.on = False
            self.kept += len(gradient)
            return False
        kept, tail = found
        self.kept += (len(gradient) * len(kept.columns) + len(kept.at)) / self.classes
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = kept.times_classes(self.weight)
        if self.grad_weight is not None:
            kept.add_times_rows(hidden, self.grad_weight, self.alpha)
        share = tail.mass / torch.where(row_scale == 0, 1, row_scale)
        self.largest = max(self.largest, float(share.max()))
        self.dropped, self.total = self.dropped + float(tail.mass.sum()), self.total + float(row_scale.sum())
        self._tails.append((*tail, rows, torch.mv(hidden.t().to(self.dtype), tail.mass)))
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
        if self.missed is not None and self.grad_hidden is not None:
            hidden_error = _ratio((self.missed.rows_missed / PROBES) ** 0.5, _norm(self.grad_hidden))
        if self.missed is not None and self.grad_weight is not None:
            missed = abs(self.alpha) * float(self.missed.classes_missed.norm()) / PROBES**0.5
            weight_error = _ratio(missed, _norm(self.grad_weight))
        mean = self.dropped / self.total if self.total else 0.0
        return GradientCertificate(self.kept / max(1, self.rows), self.largest, mean, hidden_error, weight_error)

    def _divide(
        self, rows: slice, gradient: Tensor, hidden: Tensor, labels: Tensor, row_scale: Tensor
    ) -> tuple[Kept, Tail] | None:
        """What of a chunk to keep, and the tail of the rest; None to keep all of it."""
        mass, signs = float(row_scale.abs().mean()), row_scale.sign()
        if not math.isfinite(mass) or not bool(torch.isfinite(gradient[:, 0]).all()):
            return None  # the caller refuses such losses
        hidden_probes, signed = self._probes @ hidden.t(), bool((signs < 0).any())

        def cut() -> tuple[Kept, Tail, Missed] | None:
            kept = Kept.of(gradient, labels, self.threshold * mass, signed=signed)
            return None if kept is None else (kept, *self._rest(rows, kept, hidden_probes, signs))

        first = self.missed is None
        found = self._search(cut) if first else cut()
        if found is None:
            return None
        kept, tail, missed = found
        self.missed = missed if self.missed is None else self.missed.plus_(missed)
        error = self._error(self.missed)
        if error and not first:
            self.threshold *= min(2.0, max(0.5, AIM * self.tolerance / error)) ** POWER
        return kept, tail

    def _search(self, cut: Callable[[], tuple[Kept, Tail, Missed] | None]) -> tuple[Kept, Tail, Missed] | None:
        """The first chunk cut at a threshold which makes about the error that is allowed; None where that keeps too much."""
        too_low = best = 0.0
        for _ in range(TRIES):
            found = cut()
            if found is None:
                too_low = self.threshold
                self.threshold *= 4
                continue
            error = self._error(found[2])
            if not error or ENOUGH * self.tolerance <= error <= self.tolerance:
                return found
            found[0].put_back()
            best = max(best, self.threshold) if error <= self.tolerance else best
            self.threshold *= (AIM * self.tolerance / error) ** POWER
            if self.threshold <= too_low:
                break
        self.threshold = best
        return cut() if best else None

    def _error(self, missed: Missed) -> float:
        """The larger relative error of the two gradients, of those which are needed."""
        of_rows = of_classes = 0.0
        if self.grad_hidden is not None:
            of_rows = _ratio(missed.rows_missed**0.5, missed.rows**0.5)
        if self.grad_weight is not None:
            of_classes = _ratio(float(missed.classes_missed.norm()), float(missed.classes.norm()))
        return max(of_rows, of_classes)

    def _rest(self, rows: slice, kept: Kept, hidden_probes: Tensor, signs: Tensor) -> tuple[Tail, Missed]:
        """What stands for all that is not kept of a chunk, and what it misses."""
        gradient, wide = kept.gradient, hidden_probes.to(self.dtype)
        seen = torch.cat((self._weight_probes, self._weight_probes.new_ones(1, self.classes))).index_fill_(1, kept.columns, 0)
        found = torch.mm(gradient, seen.t()).to(self.dtype)
        rows_missed, mass = found[:, :PROBES], found[:, PROBES].clone()
        found = _few_rows_times(torch.cat((hidden_probes, signs.to(hidden_probes).unsqueeze(0))), gradient, self.dtype)
        found.index_fill_(1, kept.columns, 0)
        classes_missed, mean = found[:PROBES], found[PROBES]
        mean = mean / mean.sum().clamp_min(torch.finfo(self.dtype).tiny)
        of_rows, of_classes = seen[:PROBES].to(self.dtype) @ mean, wide @ mass
        of_all_rows = kept.times_classes(self._probes_of_classes).to(self.dtype).addr_(mass, of_rows)
        of_all_classes = torch.outer(mean, of_classes)
        kept.add_times_rows(hidden_probes.t().contiguous(), of_all_classes)
        if self.prior is not None:
            prior, mixing = self.prior[0], self.prior[1][rows]
            of_all_rows.addr_(mixing, self._weight_probes.to(self.dtype) @ prior, alpha=-1)
            of_all_classes.addr_(prior, wide @ mixing, alpha=-1)
        rows_missed = rows_missed.addr(mass, of_rows, alpha=-1)
        classes_missed.addr_(of_classes, mean, alpha=-1)
        return Tail(mean, mass), Missed(_squares(rows_missed), _squares(of_all_rows), classes_missed, of_all_classes)

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


def _places(mask: Tensor) -> Tensor:
    """Where a flat mask is True, in order; eight values at a time, since most of them are False."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    inside = flat.view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
    return (words[inside >> 3] << 3) + (inside & 7)


def _work(columns: int, entries: int, gradient: Tensor) -> float:
    """What the product of some columns and entries costs beside that of all of G."""
    return columns / gradient.shape[1] + COST * entries / gradient.numel()


def _few_rows_times(few: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """few [k, m] · G [m, K] in `dtype`, a tile of rows at a time: at once it takes two to three times as long."""
    product = gradient.new_zeros((len(few), gradient.shape[1]), dtype=dtype)
    for part, rows in zip(few.split(TILE_ROWS, 1), gradient.split(TILE_ROWS), strict=True):
        product.addmm_(part.to(dtype), rows.to(dtype))
    return product


def _bags(index: Tensor, rows: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """Sums of values_i · rows[index_i] over groups of i, which begin at `starts`."""
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=values)


def _squares(values: Tensor) -> float:
    return float(values.square().sum())


def _norm(gradient: Tensor) -> float:
    return float(gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm())


def _ratio(error: float, whole: float) -> float:
    """error / whole, 0 without an error."""
    if not error:
        return 0.0
    return error / whole if whole else math.inf
