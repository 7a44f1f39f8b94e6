"""One kernel for the element-wise work of a chunk on CUDA: logits in, gradient out in their place, terms per row.

In torch's own operators a softmax in float32 of half-precision logits, with its label and its weights, passes over a chunk about
ten times; here it is read twice and written once. Needs Triton, which comes with torch on Linux; `_rows` has the same in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 8192  # of a row at a time: 16 values per thread


@triton.jit
def _row_kernel(
    logits, labels, share, weight, nll, label_logit, stride, classes, z_loss,
    SHARED: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row: lse in one pass, then w·((1 + 2λ·lse)·p − share·e_y) over the logits in a second."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    # Before the passes: their barriers keep it ahead of the second one, which overwrites it.
    z_y = tl.load(logits + label).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    for start in range(0, classes, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(z, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)  # −inf − (−inf) is NaN
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base), axis=0)
        highest = new
    lse = highest + tl.log(total)
    tl.store(nll + row, lse - z_y)
    tl.store(label_logit + row, z_y)
    if GRADIENT:
        removed = 1.0
        if SHARED:
            removed = tl.load(share + row)
        scale = 1.0 + 2.0 * z_loss * lse
        if WEIGHTED:
            w = tl.load(weight + row)
            scale *= w
            removed *= w
        tl.debug_barrier()
        for start in range(0, classes, COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(z - lse) * scale
            # The difference in float32, then one rounding: p_y − 1 is small for most rows of a trained model.
            gradient = tl.where(at == label, gradient - removed, gradient)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < classes)


def plain_chunk_(
    logits: Tensor, labels: Tensor, label_share: Tensor | None, row_weight: Tensor | None, z_loss: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """nll [m] and z_y [m] in float32 of logits [m, K], which become w·((1 + 2λ·lse)·p − label_share·e_y) in place."""
    nll, label_logit = torch.empty((2, len(logits)), dtype=torch.float32, device=logits.device).unbind()
    if not len(logits):
        return nll, label_logit
    classes = logits.shape[1]
    columns = min(MOST_COLUMNS, triton.next_power_of_2(classes))
    none = nll  # stands for a pointer which is not read
    _row_kernel[(len(logits),)](
        logits, labels, none if label_share is None else label_share.contiguous(),
        none if row_weight is None else row_weight.contiguous(), nll, label_logit, logits.stride(0), classes, z_loss,
        SHARED=label_share is not None, WEIGHTED=row_weight is not None, GRADIENT=needs_gradient, COLUMNS=columns,
        num_warps=max(4, min(16, columns // 512)),
    )  # fmt: skip
    return nll, label_logit
