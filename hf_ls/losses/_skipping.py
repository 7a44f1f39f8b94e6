"""The gradients of a chunk of logits from few of its entries, and a certificate of what that costs.

A trained model puts nearly all probability of a row into few classes. The gradient of a chunk is G = a·p − r·e_y [m, K], a and
r per row, without the prior, which the chunk loop takes apart. Its entries above a threshold and the columns of the labels are
multiplied as they are, so are other columns with many such entries. All else, G = a·p, is replaced by m_i·t_j: what each row
dropped times the mean dropped distribution of the chunk, both exact in sum. That is of rank one, so the tails of many chunks
share two small matmuls, as the prior rides along. dW = Gᵀ·H mostly needs fewer entries than dH = G·W for the same error: it has
a threshold, and a tail, of its own.

To drop p − q instead, as filters for a plain cross entropy do, would delete the smoothing term itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls.losses._rows import exact_dtype

# The first thresholds are GUESS·tolerance^POWER of a row's mass, right for dH of SmolLM2-135M, and MORE times that for dW. What
# the first chunk would miss by them is then measured, and they are moved until the larger error is between ENOUGH and 1
# tolerance; later chunks follow the errors so far. Where the next call starts, in the same training, it aims a little lower.
GUESS, POWER, MORE = 0.22, 1.6, 4.0
ENOUGH, TRIES = 0.6, 6
AIM, NEXT_AIM = (0.9, 0.5), (0.8, 0.5)
# What an entry costs beside one of a whole matmul, and so the share of the rows from which on a class is taken as a column.
COST = 8.0
# Where the work would be more than this share of the whole matmuls, those are as fast.
LARGEST_SHARE = 0.5
# Elements of products at a time, rows of a chunk, and tails kept before they are added: together no more memory than exact
# gradients take.
BLOCK_ELEMENTS = 1 << 20
SKIPPING_ROWS = 256
MOST_TAILS = 8
# Random signs ω by which errors are measured: E‖A·ω‖² = ‖A‖² over all rows of A, at the cost of a few columns; in the first
# chunk and every second one from there on.
PROBES, PROBED = 8, 2
# Classes at a time: that many columns of a chunk, and rows of W, stay in the cache while all that needs them is done.
TILE_CLASSES = 4096
# Rows of a chunk which tell what columns are taken whole.
SAMPLE_ROWS = 32


class Thresholds(NamedTuple):
    """Above what share of the mean mass of a row an entry is multiplied; no lower for dW than for dH."""

    hidden: float
    weight: float

    @classmethod
    def guess(cls, tolerance: float) -> Thresholds:
        """Where a call begins that knows nothing."""
        return cls(GUESS * tolerance**POWER, MORE * GUESS * tolerance**POWER)

    def times(self, factor: float) -> Thresholds:
        """Both by the same factor."""
        return Thresholds(self.hidden * factor, self.weight * factor)


class GradientCertificate(NamedTuple):
    """What skipping entries has dropped in one call, and the error which that makes.

    The errors are ‖error‖ / ‖gradient‖ of dH and of dW, measured along random directions (Hutchinson 1989), in a long call over
    every second chunk of the rows; 0 is exact. The rounding of the arithmetic is not in them.
    """

    kept_entries: float  # mean share of the entries in the two gradient matmuls, 0 to 1; 1 where all were taken
    largest_dropped_mass: float  # of a row, 0 to 1, in dW
    mean_dropped_mass: float
    hidden_error: float
    weight_error: float
    thresholds: Thresholds | None = None  # where to begin in the next call of the same training; None after exact gradients

    @property
    def error(self) -> float:
        """The larger of the two errors, to be compared with the tolerance."""
        return max(self.hidden_error, self.weight_error)


@dataclass(frozen=True, eq=False)
class Kept:
    """What of a chunk G [m, K] is multiplied: whole columns, and single entries, of which dW takes the heavy ones.

    G itself is left without the entries, and the sums over what neither matmul takes are made on the way, as long as a tile of
    classes is in the cache.
    """

    gradient: Tensor  # G
    columns: Tensor  # in order
    whole: Tensor  # the columns themselves
    at: Tensor  # places of the entries in the flat chunk, tile of classes after tile, in order in each
    values: Tensor
    sizes: list[int]  # how many each tile has
    is_heavy: Tensor  # whether dW takes an entry
    heavy: Tensor  # those which it takes, in the order of their classes
    classes: Tensor  # of the heavy ones, in order
    starts: Tensor  # where the entries of each of them start in `heavy`
    counts: Tensor  # and how many they are
    of_classes: Tensor  # few · what dW does not take, [k, K]
    of_rows: Tensor  # seen · what dH does not take, transposed, [c, m]

    @classmethod
    def of(
        cls, gradient: Tensor, labels: Tensor, thresholds: Thresholds, few: Tensor, seen: Tensor, *, signed: bool
    ) -> Kept | None:
        """The entries above the thresholds and the columns of the labels; None, and G as it was, where that is too much work.

        few [k, m], seen [c, K]: what the rest is summed with, over rows and over classes. signed: whether rows have negative
        weights; without them only the entries of labels may be below 0.
        """
        (m, classes), bound = gradient.shape, gradient.new_tensor(thresholds.hidden)

        def above(values: Tensor, bound: Tensor) -> Tensor:
            return _above(values.abs() if signed else values, bound)

        sample = gradient[:: max(1, m // SAMPLE_ROWS)]
        counts = torch.bincount(above(sample, bound) % classes, minlength=classes)
        often = counts > len(sample) / COST
        if _work(int(often.sum()), int(counts[~often].sum()), sample) > LARGEST_SHARE:
            return None
        often[labels] = True  # whole, so that rare classes, too, get their gradient
        columns = often.nonzero().squeeze(1)
        seen = seen.index_fill(1, columns, 0)
        whole = gradient.index_select(1, columns)
        of_classes, of_rows = few.new_empty((len(few), classes)), few.new_zeros((len(seen), m))
        flat, found = gradient.view(-1), []
        split = (of.split(TILE_CLASSES, -1) for of in (gradient, torch.where(often, math.inf, bound), seen, of_classes))
        for number, (tile, bounds, its_seen, out) in enumerate(zip(*split, strict=True)):
            places, width = above(tile, bounds), len(bounds)
            at = places // width * classes + (places % width + number * TILE_CLASSES)
            values = flat[at]
            is_heavy = values.abs() > thresholds.weight
            found.append((at, values, is_heavy))
            flat[at[is_heavy]] = 0
            torch.mm(few, tile.to(few.dtype), out=out)
            flat[at] = 0
            of_rows.addmm_(its_seen, tile.to(few.dtype).t())
        of_classes.index_fill_(1, columns, 0)
        at, values, is_heavy = (torch.cat(parts) for parts in zip(*found, strict=True))
        if _work(len(columns), len(at), gradient) > LARGEST_SHARE:
            flat[at] = values
            return None
        heavy = is_heavy.nonzero().squeeze(1)
        its, order = (at[heavy] % classes).sort()
        single, counts = torch.unique_consecutive(its, return_counts=True)
        return cls(
            gradient, columns, whole, at, values, [len(part[0]) for part in found], is_heavy, heavy[order], single,
            counts.cumsum(0) - counts, counts, of_classes, of_rows,
        )  # fmt: skip

    @property
    def share(self) -> float:
        """The mean share of the entries which the two matmuls take."""
        entries = (len(self.at) + len(self.heavy)) / 2
        return (len(self.columns) * len(self.gradient) + entries) / self.gradient.numel()

    def put_back(self) -> None:
        """Make G whole again."""
        self.gradient.view(-1)[self.at] = self.values

    def times_classes(self, matrix: Tensor) -> Tensor:
        """The kept part of G times a matrix [K, c]: [m, c]."""
        (m, classes), block = self.gradient.shape, _block(matrix)
        rows = torch.arange(0, m * classes, classes)
        product = matrix.new_zeros((m, matrix.shape[1]), dtype=exact_dtype(matrix.dtype))
        tiles = zip(self.at.split(self.sizes), self.values.split(self.sizes), matrix.split(TILE_CLASSES), strict=True)
        for tile, (at, values, part) in enumerate(tiles):
            if len(at):
                product += _bags(at % classes - tile * TILE_CLASSES, part, torch.searchsorted(at, rows), values)
        for some, part in zip(self.columns.split(block), self.whole.split(block, 1), strict=True):
            product += torch.mm(part, matrix.index_select(0, some))
        return product

    def add_times_rows(self, matrix: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        """out [K, c] += alpha · the part of Gᵀ which dW takes, times a matrix [m, c]."""
        block = _block(matrix)
        for some, part in zip(self.columns.split(block), self.whole.split(block, 1), strict=True):
            out.index_add_(0, some, torch.mm(part.t(), matrix).to(out.dtype), alpha=alpha)
        row, values = self.at[self.heavy] // self.gradient.shape[1], self.values[self.heavy]
        for start in range(0, len(self.classes), block):
            some = slice(start, start + block)
            starts = self.starts[some]
            its = slice(int(starts[0]), int(starts[-1]) + int(self.counts[some][-1]))
            product = _bags(row[its], matrix, starts - starts[0], values[its])
            out.index_add_(0, self.classes[some], product.to(out.dtype), alpha=alpha)


class Tail(NamedTuple):
    """The rank-1 m ⊗ t which stands for what a chunk leaves out of one of its matmuls."""

    mean: Tensor  # t [K], 0 at the kept columns
    mass: Tensor  # m [m]

    @classmethod
    def of(cls, sums: Tensor, mass: Tensor) -> Tail:
        """That of sums [K] over the rows, positive where those of all classes of a row are its mass [m]."""
        return cls(sums / sums.sum().clamp_min(torch.finfo(sums.dtype).tiny), mass)


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


class Cut(NamedTuple):
    """A chunk cut in two: what is kept, what stands for the rest in dH and in dW, and what these miss, in a probed chunk."""

    kept: Kept
    of_hidden: Tail
    of_weight: Tail
    missed: Missed | None


class Skipping:
    """Adds the gradients of chunk after chunk to dH [n, d] and dW [K, d], either of which may be None.

    Args:
        tolerance: the relative error of the gradients to stay below, e.g. 5e-3.
        thresholds: those of the certificate of an earlier call; None for a guess.
        hidden: all rows [n, d].
        grad_weight: dW, which is made anew. alpha: its factor; dH gets its own from the caller.
        prior: u [K] and what each row takes of it, w_i·e_i [n], or None; the caller takes it from dH.
    """

    def __init__(
        self,
        tolerance: float,
        thresholds: Thresholds | None,
        weight: Tensor,
        hidden: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        alpha: float,
        prior: tuple[Tensor, Tensor] | None,
    ) -> None:
        (self.classes, width), self.weight, self.alpha, self.prior = weight.shape, weight, alpha, prior
        self.grad_hidden, self.grad_weight = grad_hidden, grad_weight
        self.dtype = exact_dtype(weight.dtype)
        self.tolerance = tolerance
        self.thresholds = self._needed(thresholds or Thresholds.guess(tolerance))
        self.on = True
        self.chunks = self.rows = 0
        self.kept = self.largest = self.dropped = self.total = 0.0
        self.missed: Missed | None = None  # None before the first chunk
        self.used: list[Thresholds] = []  # in the probed chunks
        # Of dH and of dW, the rows, and what t is multiplied by in dW [d]
        self._tails: list[tuple[Tail, Tail, slice, Tensor]] = []
        signs = torch.randint(2, (PROBES, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self._probes = signs.to(weight)
        # A product with few columns is several times as fast with those as rows.
        weight_probes = self._probes @ weight.t()
        self._probes_of_classes = weight_probes.t().contiguous()
        # What the rest of dH is summed with: along the probes, and last over all classes.
        self._seen = torch.cat((weight_probes.to(self.dtype), torch.ones(1, self.classes, dtype=self.dtype)))
        if grad_weight is not None and prior is not None:
            partner = torch.mv(hidden.t().to(prior[1].dtype), prior[1]) * -alpha
            torch.outer(*(part.to(grad_weight.dtype) for part in (prior[0], partner)), out=grad_weight)
        elif grad_weight is not None:
            grad_weight.zero_()

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
        kept, of_hidden, of_weight = found
        self.kept += len(gradient) * kept.share
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = kept.times_classes(self.weight)
        if self.grad_weight is not None:
            kept.add_times_rows(hidden, self.grad_weight, self.alpha)
        mass = of_hidden.mass if self.grad_weight is None else of_weight.mass
        self.largest = max(self.largest, float((mass / torch.where(row_scale == 0, 1, row_scale)).max()))
        self.dropped, self.total = self.dropped + float(mass.sum()), self.total + float(row_scale.sum())
        self._tails.append((of_hidden, of_weight, rows, torch.mv(hidden.t().to(self.dtype), mass)))
        if len(self._tails) == MOST_TAILS:
            self._add_tails()
        return True

    def finish(self) -> GradientCertificate:
        """Add what is left; then compare what was missed with what was made."""
        self._add_tails()
        mean = self.dropped / self.total if self.total else 0.0
        errors = (0.0, 0.0) if self.missed is None else self._errors(self.missed)
        following = self._moved(NEXT_AIM, errors) if self.on and self.used else None
        return GradientCertificate(self.kept / max(1, self.rows), self.largest, mean, *errors, following)

    def _divide(
        self, rows: slice, gradient: Tensor, hidden: Tensor, labels: Tensor, row_scale: Tensor
    ) -> tuple[Kept, Tail, Tail] | None:
        """What of a chunk to keep, and the tails of the rest in dH and dW; None to keep all of it."""
        mass, signs = float(row_scale.abs().mean()), row_scale.sign()
        if not math.isfinite(mass) or not bool(torch.isfinite(gradient[:, 0]).all()):
            return None  # the caller refuses such losses
        signed, probed = bool((signs < 0).any()), self.chunks % PROBED == 0
        self.chunks += 1
        # The rest of dW likewise: along the probes, in a probed chunk, and last over all rows.
        few, seen = signs.to(self.dtype).unsqueeze(0), self._seen[-1:]
        if probed:
            few, seen = torch.cat(((self._probes @ hidden.t()).to(self.dtype), few)), self._seen

        def cut() -> Cut | None:
            kept = Kept.of(gradient, labels, self.thresholds.times(mass), few, seen, signed=signed)
            return None if kept is None else self._rest(rows, kept, few)

        found = self._search(cut) if self.missed is None else cut()
        if found is None:
            return None
        if found.missed is not None:
            self.used.append(self.thresholds)
            self.missed = found.missed if self.missed is None else self.missed.plus_(found.missed)
            self.thresholds = self._moved(AIM, self._errors(self.missed))
        return found.kept, found.of_hidden, found.of_weight

    def _search(self, cut: Callable[[], Cut | None]) -> Cut | None:
        """The first chunk cut at thresholds which make about the error that is allowed; None where that keeps too much."""
        too_low, best = 0.0, None
        for _ in range(TRIES):
            found = cut()
            if found is None or found.missed is None:
                too_low = self.thresholds.hidden
                self.thresholds = self.thresholds.times(4)
                continue
            errors = self._errors(found.missed)
            if not any(errors) or ENOUGH * self.tolerance <= max(errors) <= self.tolerance:
                return found
            found.kept.put_back()
            if max(errors) <= self.tolerance and (best is None or self.thresholds.hidden > best.hidden):
                best = self.thresholds
            self.thresholds = self._moved(AIM, errors, self.thresholds)
            if self.thresholds.hidden <= too_low:
                break
        if best is None:
            return None
        self.thresholds = best
        return cut()

    def _moved(self, aims: tuple[float, float], errors: tuple[float, float], then: Thresholds | None = None) -> Thresholds:
        """Thresholds for about these shares of the tolerance, after errors made `then`, or else in all probed chunks."""
        used = self.used if then is None else [then]
        moved = (
            math.exp(sum(map(math.log, thresholds)) / len(used)) * ((aim * self.tolerance / error) ** POWER if error else 1.0)
            for thresholds, error, aim in zip(zip(*used, strict=True), errors, aims, strict=True)
        )
        return self._needed(Thresholds(*moved))

    def _needed(self, thresholds: Thresholds) -> Thresholds:
        """What dH drops dW drops; where one of them is not needed, the other decides."""
        if self.grad_weight is None:
            return Thresholds(thresholds.hidden, math.inf)
        return Thresholds(thresholds.weight if self.grad_hidden is None else min(thresholds), thresholds.weight)

    def _errors(self, missed: Missed) -> tuple[float, float]:
        """The relative errors of dH and dW, 0 for one which is not needed."""
        of_rows = of_classes = 0.0
        if self.grad_hidden is not None:
            of_rows = _ratio(missed.rows_missed**0.5, missed.rows**0.5)
        if self.grad_weight is not None:
            of_classes = _ratio(float(missed.classes_missed.norm()), float(missed.classes.norm()))
        return of_rows, of_classes

    def _rest(self, rows: slice, kept: Kept, few: Tensor) -> Cut:
        """What stands for all that is not kept of a chunk; along the probes in `few`, if any, also what dH and dW miss."""
        probes, signs = few[:-1], few[-1]
        # Both are sums over what neither takes, but that the light entries are in the sums over rows.
        light = (~kept.is_heavy).nonzero().squeeze(1)
        places, values = kept.at[light], kept.values[light].to(self.dtype)
        row, mass, sums = places // self.classes, kept.of_rows[-1], kept.of_classes[-1]
        of_hidden = Tail.of(sums.index_add(0, places % self.classes, values * signs[row], alpha=-1), mass)
        of_weight = Tail.of(sums, mass.index_add(0, row, values))
        if not len(probes):
            return Cut(kept, of_hidden, of_weight, None)
        mean_seen, mass_seen = self._seen[:-1] @ of_hidden.mean, probes @ of_weight.mass
        all_rows = kept.times_classes(self._probes_of_classes).addr_(of_hidden.mass, mean_seen)
        all_classes = torch.outer(of_weight.mean, mass_seen)
        kept.add_times_rows(probes.t().to(self.weight.dtype).contiguous(), all_classes)
        if self.prior is not None:
            prior, mixing = self.prior[0], self.prior[1][rows]
            all_rows.addr_(mixing, self._seen[:-1] @ prior, alpha=-1)
            all_classes.addr_(prior, probes @ mixing, alpha=-1)
        rows_missed = kept.of_rows[:-1].addr(mean_seen, of_hidden.mass, alpha=-1)
        classes_missed = kept.of_classes[:-1].addr_(mass_seen, of_weight.mean, alpha=-1)
        return Cut(kept, of_hidden, of_weight, Missed(_squares(rows_missed), _squares(all_rows), classes_missed, all_classes))

    def _add_tails(self) -> None:
        if not self._tails:
            return
        if self.grad_hidden is not None:
            means = torch.stack([of_hidden.mean for of_hidden, *_ in self._tails])
            products = torch.mm(means.to(self.weight.dtype), self.weight).to(self.dtype)
            for product, (of_hidden, _, rows, _) in zip(products, self._tails, strict=True):
                self.grad_hidden[rows].addr_(of_hidden.mass, product)
        if self.grad_weight is not None:
            means = torch.stack([of_weight.mean for _, of_weight, *_ in self._tails])
            parts = torch.stack([part for *_, part in self._tails])
            self.grad_weight.addmm_(means.t().to(self.grad_weight.dtype), parts.to(self.grad_weight.dtype), alpha=self.alpha)
        self._tails.clear()


def _above(values: Tensor, bound: Tensor) -> Tensor:
    """Flat places of the values above their bounds, in order; NumPy compares in a quarter of the time of torch 2.13."""
    wide = exact_dtype(values.dtype)
    return torch.from_numpy(np.flatnonzero(values.to(wide).numpy() > bound.to(wide).numpy()))


def _block(matrix: Tensor) -> int:
    """How many rows as wide as those of a matrix are made at a time."""
    return max(1, BLOCK_ELEMENTS // matrix.shape[1])


def _work(columns: int, entries: int, gradient: Tensor) -> float:
    """What the product of some columns and entries costs beside that of all of G."""
    return columns / gradient.shape[1] + COST * entries / gradient.numel()


def _bags(index: Tensor, rows: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """Sums of values_i · rows[index_i] over groups of i, which begin at `starts`."""
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=values)


def _squares(values: Tensor) -> float:
    return float(values.square().sum())


def _ratio(error: float, whole: float) -> float:
    """error / whole, 0 without an error."""
    if not error:
        return 0.0
    return error / whole if whole else math.inf
