"""The smoothed cross entropy of a linear head from its hidden states: logits [N, K] are never built.

Here are the checks, reductions and autograd. Which rows are kept, and the matmuls, are in `_chunks`, what a chunk of logits
costs in `_rows`, and the same for a head which is divided among processes in `_vocab_parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_ls.losses import _checks
from hf_ls.losses._checks import Reduction, check_finite, check_options, check_range, check_weights, class_ids
from hf_ls.losses._chunks import KeptRows, Needs, RowsAndGradients, chunk_loop, scaled_sum
from hf_ls.losses._rows import RowLoss, RowObjective, exact_dtype
from hf_ls.losses._skipping import GradientCertificate, Thresholds
from hf_ls.losses.cross_entropy import check_soft_targets
from hf_ls.losses.smoothing import Smoothing

if TYPE_CHECKING:
    import torch.distributed as dist

    from hf_ls.losses._vocab_parallel import Shard


GradientTolerance = float | Literal["auto"] | None


class LinearTerms(NamedTuple):
    """The loss with its graph, and its parts per item for logging: detached, unweighted, like the labels."""

    loss: Tensor  # a scalar; shaped as the labels for reduction="none"
    nll: Tensor  # lse(z) − z_y in nats, 0 where ignored
    smoothing_term: Tensor  # e·(z_y − ⟨u, z⟩) in nats, 0 where ignored; with an objective: its loss − nll
    certificate: GradientCertificate | None = None  # of gradients made with a tolerance


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
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    gradient_tolerance: GradientTolerance = None,
) -> Tensor:
    """Smoothed cross entropy of the logits hidden·weightᵀ + bias, in nats, without building them.

    loss = lse(z) − (1−e)·z_y − e·⟨u, z⟩ + λ·lse(z)²  with  z = c·tanh(x/c),  x = logit_scale·(h·Wᵀ + b):
    bias, then scale (Cohere; Granite with 1/logits_scaling; FalconH1), then the soft-cap c (Gemma).
    The same numbers and errors as `smoothed_cross_entropy` gives for z.
    Shapes: hidden [..., d], weight [K, d], bias [K], labels [...] of integers. Float32; float64 for float64.

    Args:
        objective: another loss per row, objective(z [n, K], labels [n]) -> [n], differentiated inside each
            chunk. It brings its own smoothing: `smoothing` is then not used.
        z_loss: λ ≥ 0.
        token_weight: [...] >= 0; each item counts that many times, in the denominator of a mean too. A
            constant: for a gradient to it multiply a reduction="none" loss.
        reduction, num_items_in_batch: as in `smoothed_cross_entropy`. With "none" any upstream gradient may
            come, so the backward repeats the forward unless weight and bias are frozen.
        group: processes which share the head by its rows (a vocabulary-parallel head): weight and bias are then this process's
            [K_r, d] and [K_r], in the order of the ranks and of any sizes, hidden and labels the same everywhere, and a prior
            covers all K = Σ K_r classes. A DTensor with the placement Shard(0) on one mesh dimension says so itself.
        chunk_rows: rows of logits in memory at a time; None chooses (384 in float32, 4096 on CUDA).
        gradient_tolerance: the relative error which the gradients may have, e.g. 5e-3: then only the entries with nearly all
            probability take part in their matmuls, the rest as one mean (see `_skipping`). "auto" is a quarter of bfloat16's
            step, and exact in other dtypes. The loss is exact always. Without effect on CUDA, in float16, with a soft-cap, an
            objective or a group; where too much is needed (an untrained model), all take part.
            `linear_smoothed_terms` returns a certificate of the error.

    Gradients are made in the forward, in the parameters' dtype, none for a frozen weight. Half precision does
    its softmax in float32. Under autocast the matmuls run in its dtype, as those of `nn.Linear`. A second
    backward through a retained graph computes again. All labels ignored give a differentiable 0.
    In training on CUDA nothing waits for the device: wrong labels and losses which are not finite end in an assertion there.

    With a group every process gets the same loss, the whole gradient of `hidden` (do not reduce it again) and that of its own
    rows, if the upstream gradient is the same everywhere. All processes must call it, and its backward, in the same order.
    Megatron's `vocab_parallel_cross_entropy(label_smoothing=ε)` computes another loss on R > 1 processes: each takes the mean
    log-probability of its own classes only, so that the processes disagree and the target sums to more than 1.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.1], [0.5, 1.8], [-1.0, 0.2]])
    >>> round(linear_smoothed_cross_entropy(hidden, weight, torch.tensor([0, 1]), 0.1).item(), 6)
    0.413354

    Raises: ValueError/TypeError for shapes, dtypes, labels and options, and for a loss which is not finite;
    RuntimeError under `create_graph=True`: second derivatives need `smoothed_cross_entropy`.
    """
    if not isinstance(smoothing, Smoothing):
        smoothing = Smoothing(smoothing)
    return linear_smoothed_terms(
        hidden,
        weight,
        labels,
        RowLoss(smoothing, objective, logit_scale, softcap, z_loss),
        bias=bias,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        group=group,
        chunk_rows=chunk_rows,
        gradient_tolerance=gradient_tolerance,
    ).loss


# Dynamo would trace into the chunk loop and gain nothing: its work is in a few large matmuls.
@torch.compiler.disable
def linear_smoothed_terms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: RowLoss,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    gradient_tolerance: GradientTolerance = None,
    thresholds: Thresholds | None = None,
) -> LinearTerms:
    """`linear_smoothed_cross_entropy` with the nll and the smoothing term of each item, in one pass.

    `loss` says what a row costs. Arguments and errors as there; only the field `loss` is reduced and weighted. thresholds: those
    of the certificate of an earlier step, so that a tolerance need not search for them.
    """
    with _checks.training(torch.is_grad_enabled()):
        shard = None
        if group is not None or any(type(t) not in (Tensor, nn.Parameter) for t in (hidden, weight, bias) if t is not None):
            from hf_ls.losses._vocab_parallel import divided

            weight, bias, shard = divided(hidden, weight, bias, group, loss)
        labels = class_ids(labels)
        classes = weight.shape[0] if shard is None else shard.classes
        check_tensors(hidden, weight, bias, labels, token_weight, classes)
        check_options(reduction, None, num_items_in_batch, classes)
        if chunk_rows is not None and not chunk_rows > 0:
            raise ValueError(f"expected chunk_rows > 0, got {chunk_rows}; leave it out to have it chosen")
        is_kept = labels != ignore_index
        check_range(labels, is_kept, classes, ignore_index)
        dtype = matmul_dtype(hidden, weight)
        # An observer and an objective see the kept rows and no others, so their number must be known beforehand.
        rows = KeptRows.of(is_kept.flatten(), wait=loss.observer is not None or loss.objective is not None or shard is not None)
        row_weight = None if token_weight is None else rows.gather(token_weight.reshape(-1)).to(exact_dtype(dtype))
        call = LinearCall(
            loss=loss,
            labels=rows.gather(labels.reshape(-1)),
            rows=rows,
            shape=labels.shape,
            row_weight=row_weight,
            reduction=reduction,
            factor=mean_factor(rows, row_weight, num_items_in_batch, exact_dtype(dtype)) if reduction == "mean" else 1.0,
            chunk_rows=chunk_rows,
            tolerance=tolerance_in(gradient_tolerance, dtype),
            thresholds=thresholds,
            dtype=dtype,
            shard=shard,
        )
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            return LinearTerms(*LinearLoss.apply(hidden, weight, bias, call))
        return call.terms(call.solve(hidden, weight, bias, (False, False, False)))


@dataclass(frozen=True, eq=False)
class LinearCall:
    """All of a call but the three differentiable tensors; labels and weights are those of the kept rows."""

    loss: RowLoss
    labels: Tensor  # [n] int64
    rows: KeptRows  # n of the flat batch of N
    shape: torch.Size  # of the labels as given
    row_weight: Tensor | None  # [n]
    reduction: str
    factor: float | Tensor  # a reduced loss is factor · Σ weight_i · loss_i; a tensor where its value is on a GPU
    chunk_rows: int | None
    tolerance: float | None  # of the gradients; None: exact
    thresholds: Thresholds | None  # where to begin for it; None: a guess
    dtype: torch.dtype  # of the matmuls
    shard: Shard | None  # which classes this process holds; None: all

    def solve(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> RowsAndGradients:
        """Terms and gradients of the kept rows."""
        chosen = self.rows.without_ignored(self.rows.gather(hidden.reshape(-1, hidden.shape[-1])).to(self.dtype))
        head, offset = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        options: dict[str, Any] = {
            "factor": self.factor,
            "needs": needs,
            "weight_dtype": weight.dtype,
            "chunk_rows": self.chunk_rows,
        }
        # These casts are all that autocast stands for; left on, it would round the float32 sums.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if self.shard is None:
                found = chunk_loop(
                    self.loss, chosen, head, offset, self.labels, self.row_weight,
                    rows=self.rows, tolerance=self.tolerance, thresholds=self.thresholds, **options,
                )  # fmt: skip
            else:
                from hf_ls.losses._vocab_parallel import shard_chunk_loop

                found = shard_chunk_loop(
                    self.loss, chosen, head, offset, self.labels, self.row_weight, shard=self.shard, **options
                )
        check_finite(found.losses)
        return found

    def terms(self, found: RowsAndGradients) -> LinearTerms:
        """The reduced loss and the parts per item, 0 at ignored ones."""
        losses = found.losses if self.row_weight is None else found.losses * self.row_weight
        nll, smoothing_term = (self.scatter(part).reshape(self.shape) for part in (found.nll, found.smoothing_term))
        if self.reduction == "none":
            return LinearTerms(self.scatter(losses).reshape(self.shape), nll, smoothing_term, found.certificate)
        return LinearTerms(losses.sum() * self.factor, nll, smoothing_term, found.certificate)

    def scatter(self, values: Tensor) -> Tensor:
        """Values [n, ...] of the kept rows at their places in [N, ...], 0 at ignored ones."""
        return self.rows.scatter(values, self.shape.numel())


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
        return tuple(terms)  # type: ignore[arg-type]  # the certificate is no tensor, and passes through

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of (hidden, weight, bias), scaled by the one which comes in.

        Raises: RuntimeError under `create_graph`, since there is no second derivative.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a first derivative of the linear-head loss, got create_graph=True; use "
                "smoothed_cross_entropy on the logits for second derivatives"
            )
        # Whatever is computed again here was observed in the forward.
        call = replace(ctx.call, loss=replace(ctx.call.loss, observer=None))
        grad_loss, found = upstream[0], ctx.found
        if grad_loss is None:
            return None, None, None, None
        # Given away once; a second backward through a retained graph makes them again.
        ctx.found = None
        if call.reduction == "none":
            row_scale = call.rows.gather(grad_loss.reshape(-1))
            if found is None:
                row_weight = row_scale if call.row_weight is None else row_scale * call.row_weight
                found = again(replace(call, row_weight=row_weight), ctx)
            elif found.grad_hidden is not None:
                found.grad_hidden.mul_(row_scale.unsqueeze(1))
            grad_weight = found.grad_weight
        else:
            if found is None:
                found = again(call, ctx)
            grad_weight = found.grad_weight
            scaled = [found.grad_hidden, found.grad_bias]
            if grad_weight is not None and isinstance(call.factor, Tensor):
                grad_weight = scaled_sum(grad_weight, call.factor * grad_loss, ctx.saved_tensors[1].dtype)
            else:
                scaled.append(grad_weight)
            if not (grad_loss.is_cpu and grad_loss.item() == 1):
                for gradient in scaled:
                    if gradient is not None:
                        gradient.mul_(grad_loss)
        grad_hidden, grad_bias = found.grad_hidden, found.grad_bias
        if grad_hidden is not None:
            grad_hidden = call.scatter(grad_hidden.to(ctx.dtypes[0])).reshape(*call.shape, grad_hidden.shape[1])
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.dtypes[1])
        return grad_hidden, grad_weight, grad_bias, None


def again(call: LinearCall, ctx: Any) -> RowsAndGradients:
    """The gradients which a backward needs and the forward has not kept."""
    hidden, weight, bias = ctx.saved_tensors
    with _checks.training(True):
        return call.solve(hidden, weight, bias, ctx.needs)


def mean_factor(
    rows: KeptRows, row_weight: Tensor | None, num_items_in_batch: Tensor | float | None, dtype: torch.dtype
) -> float | Tensor:
    """1 over what a mean divides by; 0 for a mean over nothing, whose sum is 0. A tensor where the value is on a GPU."""
    if num_items_in_batch is None:
        total: Tensor | float = rows.total(row_weight)
        empty = 0.0
    else:
        total, empty = num_items_in_batch, 1.0
    if isinstance(total, Tensor) and _checks.reading_waits(total):
        total = total.detach().to(dtype).reshape(())
        return torch.where(total == 0, empty, total.reciprocal())
    return 1 / float(total) if total else empty


def tolerance_in(gradient_tolerance: GradientTolerance, dtype: torch.dtype) -> float | None:
    """The relative error which gradients made in `dtype` may have; None for exact ones.

    "auto" is a quarter of bfloat16's step: plain bfloat16 arithmetic has two to nine times that error.

    Raises: ValueError for anything but a number between 0 and 1, "auto" and None.
    """
    if gradient_tolerance == "auto":
        return torch.finfo(dtype).eps / 4 if dtype == torch.bfloat16 else None
    if gradient_tolerance is None:
        return None
    if isinstance(gradient_tolerance, str | bool) or not 0 < gradient_tolerance < 1:
        raise ValueError(
            f"expected gradient_tolerance above 0 and below 1, 'auto' or None, got {gradient_tolerance!r}; 5e-3 is about half "
            "the error of bfloat16"
        )
    return float(gradient_tolerance)


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


def check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weight: Tensor | None, classes: int
) -> None:
    """Refuse tensors which do not fit together; `classes` counts those of all processes.

    Raises: TypeError for their dtypes, ValueError for their shapes and for token weights below 0 or with a gradient.
    """
    given = tuple(hidden.shape), tuple(weight.shape)
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(
            f"expected floating-point hidden and weight, got {hidden.dtype} and {weight.dtype}; "
            "a quantised head needs the dense path"
        )
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
    if classes < 2:
        raise ValueError(f"expected a head over at least 2 classes, got {classes}; one output is a regression head")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected bias [{given[1][0]}] as the weight has rows, got {tuple(bias.shape)}; flatten or shard it alike"
        )
    if token_weight is not None:
        if token_weight.requires_grad:
            raise ValueError(
                "expected token_weight without a gradient, got requires_grad=True; multiply a reduction='none' loss by it"
            )
        if token_weight.shape != labels.shape:
            raise ValueError(
                f"expected token_weight {tuple(labels.shape)} >= 0, got {tuple(token_weight.shape)}; one weight per label"
            )
        check_weights("token_weight", token_weight)


def linear_soft_target_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: Smoothing | float = 0.0,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross entropy of the logits hidden·weightᵀ + bias against a distribution per item, in nats, without building the logits.

    loss = lse(z) − ⟨t, z⟩ with t = (1−ε)·q + ε·u: the normaliser, and a part which is linear in the hidden states,
    ⟨t, z⟩ = s·(h·(Wᵀt) + ⟨t, b⟩). A soft-cap would bend it: such a head needs its logits, and `smoothed_cross_entropy`.
    Shapes: hidden [..., d], weight [K, d], bias [K], targets q [..., K] whose rows sum to 1.

    Args: as in `linear_smoothed_cross_entropy`; smoothing: ε > 0 smooths targets which are soft already.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.1], [0.5, 1.8], [-1.0, 0.2]])
    >>> round(linear_soft_target_cross_entropy(hidden, weight, torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.5, 0.5]])).item(), 6)
    0.833354

    Raises: ValueError for targets of another shape or which are no distributions, with ε > 0 for convention "wrong" or a prior
    [K, K], and as `linear_smoothed_cross_entropy`.
    """
    smoothing = smoothing if isinstance(smoothing, Smoothing) else Smoothing(smoothing)
    if targets.shape != (*hidden.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"expected targets {(*hidden.shape[:-1], weight.shape[0])} for hidden {tuple(hidden.shape)} and weight "
            f"{tuple(weight.shape)}, got {tuple(targets.shape)}; one distribution per hidden state"
        )
    check_soft_targets(targets, smoothing)
    dtype, epsilon = matmul_dtype(hidden, weight), smoothing.epsilon
    top = targets.argmax(-1)
    hard = linear_smoothed_terms(
        hidden, weight, top, RowLoss(Smoothing(0.0), logit_scale=logit_scale), bias=bias, token_weight=token_weight,
        reduction=reduction, num_items_in_batch=num_items_in_batch, chunk_rows=chunk_rows,
    ).loss  # fmt: skip
    q, head = targets.reshape(-1, targets.shape[-1]).to(dtype), weight.to(dtype)
    # z_top − ⟨t, z⟩ is a difference of two rows of the head, times the hidden state.
    mean, offset = q @ head, None if bias is None else q @ bias.to(dtype)
    if epsilon:
        prior = smoothing.prior_for(top.reshape(-1), weight.shape[0], dtype)
        mean = (1 - epsilon) * mean + epsilon * (prior @ head)
        offset = None if bias is None or offset is None else (1 - epsilon) * offset + epsilon * (prior @ bias.to(dtype))
    exact = exact_dtype(dtype)
    row = nn.functional.embedding(top.reshape(-1), head)
    more = (hidden.reshape(-1, hidden.shape[-1]).to(exact) * (row - mean).to(exact)).sum(-1)
    if bias is not None and offset is not None:
        more = more + (bias.to(exact)[top.reshape(-1)] - offset.to(exact))
    more = logit_scale * more
    weights = more.new_ones(more.shape) if token_weight is None else token_weight.reshape(-1).to(exact)
    if reduction == "none":
        return hard + (more * weights).reshape(top.shape)
    total = (more * weights).sum()
    if reduction == "mean":
        count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=more.device)
        total = total / count.clamp_min(torch.finfo(exact).tiny).to(exact)
    return hard + total
