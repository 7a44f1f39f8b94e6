"""The smoothed cross entropy of a linear head from its hidden states: logits [N, K] are never built.

Owns: `linear_smoothed_cross_entropy`, `linear_smoothed_terms`, dropping ignored rows, reductions, the autograd function.
Does not own: the matmuls (`linear_chunks`), what a chunk of logits costs (`linear_objective`), GPU kernels (`linear_cuda`),
where the hidden states of a model come from (`head`).

How: ignored rows are dropped before the matmul. Per chunk of rows: logits = h·Wᵀ, softmax in place, the label's share
scattered in, and both gradient matmuls at once. ⟨u, z⟩ = h·(Wᵀu) needs no pass over the logits; Wᵀu and the prior's
rank-1 part of dW come from one extra row in the first chunk's two gradient matmuls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ls import linear_cuda
from hf_ls.linear_chunks import Needs, RowsAndGradients, chunk_loop
from hf_ls.linear_cuda import Backend, Engine
from hf_ls.linear_objective import Objective, RowLoss, exact_dtype
from hf_ls.losses import Reduction, _check_finite, _check_options, _check_range
from hf_ls.smoothing import Smoothing


class LinearTerms(NamedTuple):
    """The loss with its graph, and its per-item parts for logging: detached, unweighted, shaped as the labels."""

    loss: Tensor  # a scalar, or shaped as the labels for reduction="none"
    nll: Tensor  # lse(z) − z_y in nats, 0 where ignored
    smoothing_term: Tensor  # e·(z_y − ⟨u, z⟩) in nats, 0 where ignored; for an objective: its loss − nll


def linear_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    objective: Objective | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Smoothed cross entropy of logits = hidden·weightᵀ + bias, in nats, without building the logits.

    loss = lse(z) − (1−e)·z_y − e·⟨u, z⟩ + λ·lse(z)²  with  z = c·tanh(x/c), x = logit_scale·(h·Wᵀ + b):
    the bias first, then the scale (Cohere; Granite with 1/logits_scaling; FalconH1), then the soft-cap c (Gemma).
    The same numbers and errors as `losses.smoothed_cross_entropy` of those logits.
    Shapes: hidden [..., d], weight [K, d], bias [K], labels [...] of integers. The loss is float32, or float64 for float64.

    Args:
        objective: another per-row loss, objective(z [n, K], labels [n]) -> [n], differentiated inside each chunk. It
            brings its own smoothing: `smoothing` is then not used.
        token_weight: [...] >= 0; each item counts that many times, in a mean's denominator too. A constant: for a
            gradient to it multiply a reduction="none" loss.
        reduction, num_items_in_batch: as in `losses.smoothed_cross_entropy`. "none" repeats the forward in the backward
            unless the head is frozen, because any upstream gradient may come.
        z_loss: λ of the z-loss, λ·lse².
        chunk_rows: rows of logits in memory at a time; None chooses.
        backend: "auto", "torch" or "liger"; on CUDA the nll of a plain request is left to Liger's or torch's fused kernel
            (`linear_cuda.choose_engine`), which was not measured on a GPU. Without CUDA always the chunk loop here.

    Gradients are taken in the forward, in the parameters' dtype, none for a frozen weight; half precision does its
    softmax in float32. Under autocast the matmuls run in the autocast dtype, as `nn.Linear` does. A second backward
    recomputes. A batch with every label ignored gives a differentiable 0.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.1], [0.5, 1.8], [-1.0, 0.2]])
    >>> round(linear_smoothed_cross_entropy(hidden, weight, torch.tensor([0, 1]), 0.1).item(), 4)
    0.4097

    Raises: ValueError/TypeError for shapes, dtypes, labels, options and non-finite losses; RuntimeError for
    `create_graph=True` (second derivatives need `losses.smoothed_cross_entropy`).
    """
    # Without per-row parts a delegated kernel can spare its second forward.
    terms = _linear_terms(
        hidden, weight, labels, smoothing, bias=bias, logit_scale=logit_scale, softcap=softcap, objective=objective,
        ignore_index=ignore_index, token_weight=token_weight, reduction=reduction, num_items_in_batch=num_items_in_batch,
        z_loss=z_loss, chunk_rows=chunk_rows, backend=backend, per_row=False,
    )  # fmt: skip
    return terms.loss


def linear_smoothed_terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    objective: Objective | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> LinearTerms:
    """`linear_smoothed_cross_entropy` with the hard nll and the smoothing term of each item beside it, in one pass.

    Arguments and errors as there. The parts are detached, unweighted and shaped as the labels; only `loss` is reduced.
    """
    return _linear_terms(
        hidden, weight, labels, smoothing, bias=bias, logit_scale=logit_scale, softcap=softcap, objective=objective,
        ignore_index=ignore_index, token_weight=token_weight, reduction=reduction, num_items_in_batch=num_items_in_batch,
        z_loss=z_loss, chunk_rows=chunk_rows, backend=backend, per_row=True,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Request:
    """All of a call but the three differentiable tensors; labels and weights are those of the kept rows."""

    loss: RowLoss
    labels: Tensor  # [n] int64
    kept: Tensor | None  # [n] positions in the flat batch; None: all
    shape: torch.Size  # of the labels as given
    row_weight: Tensor | None  # [n]
    logit_scale: float
    reduction: Reduction
    factor: float  # the loss is factor · Σ weight_i · loss_i
    chunk_rows: int | None
    engine: Engine
    per_row: bool
    dtype: torch.dtype  # of the matmuls

    def gather(self, values: Tensor) -> Tensor:
        """The kept rows of values [N, ...]."""
        return values if self.kept is None else values.index_select(0, self.kept)

    def scatter(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] back at their places in [N, ...], 0 at ignored ones."""
        if self.kept is None:
            return rows
        values = rows.new_zeros((self.shape.numel(), *rows.shape[1:]))
        return values.index_copy_(0, self.kept, rows)

    def solve(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> RowsAndGradients:
        """Terms and gradients of the kept rows, by the engine of this request."""
        rows = self.gather(hidden.reshape(-1, hidden.shape[-1])).to(self.dtype)
        head, offset = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        # The casts above are all that autocast stands for; left on, it would round the float32 sums of the engines.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if self.engine == "chunks":
                found = chunk_loop(
                    self.loss, rows, head, offset, self.labels, self.row_weight, logit_scale=self.logit_scale,
                    factor=self.factor, needs=needs, weight_dtype=weight.dtype, chunk_rows=self.chunk_rows,
                )  # fmt: skip
            else:
                found = linear_cuda.delegated(
                    linear_cuda.fused_nll(self.engine), self.loss, rows, head, offset, self.labels, logit_scale=self.logit_scale,
                    factor=self.factor, needs=needs, weight_dtype=weight.dtype, per_row=self.per_row,
                )  # fmt: skip
        _check_finite(found.losses, found.nll)
        return found

    def terms(self, found: RowsAndGradients) -> LinearTerms:
        """The reduced loss and the per-item parts."""
        losses = found.losses if self.row_weight is None else found.losses * self.row_weight
        per_item = (self.scatter(part).reshape(self.shape) for part in (losses, found.nll, found.smoothing_term))
        losses, nll, smoothing_term = per_item
        return LinearTerms(losses if self.reduction == "none" else losses.sum() * self.factor, nll, smoothing_term)


class _LinearLoss(torch.autograd.Function):
    """The gradients are made in the forward; the backward scales them, or repeats the work where that is not enough."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: _Request) -> tuple[Tensor, Tensor, Tensor]:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        # Unknown weights per row would have to enter the sums over rows in dW and db, but only scale the rows of dH.
        deferred = request.reduction == "none" and (needs[1] or needs[2])
        found = request.solve(hidden, weight, bias, (False, False, False) if deferred else needs)
        ctx.request, ctx.needs, ctx.found = request, needs, None if deferred else found
        ctx.hidden_dtype, ctx.bias_dtype = hidden.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        loss, nll, smoothing_term = request.terms(found)
        ctx.mark_non_differentiable(nll, smoothing_term)
        return loss, nll, smoothing_term

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a first derivative of the linear-head loss, got create_graph=True; use "
                "losses.smoothed_cross_entropy on the logits for second derivatives"
            )
        grad_loss, request, found = upstream[0], ctx.request, ctx.found
        if grad_loss is None:
            return None, None, None, None
        # Given away once; a second backward through a retained graph makes them again.
        ctx.found = None
        row_scale = request.gather(grad_loss.reshape(-1)) if request.reduction == "none" else None
        if found is None:
            if row_scale is not None:
                weighted = row_scale if request.row_weight is None else row_scale * request.row_weight
                request, row_scale = replace(request, row_weight=weighted), None
            found = request.solve(*ctx.saved_tensors, ctx.needs)
        elif row_scale is not None and found.grad_hidden is not None:
            found.grad_hidden.mul_(row_scale.unsqueeze(1))
        if request.reduction != "none" and not (grad_loss.is_cpu and grad_loss.item() == 1):
            for gradient in (found.grad_hidden, found.grad_weight, found.grad_bias):
                if gradient is not None:
                    gradient.mul_(grad_loss)
        grad_hidden, grad_bias = found.grad_hidden, found.grad_bias
        if grad_hidden is not None:
            grad_hidden = request.scatter(grad_hidden.to(ctx.hidden_dtype)).reshape(*request.shape, -1)
        return grad_hidden, found.grad_weight, None if grad_bias is None else grad_bias.to(ctx.bias_dtype), None


# Dynamo would trace into the chunk loop and gain nothing: its work is in a few large matmuls.
@torch.compiler.disable
def _linear_terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    objective: Objective | None,
    ignore_index: int,
    token_weight: Tensor | None,
    reduction: Reduction,
    num_items_in_batch: Tensor | float | None,
    z_loss: float,
    chunk_rows: int | None,
    backend: Backend,
    per_row: bool,
) -> LinearTerms:
    if not isinstance(smoothing, Smoothing):
        smoothing = Smoothing(smoothing)
    _check_tensors(hidden, weight, bias, labels, token_weight)
    _check_options(reduction, "example", None, num_items_in_batch, weight.shape[0])
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("chunk_rows", chunk_rows)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected {name} > 0, got {value}; leave it out for none")
    is_kept = labels != ignore_index
    _check_range(labels, is_kept, weight.shape[0], ignore_index)
    kept = None if bool(is_kept.all()) else is_kept.flatten().nonzero().squeeze(1)
    dtype = _matmul_dtype(hidden, weight)
    request = _Request(
        RowLoss(smoothing, objective, softcap, float(z_loss)),
        labels.reshape(-1).long(), kept, labels.shape, token_weight, float(logit_scale), reduction, 1.0, chunk_rows, "chunks", per_row, dtype,
    )  # fmt: skip
    if token_weight is not None:
        request = replace(request, row_weight=request.gather(token_weight.reshape(-1)).to(exact_dtype(dtype)))
    request = replace(request, labels=request.gather(request.labels))
    request = replace(request, factor=_factor(request, num_items_in_batch), engine=_engine(request, backend, hidden.device.type))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return LinearTerms(*_LinearLoss.apply(hidden, weight, bias, request))
    return request.terms(request.solve(hidden, weight, bias, (False, False, False)))


def _factor(request: _Request, num_items_in_batch: Tensor | float | None) -> float:
    """1 / what a mean divides by; 0 for a mean over nothing, whose sum is 0."""
    if request.reduction != "mean":
        return 1.0
    if num_items_in_batch is not None:
        return 1 / float(num_items_in_batch) if num_items_in_batch else 1.0
    total = request.labels.numel() if request.row_weight is None else float(request.row_weight.sum())
    return 1 / total if total else 0.0


def _engine(request: _Request, backend: Backend, device_type: str) -> Engine:
    prior = request.loss.smoothing.prior
    has = {
        "an objective": request.loss.objective is not None,
        "a soft-cap": request.loss.softcap is not None,
        "a z-loss": bool(request.loss.z_loss),
        "a prior per label": prior is not None and prior.dim() == 2,
        "token weights": request.row_weight is not None,
        "reduction='none'": request.reduction == "none",
    }
    unsupported = next((what for what, present in has.items() if present), None)
    engine = linear_cuda.choose_engine(
        backend,
        device_type,
        unsupported=unsupported,
        has_liger=linear_cuda.has_liger(),
        has_torch_operator=linear_cuda.has_torch_operator(),
    )
    return engine if request.labels.numel() else "chunks"


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `nn.Linear` would multiply here: autocast casts all but float64."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"expected hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}; cast one or use autocast")
    return hidden.dtype


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weight: Tensor | None) -> None:
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"expected floating-point hidden and weight, got {hidden.dtype} and {weight.dtype}; pass the layer's tensors")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}; cast class ids to long")
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [..., d] and weight [K, d], got {tuple(hidden.shape)} and {tuple(weight.shape)}; pass the input "
            "and the weight of the head's nn.Linear"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected labels {tuple(hidden.shape[:-1])} for hidden {tuple(hidden.shape)}, got {tuple(labels.shape)}; one label "
            "per hidden state (use the causal-LM shift for language models)"
        )
    if weight.shape[0] < 2:
        raise ValueError(f"expected a head over at least 2 classes, got {weight.shape[0]}; a single output is a regression head")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{weight.shape[0]}], got {tuple(bias.shape)}; pass the head's bias, flattened")
    if token_weight is not None:
        if token_weight.requires_grad:
            raise ValueError("expected token_weight without a gradient, got one; multiply a reduction='none' loss by it instead")
        if token_weight.shape != labels.shape or not bool((token_weight >= 0).all()):
            raise ValueError(
                f"expected token_weight {tuple(labels.shape)} >= 0, got {tuple(token_weight.shape)}; one weight per label"
            )
