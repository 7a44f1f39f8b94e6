"""What every loss does at its entrance: labels read as class ids, which of them count and how much, and what is refused.

A wrong value is refused with a ValueError which names it. On CUDA in training, reading a value would make the host wait for the
device in every step, so there the same sentence is the message of an assertion on the device, as in torch's own losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


_training: ContextVar[bool | None] = ContextVar("training", default=None)


@contextmanager
def training(on: bool) -> Iterator[None]:
    """Say whether a call is part of a training step, where autograd itself has switched gradients off inside of it."""
    token = _training.set(on)
    try:
        yield
    finally:
        _training.reset(token)


def reading_waits(values: Tensor) -> bool:
    """Whether reading a value would make a training step wait for all that its device still has to do."""
    on = _training.get()
    return values.is_cuda and (torch.is_grad_enabled() if on is None else on)


def refuse(wrong: Tensor, expected: str, got: Callable[[], object], remedy: str) -> None:
    """Refuse a call in which any entry of `wrong` (a bool tensor) is True.

    Raises: ValueError "expected …, got …; do this"; in training on CUDA an assertion on the device, without the value.
    """
    if reading_waits(wrong):
        torch._assert_async(~wrong.any(), f"expected {expected}; {remedy}"[:250])
    elif bool(wrong.any()):
        raise ValueError(f"expected {expected}, got {got()}; {remedy}")


def class_ids(labels: Tensor) -> Tensor:
    """Labels of any integer type as int64: in 8 bits 156 equals −100, and K = 300 does not exist.

    Raises: TypeError for labels which are no integers, ValueError for one which int64 cannot hold.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected labels as a tensor, got {type(labels).__name__}; use torch.as_tensor(labels)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}; cast class ids to long")
    ids = labels.long()
    if labels.dtype == torch.uint64:
        refuse(ids < 0, "labels below 2^63", lambda: int(ids[ids < 0][0]) + 2**64, "map class names to ids 0..K-1")
    return ids


def item_weights(labels: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How much each label counts in a mean: 0 where ignored, else 1 or its class weight. Same shape as the labels."""
    labels = class_ids(labels)
    kept = labels != ignore_index
    if class_weight is None:
        return kept.to(dtype)
    weight = class_weight.to(labels.device, dtype)[labels.masked_fill(~kept, 0)]
    return weight.masked_fill(~kept, 0)


def next_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels [..., T] moved to the logits which predict them: position t gets label t+1, the last one none.

    Moving the small labels instead of the large logits keeps the logits in place (no copy).
    """
    return F.pad(class_ids(labels), (0, 1), value=ignore_index)[..., 1:]


def kept_places(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """Where flat labels [N] count; None where all do.

    Raises: ValueError as `check_range`.
    """
    if labels.numel() and not reading_waits(labels):
        # One look where all is in order: for the batch of a classifier the looks at each label took as long as its loss.
        lowest, highest = (int(value) for value in labels.aminmax())
        if lowest >= 0 and highest < num_classes and not lowest <= ignore_index <= highest:
            return None
    kept = labels != ignore_index
    check_range(labels, kept, num_classes, ignore_index)
    rows = kept.nonzero().squeeze(1)
    return None if len(rows) == len(labels) else rows


def check_range(labels: Tensor, kept: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels outside the classes where they are kept.

    Raises: ValueError for the first of them.
    """
    bad = kept & ((labels < 0) | (labels >= num_classes))
    refuse(
        bad,
        f"labels in [0, {num_classes}) or {ignore_index} for ignored",
        lambda: int(labels[bad][0]),
        "map class names to ids 0..K-1 and mask positions with ignore_index",
    )


def check_finite(losses: Tensor, total: Tensor | None = None) -> None:
    """Refuse losses which are not numbers; `total` is their sum, where it is known.

    Raises: ValueError when their sum is not finite, naming how many are not.
    """
    losses = losses.detach()
    total = losses.sum() if total is None else total.detach()
    if not reading_waits(total) and math.isfinite(total):
        return
    refuse(
        ~torch.isfinite(total),
        "finite logits wherever the target has mass",
        lambda: _not_finite(losses),
        "give masked classes no mass with Smoothing(prior=...) and never label an example with a masked class (NaN: lower the "
        "learning rate)",
    )


def check_options(reduction: str, class_weight: Tensor | None, num_items_in_batch: Any, num_classes: int) -> None:
    """Refuse options which are unknown or contradict each other.

    Raises: ValueError for the first such option.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"expected reduction in {get_args(Reduction)}, got {reduction!r}; choose one of them")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"expected reduction='mean' with num_items_in_batch, got {reduction!r}; drop one of the two")
    if class_weight is None:
        return
    if class_weight.shape != (num_classes,):
        raise ValueError(f"expected class_weight [{num_classes}] >= 0, got {tuple(class_weight.shape)}; one weight per class")
    check_weights(f"class_weight [{num_classes}]", class_weight)


def check_weights(what: str, weight: Tensor) -> None:
    """Refuse weights below 0 and NaN.

    Raises: ValueError for the first of them.
    """
    bad = ~(weight >= 0)
    refuse(bad, f"{what} >= 0", lambda: float(weight[bad][0]), "leave out what should count 0 times, or give it 0")


def _not_finite(losses: Tensor) -> str:
    bad = losses[~torch.isfinite(losses)]
    if not bad.numel():
        return f"losses which add up to {float(losses.sum())}"
    return f"NaN or -inf in {bad.numel()} of {losses.numel()} rows"
