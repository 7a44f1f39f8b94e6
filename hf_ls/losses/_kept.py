"""Which rows of a batch a loss keeps, without waiting for a GPU to count them.

Ignored rows are left out. In training on CUDA their number is known to the device alone: there all rows are put in order, the
kept ones first, and the number travels to the host while the first chunk runs, so that no later chunk has ignored rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ls.losses import _checks


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
