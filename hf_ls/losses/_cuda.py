"""Which engine computes the linear-head loss on a GPU, and the prior part outside another library's kernel.

Owns: the choice of engine as a pure function; the delegation of the nll to Liger or torch's fused operator.
Does not own: the chunk loop (`linear_chunks`), which is the only engine on a CPU and serves every request.

Not measured on a GPU: the delegation is tested on a CPU with torch's operator and with stand-ins for Liger.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls.losses._chunks import Needs, PriorRow, RowsAndGradients
from hf_ls.losses._rows import RowLoss, exact_dtype, prior_dot

Backend = Literal["auto", "torch", "liger"]
Engine = Literal["chunks", "torch", "liger"]
# (hidden [n, d], weight [K, d], labels [n], bias [K] or None, "sum" or "none") -> nll, a scalar or [n]
FusedNll = Callable[[Tensor, Tensor, Tensor, Tensor | None, str], Tensor]


def choose_engine(
    backend: Backend, device_type: str, *, unsupported: str | None, has_liger: bool, has_torch_operator: bool
) -> Engine:
    """The engine for a request: on CUDA Liger, torch's operator or the chunk loop; elsewhere the chunk loop.

    Args:
        backend: "auto" takes the first which can serve; "torch" leaves Liger out; "liger" insists on it.
        unsupported: what in the request a kernel for the plain nll cannot serve, in words, or None.

    Raises: ValueError for an unknown backend; for "liger" without CUDA, uninstalled, or with `unsupported`.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"expected backend in {get_args(Backend)}, got {backend!r}; choose one of them")
    if backend == "liger":
        if device_type != "cuda":
            raise ValueError(f"expected CUDA tensors with backend='liger', got {device_type}; use backend='auto'")
        if not has_liger:
            raise ValueError("expected liger-kernel installed, got backend='liger' without it; pip install liger-kernel")
        if unsupported:
            raise ValueError(
                f"expected a plain smoothed cross entropy with backend='liger', got {unsupported}; use backend='auto'"
            )
    if device_type != "cuda" or unsupported:
        return "chunks"
    if has_liger and backend != "torch":
        return "liger"
    return "torch" if has_torch_operator else "chunks"


def has_liger() -> bool:
    """Whether liger-kernel can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def has_torch_operator() -> bool:
    """Whether this torch has the chunked `linear_cross_entropy` (torch >= 2.13)."""
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


def fused_nll(engine: Engine) -> FusedNll:
    """The nll kernel behind an engine name."""
    return _liger_nll if engine == "liger" else _torch_nll


def _torch_nll(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction=reduction, options=options)


def _liger_nll(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)


def delegated(
    kernel: FusedNll,
    loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    logit_scale: float,
    factor: float,
    needs: Needs,
    weight_dtype: torch.dtype,
    per_row: bool,
) -> RowsAndGradients:
    """The nll of rows [n, d] by a library's kernel, and e_i·(z_y − ⟨u, z⟩) = e_i·h_i·(W_y − Wᵀu) added
    outside it.

    The gradient of the second part, rank 1 plus one row per label, goes into the kernel's own gradients in
    place. Without `per_row` the kernel spares its second forward; each row's nll is then the mean over the
    rows.
    """
    exact = exact_dtype(hidden.dtype)
    scaled = hidden if logit_scale == 1 else hidden * logit_scale
    offset = bias if bias is None or logit_scale == 1 else bias * logit_scale
    with torch.enable_grad():
        leaf_hidden = scaled.detach().requires_grad_(needs[0])
        leaf_weight = weight.detach().requires_grad_(needs[1])
        leaf_offset = None if offset is None else offset.detach().requires_grad_(needs[2])
        nll = kernel(leaf_hidden, leaf_weight, labels, leaf_offset, "none" if per_row else "sum")
        wanted = [leaf for leaf in (leaf_hidden, leaf_weight, leaf_offset) if leaf is not None and leaf.requires_grad]
        # Of a sum, because both libraries are exact for a gradient which is the same for every row.
        found = iter(torch.autograd.grad(nll.sum(), wanted) if wanted else ())
    nll = (nll.detach() if per_row else nll.detach() / labels.numel()).to(exact).expand(labels.shape)
    grad_hidden = next(found).to(exact) if needs[0] else None
    grad_weight = next(found) if needs[1] else None
    grad_offset = next(found).to(exact) if needs[2] else None
    term = torch.zeros_like(nll)
    if loss.rides_along:
        u = PriorRow.of(loss, labels, None, weight.shape[0], hidden)
        difference = weight[labels].to(exact) - u.prior_mean(weight)
        term = (scaled.to(exact) * difference).sum(1)
        if offset is not None:
            term += offset.to(exact)[labels] - prior_dot(u.prior, offset)
        term *= u.mixing
        if grad_hidden is not None:
            grad_hidden.addcmul_(u.mixing.unsqueeze(1), difference)
        if grad_weight is not None:
            grad_weight.index_add_(0, labels, (u.mixing.unsqueeze(1) * scaled.to(exact)).to(grad_weight.dtype))
            grad_weight.addr_(u.row.to(grad_weight.dtype), u.partner(scaled)[0].to(grad_weight.dtype))
        if grad_offset is not None:
            grad_offset.index_add_(0, labels, u.mixing).sub_(u.mixing.sum() * u.prior)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight_dtype).mul_(factor)
    for small in (grad_hidden, grad_offset):
        if small is not None:
            small.mul_(factor * logit_scale)
    return RowsAndGradients(nll + term, nll, term, grad_hidden, grad_weight, grad_offset)
