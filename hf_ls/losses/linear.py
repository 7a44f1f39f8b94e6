"""The smoothed cross entropy of a linear head from its hidden states: logits [N, K] are never built.

Owns: `linear_smoothed_cross_entropy`, `linear_smoothed_terms`, kept rows, reductions, autograd.
Does not own: the matmuls (`linear_chunks`), what a chunk of logits costs (`linear_objective`), GPU kernels
(`linear_cuda`), where the hidden states of a model come from (`head`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ls.losses import _cuda as linear_cuda
from hf_ls.losses._chunks import Needs, RowsAndGradients, chunk_loop
from hf_ls.losses._cuda import Backend, Engine
from hf_ls.losses._rows import Observer, RowLoss, RowObjective, exact_dtype
from hf_ls.losses.cross_entropy import Reduction, check_finite, check_options, check_range
from hf_ls.losses.smoothing import Smoothing


class LinearTerms(NamedTuple):
    """The loss with its graph, and its parts per item for logging: detached, unweighted, like the labels."""

    loss: Tensor  # a scalar; shaped as the labels for reduction="none"
    nll: Tensor  # lse(z) − z_y in nats, 0 where ignored
    smoothing_term: Tensor  # e·(z_y − ⟨u, z⟩) in nats, 0 where ignored; with an objective: its loss − nll


def linear_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    objective: RowObjective | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Smoothed cross entropy of the logits hidden·weightᵀ + bias, in nats, without building them.

    loss = lse(z) − (1−e)·z_y − e·⟨u, z⟩ + λ·lse(z)²  with  z = c·tanh(x/c),  x = logit_scale·(h·Wᵀ + b):
    bias, then scale (Cohere; Granite with 1/logits_scaling; FalconH1), then the soft-cap c (Gemma).
    The same numbers and errors as `losses.smoothed_cross_entropy` gives for z.
    Shapes: hidden [..., d], weight [K, d], bias [K], labels [...] of integers. Float32; float64 for float64.

    Args:
        objective: another loss per row, objective(z [n, K], labels [n]) -> [n], differentiated inside each
            chunk. It brings its own smoothing: `smoothing` is then not used.
        token_weight: [...] >= 0; each item counts that many times, in the denominator of a mean too. A
            constant: for a gradient to it multiply a reduction="none" loss.
        reduction, num_items_in_batch: as in `losses.smoothed_cross_entropy`. With "none" any upstream
            gradient may come, so the backward repeats the forward unless weight and bias are frozen.
        z_loss: λ.
        chunk_rows: rows of logits in memory at a time; None chooses (384 in float32).
        backend: "auto", "torch" or "liger". On CUDA the nll of a plain request is left to Liger's or torch's
            fused kernel (`linear_cuda.choose_engine`), not measured on a GPU. Else always the chunk loop.

    Gradients are made in the forward, in the parameters' dtype, none for a frozen weight. Half precision does
    its softmax in float32. Under autocast the matmuls run in its dtype, as those of `nn.Linear`. A second
    backward through a retained graph computes again. All labels ignored give a differentiable 0.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.1], [0.5, 1.8], [-1.0, 0.2]])
    >>> round(linear_smoothed_cross_entropy(hidden, weight, torch.tensor([0, 1]), 0.1).item(), 6)
    0.413354

    Raises: ValueError/TypeError for shapes, dtypes, labels and options, and for a loss which is not finite;
    RuntimeError under `create_graph=True`: second derivatives need `losses.smoothed_cross_entropy`.
    """
    return linear_smoothed_terms(
        hidden,
        weight,
        labels,
        smoothing,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        objective=objective,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        z_loss=z_loss,
        chunk_rows=chunk_rows,
        backend=backend,
        per_item=False,
    ).loss


# Dynamo would trace into the chunk loop and gain nothing: its work is in a few large matmuls.
@torch.compiler.disable
def linear_smoothed_terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    objective: RowObjective | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
    per_item: bool = True,
    observer: Observer | None = None,
) -> LinearTerms:
    """`linear_smoothed_cross_entropy` with the nll and the smoothing term of each item, in one pass.

    Arguments and errors as there; only `loss` is reduced and weighted. Without `per_item` only the sum of the
    nll need be right, which spares a delegated GPU kernel a second forward; the chunk loop gives all anyway.
    An observer sees the logits and labels of the kept items once, a chunk at a time, and so rules out delegation.
    """
    if not isinstance(smoothing, Smoothing):
        smoothing = Smoothing(smoothing)
    check_tensors(hidden, weight, bias, labels, token_weight)
    check_options(reduction, "example", None, num_items_in_batch, weight.shape[0])
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("chunk_rows", chunk_rows)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected {name} > 0, got {value}; leave it out for none")
    is_kept = labels != ignore_index
    check_range(labels, is_kept, weight.shape[0], ignore_index)
    kept = None if bool(is_kept.all()) else is_kept.flatten().nonzero().squeeze(1)
    dtype = matmul_dtype(hidden, weight)
    row_weight = None
    if token_weight is not None:
        row_weight = gather_rows(token_weight.reshape(-1), kept).to(exact_dtype(dtype))
    call = LinearCall(
        loss=RowLoss(smoothing, objective, softcap, float(z_loss), observer),
        labels=gather_rows(labels.reshape(-1), kept).long(),
        kept=kept,
        shape=labels.shape,
        row_weight=row_weight,
        logit_scale=float(logit_scale),
        reduction=reduction,
        factor=1.0,
        chunk_rows=chunk_rows,
        engine="chunks",
        per_item=per_item,
        dtype=dtype,
    )
    call = replace(call, factor=mean_factor(call, num_items_in_batch), engine=_engine(call, backend, hidden.device.type))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return LinearTerms(*LinearLoss.apply(hidden, weight, bias, call))
    return call.terms(call.solve(hidden, weight, bias, (False, False, False)))


@dataclass(frozen=True, eq=False)
class LinearCall:
    """All of a call but the three differentiable tensors; labels and weights are those of the kept rows."""

    loss: RowLoss
    labels: Tensor  # [n] int64
    kept: Tensor | None  # [n] positions in the flat batch of N; None: all
    shape: torch.Size  # of the labels as given
    row_weight: Tensor | None  # [n]
    logit_scale: float
    reduction: Reduction
    factor: float  # a reduced loss is factor · Σ weight_i · loss_i
    chunk_rows: int | None
    engine: Engine
    per_item: bool
    dtype: torch.dtype  # of the matmuls

    def solve(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> RowsAndGradients:
        """Terms and gradients of the kept rows, by the engine of this call."""
        rows = gather_rows(hidden.reshape(-1, hidden.shape[-1]), self.kept).to(self.dtype)
        head, offset = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        # These casts are all that autocast stands for; left on, it would round the engines' float32 sums.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            common: dict[str, Any] = {
                "logit_scale": self.logit_scale,
                "factor": self.factor,
                "needs": needs,
                "weight_dtype": weight.dtype,
            }
            if self.engine == "chunks":
                common |= {"row_weight": self.row_weight, "chunk_rows": self.chunk_rows}
                found = chunk_loop(self.loss, rows, head, offset, self.labels, **common)
            else:
                kernel = linear_cuda.fused_nll(self.engine)
                common["per_row"] = self.per_item
                found = linear_cuda.delegated(kernel, self.loss, rows, head, offset, self.labels, **common)
        check_finite(found.losses, found.nll)
        return found

    def terms(self, found: RowsAndGradients) -> LinearTerms:
        """The reduced loss and the parts per item, 0 at ignored ones."""
        losses = found.losses if self.row_weight is None else found.losses * self.row_weight
        nll, smoothing_term = (self.scatter(part).reshape(self.shape) for part in (found.nll, found.smoothing_term))
        if self.reduction == "none":
            return LinearTerms(self.scatter(losses).reshape(self.shape), nll, smoothing_term)
        return LinearTerms(losses.sum() * self.factor, nll, smoothing_term)

    def scatter(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] at their places in [N, ...], 0 at ignored ones."""
        if self.kept is None:
            return rows
        return rows.new_zeros((self.shape.numel(), *rows.shape[1:])).index_copy_(0, self.kept, rows)


class LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward; the backward scales them, or computes again where that fails."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall) -> tuple[Tensor, ...]:
        """The terms of the call; its gradients are kept for the backward."""
        needs = ctx.needs_input_grad[:3]
        # Row weights, unknown before the backward, scale the rows of dH but sit inside the sums of dW and db.
        deferred = call.reduction == "none" and (needs[1] or needs[2])
        found = call.solve(hidden, weight, bias, (False, False, False) if deferred else needs)
        ctx.call, ctx.needs, ctx.found = call, needs, None if deferred else found
        ctx.dtypes = hidden.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        terms = call.terms(found)
        ctx.mark_non_differentiable(terms.nll, terms.smoothing_term)
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of (hidden, weight, bias), scaled by the one which comes in.

        Raises: RuntimeError under `create_graph`, since there is no second derivative.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a first derivative of the linear-head loss, got create_graph=True; use "
                "losses.smoothed_cross_entropy on the logits for second derivatives"
            )
        # Whatever is computed again here was observed in the forward.
        call = replace(ctx.call, loss=replace(ctx.call.loss, observer=None))
        grad_loss, found = upstream[0], ctx.found
        if grad_loss is None:
            return None, None, None, None
        # Given away once; a second backward through a retained graph makes them again.
        ctx.found = None
        if call.reduction == "none":
            row_scale = gather_rows(grad_loss.reshape(-1), call.kept)
            if found is None:
                row_weight = row_scale if call.row_weight is None else row_scale * call.row_weight
                found = replace(call, row_weight=row_weight).solve(*ctx.saved_tensors, ctx.needs)
            elif found.grad_hidden is not None:
                found.grad_hidden.mul_(row_scale.unsqueeze(1))
        else:
            if found is None:
                found = call.solve(*ctx.saved_tensors, ctx.needs)
            if not (grad_loss.is_cpu and grad_loss.item() == 1):
                for gradient in (found.grad_hidden, found.grad_weight, found.grad_bias):
                    if gradient is not None:
                        gradient.mul_(grad_loss)
        grad_hidden, grad_bias = found.grad_hidden, found.grad_bias
        if grad_hidden is not None:
            grad_hidden = call.scatter(grad_hidden.to(ctx.dtypes[0])).reshape(*call.shape, grad_hidden.shape[1])
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.dtypes[1])
        return grad_hidden, found.grad_weight, grad_bias, None


def gather_rows(values: Tensor, kept: Tensor | None) -> Tensor:
    """The kept rows of values [N, ...]."""
    return values if kept is None else values.index_select(0, kept)


def mean_factor(call: LinearCall, num_items_in_batch: Tensor | float | None) -> float:
    """1 over what a mean divides by; 0 for a mean over nothing, whose sum is 0."""
    if call.reduction != "mean":
        return 1.0
    if num_items_in_batch is not None:
        return 1 / float(num_items_in_batch) if num_items_in_batch else 1.0
    total = call.labels.numel() if call.row_weight is None else float(call.row_weight.sum())
    return 1 / total if total else 0.0


def _engine(call: LinearCall, backend: Backend, device_type: str) -> Engine:
    prior = call.loss.smoothing.prior
    requested = {
        "an objective": call.loss.objective is not None,
        "a soft-cap": call.loss.softcap is not None,
        "a z-loss": bool(call.loss.z_loss),
        "a prior per label": prior is not None and prior.dim() == 2,
        "token weights": call.row_weight is not None,
        "reduction='none'": call.reduction == "none",
        "an observer": call.loss.observer is not None,
    }
    engine = linear_cuda.choose_engine(
        backend,
        device_type,
        unsupported=next((what for what, present in requested.items() if present), None),
        has_liger=device_type == "cuda" and linear_cuda.has_liger(),
        has_torch_operator=linear_cuda.has_torch_operator(),
    )
    return engine if call.labels.numel() else "chunks"


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `nn.Linear` would multiply here: autocast casts all but float64."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"expected hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}; cast one or use autocast"
        )
    return hidden.dtype


def check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weight: Tensor | None) -> None:
    """Refuse tensors which do not fit together.

    Raises: TypeError for their dtypes, ValueError for their shapes and for token weights below 0 or with a gradient.
    """
    given = tuple(hidden.shape), tuple(weight.shape)
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(
            f"expected floating-point hidden and weight, got {hidden.dtype} and {weight.dtype}; "
            "a quantised head needs the dense path"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}; cast class ids to long")
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [..., d] and weight [K, d], got {given[0]} and {given[1]}; "
            "pass the input and the weight of the head"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected labels {given[0][:-1]} for hidden {given[0]}, got {tuple(labels.shape)}; "
            "one label per hidden state (use the causal-LM shift for language models)"
        )
    if weight.shape[0] < 2:
        raise ValueError(f"expected a head over at least 2 classes, got {given[1][0]}; one output is a regression head")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{given[1][0]}], got {tuple(bias.shape)}; flatten it")
    if token_weight is not None:
        if token_weight.requires_grad:
            raise ValueError("expected token_weight without a gradient, got one; multiply a reduction='none' loss by it")
        if token_weight.shape != labels.shape or not bool((token_weight >= 0).all()):
            raise ValueError(
                f"expected token_weight {tuple(labels.shape)} >= 0, got {tuple(token_weight.shape)}; one weight per label"
            )
