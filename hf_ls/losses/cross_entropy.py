"""The smoothed cross entropy over logits, as a function and as a module which a stock Trainer can call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ls.losses._checks import Reduction, check_finite, check_options, class_ids, kept_places, next_labels, refuse
from hf_ls.losses.smoothing import Smoothing


class SmoothedTerms(NamedTuple):
    """Per-item parts of the loss, float32 or better, same shape as the labels, 0 where ignored; loss = nll + smoothing_term."""

    nll: Tensor
    smoothing_term: Tensor

    @property
    def loss(self) -> Tensor:
        """The whole per-item loss, nats."""
        return self.nll + self.smoothing_term


def smoothed_terms(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, ignore_index: int = -100) -> SmoothedTerms:
    """The hard negative log-likelihood and the smoothing term of each label, kept apart.

    nll = lse(z) − z_y;  smoothing_term = e·(z_y − ⟨u, z⟩) with e, u as in `Smoothing`; both in nats.
    Shapes: logits [..., K], labels [...] of integers. At ε = 0 the second is exactly 0 and nothing else changes.

    >>> smoothed_terms(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]), Smoothing(0.1))
    SmoothedTerms(nll=tensor([0.2413]), smoothing_term=tensor([0.1500]))

    Raises: ValueError/TypeError for shapes or dtypes which do not match, labels outside [0, K) other than
    `ignore_index`, NaN logits, and −inf logits on which the target puts mass.
    """
    terms, _, rows = _kept_terms(logits, labels, smoothing, ignore_index)
    check_finite(terms.loss)
    return SmoothedTerms(*(_at_labels(part, rows, labels.shape) for part in terms))


def soft_target_terms(
    logits: Tensor, labels: Tensor, targets: Tensor, smoothing: Smoothing, *, ignore_index: int = -100
) -> SmoothedTerms:
    """The hard NLL of each label, and what its target distribution costs beyond that; nats.

    Their sum is −Σ_k t_k·log p_k with t = (1−ε)·q + ε·u: lse(z) − Σ_k t_k·z_k. Shapes: logits [..., K], labels [...], the targets
    q [..., K]; rows which are ignored by their label may hold anything.

    >>> q = torch.tensor([[0.75, 0.25, 0.0]])
    >>> soft_target_terms(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]), q, Smoothing(0.0))
    SmoothedTerms(nll=tensor([0.2413]), smoothing_term=tensor([0.3750]))

    Raises: as `smoothed_terms`; ValueError for targets of another shape or which are no distributions, and with ε > 0 for
    convention "wrong" or a prior [K, K].
    """
    nll = smoothed_terms(logits, labels, Smoothing(0.0), ignore_index=ignore_index).nll
    if targets.shape != logits.shape:
        raise ValueError(f"expected soft labels {tuple(logits.shape)}, one value per logit, got {tuple(targets.shape)}")
    kept = labels != ignore_index
    losses = _soft_target_losses(logits[kept], targets[kept], smoothing, None, smooth_soft_targets=True)
    check_finite(losses)
    return SmoothedTerms(nll, nll.new_zeros(nll.shape).masked_scatter(kept, losses - nll[kept]))


def smoothed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    smoothing: Smoothing | float,
    *,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: Tensor | float | None = None,
    smooth_soft_targets: bool = False,
) -> Tensor:
    """Cross entropy between softmax(logits) and a smoothed target, in nats.

    loss = lse(z) − (1−e)·z_y − e·⟨u, z⟩, computed in float32 (float64 stays float64).
    Shapes: logits [..., K]; labels [...] of integers, or soft targets [..., K] whose rows sum to 1.

    Args:
        smoothing: a `Smoothing`, or a number taken as its epsilon.
        class_weight: [K]; each example counts w_y times and its target stays as it is.
            `torch.nn.CrossEntropyLoss(weight=…, label_smoothing=…)` re-weights the smoothing mass too and so moves the
            optimum: weights 1:99 at ε = 0.1 move p(y) from .95 to .16.
        reduction: "mean" over the kept items (weighted by w_y), "sum", or "none" with 0 at ignored items.
        num_items_in_batch: divides the sum instead of the local count; exact under gradient accumulation. Needs "mean".
        smooth_soft_targets: soft targets are refused at ε > 0 unless this is True: they are smoothed already.

    A batch with every label ignored gives a differentiable 0.

    >>> logits = torch.tensor([[2, .5, -1], [.1, 1.8, .2], [1.2, .7, .3], [0, -.2, 2.4]])
    >>> round(smoothed_cross_entropy(logits, torch.tensor([0, 1, 0, 2]), 0.1).item(), 6)
    0.473108

    Raises: ValueError/TypeError as `smoothed_terms`; for an unknown `reduction`; for soft targets as above.
    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
    """
    if not isinstance(smoothing, Smoothing):
        smoothing = Smoothing(smoothing)
    _check_tensors(logits, labels)
    check_options(reduction, class_weight, num_items_in_batch, logits.shape[-1])
    rows, weight = None, None
    if labels.is_floating_point():
        losses = _soft_target_losses(logits, labels, smoothing, class_weight, smooth_soft_targets)
    else:
        terms, y, rows = _kept_terms(logits, labels, smoothing, ignore_index)
        losses, weight = terms.loss, None if class_weight is None else class_weight.to(terms.nll)[y]
        losses = losses if weight is None else losses * weight
    total = losses.sum()
    check_finite(losses, total)
    if reduction == "none":
        return _at_labels(losses, rows, logits.shape[:-1])
    if reduction == "sum":
        return total
    # Nothing to average: the sum is already 0 and keeps its graph.
    if num_items_in_batch is None:
        return total / (max(1, losses.numel()) if weight is None else weight.sum().clamp_min(torch.finfo(weight.dtype).tiny))
    if isinstance(num_items_in_batch, Tensor):
        return total / num_items_in_batch.to(losses.device).clamp_min(torch.finfo(losses.dtype).tiny)
    return total / num_items_in_batch if num_items_in_batch else total


class SmoothedCrossEntropy(nn.Module):
    """The smoothed cross entropy as a loss function for `Trainer(compute_loss_func=SmoothedCrossEntropy(0.1))`.

    Call it with `(outputs, labels, num_items_in_batch=None)`; outputs is a `ModelOutput`, a dict, a tuple with the
    logits first, or the logits. In `.eval()` mode it returns the plain NLL: a reported loss is never smoothed.
    A stock Trainer does not switch that mode, so its `eval_loss` stays smoothed; `LabelSmoothingTrainer` reports the NLL.

    Args:
        shift: True for decoder-only language models (position t predicts label t+1); False for encoder-decoder models and
            token classification. It must be said for logits [B, T, K]; a wrong shift trains on the wrong token in silence.
        ignore_index, class_weight, smooth_soft_targets: as in `smoothed_cross_entropy`.

    >>> logits, label, loss = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]), SmoothedCrossEntropy(0.1)
    >>> [round(value.item(), 4) for value in (loss(logits, label), loss.eval()(logits, label))]
    [0.3913, 0.2413]

    Raises: as `smoothed_cross_entropy`; ValueError when `labels` is None, `shift` is needed and missing, or the first logits are
    probabilities.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        smoothing: Smoothing | float = 0.1,
        *,
        shift: bool | None = None,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        smooth_soft_targets: bool = False,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing if isinstance(smoothing, Smoothing) else Smoothing(smoothing)
        self.shift = shift
        self.ignore_index = ignore_index
        self.smooth_soft_targets = smooth_soft_targets
        self._seen = False
        self.register_buffer("class_weight", class_weight, persistent=False)
        if self.smoothing.schedule is not None:
            raise ValueError(
                f"expected a constant epsilon, got {self.smoothing.schedule}; only LabelSmoothingTrainer knows the training step"
            )

    def forward(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """The mean loss (sum / num_items_in_batch if given), nats."""
        if labels is None:
            raise ValueError("expected labels, got None; the batch needs a `labels` column (check `remove_unused_columns`)")
        logits = logits_of(outputs)
        labels = next_labels(labels, self.ignore_index) if self._shifts(logits) else labels
        if not self._seen:  # once: a look at every batch would cost a synchronisation each
            check_no_probabilities(logits)
            self._seen = True
        return smoothed_cross_entropy(
            logits,
            labels,
            self.smoothing if self.training else Smoothing(0.0),
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            num_items_in_batch=num_items_in_batch,
            smooth_soft_targets=self.smooth_soft_targets,
        )

    def _shifts(self, logits: Tensor) -> bool:
        if self.shift is None and logits.dim() > 2:
            raise ValueError(
                f"expected `shift` to be said for logits {tuple(logits.shape)}, got None; pass shift=True for a decoder-only "
                "language model, shift=False for an encoder-decoder model or token classification"
            )
        return bool(self.shift)

    def extra_repr(self) -> str:
        """What `print(loss)` shows."""
        return f"{self.smoothing}, shift={self.shift}, ignore_index={self.ignore_index}"


def logits_of(outputs: Any) -> Tensor:
    """The logits in a `ModelOutput`, dict, tuple or tensor; start and end logits [B, T] stacked to [B, 2, T].

    Raises: ValueError when there are none; TypeError for any other type.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("start_logits"), Tensor) and isinstance(outputs.get("end_logits"), Tensor):
            return torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
        if not isinstance(outputs.get("logits"), Tensor):
            raise ValueError(
                f"expected `logits` in the model's outputs, got {list(outputs)}; use a model with one classification head"
            )
        return outputs["logits"]
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise TypeError(
        f"expected model outputs with logits, got {type(outputs).__name__}; pass a ModelOutput, dict, tuple or tensor"
    )


def _kept_terms(
    logits: Tensor, labels: Tensor, smoothing: Smoothing, ignore_index: int
) -> tuple[SmoothedTerms, Tensor, Tensor | None]:
    """The terms [n] of the labels which count, not yet checked, these labels [n], and their flat places; None where all count."""
    _check_shapes(logits, labels)
    y, num_classes = class_ids(labels).reshape(-1), logits.shape[-1]
    z = logits.reshape(-1, num_classes)
    # Ignored rows are dropped, not masked: whatever they hold (NaN, -inf) then reaches neither the value nor the gradient.
    rows = kept_places(y, num_classes, ignore_index)
    if rows is not None:
        y, z = y[rows], z[rows]
    # Half-precision logits lose 1e-3 nats in a log-softmax and overflow in a sum: compute in float32 whatever comes in.
    z = z if z.dtype == torch.float64 else z.float()
    nll = F.nll_loss(z.log_softmax(-1), y, reduction="none", ignore_index=ignore_index)
    if not smoothing.epsilon:
        return SmoothedTerms(nll, torch.zeros_like(nll)), y, rows
    # Of z itself: in log p the normaliser would cancel, and with it the digits of a small term.
    less_label = F.nll_loss(z, y, reduction="none", ignore_index=ignore_index)  # −z_y
    mixing: Tensor | float = smoothing.epsilon
    if smoothing.prior is None and smoothing.convention == "all":
        expected = z.mean(-1)
    else:
        prior = smoothing.prior_for(y, num_classes, z.dtype)
        # 0·(−inf) is NaN, but a class without prior mass must add exactly 0.
        expected, mixing = (z.masked_fill(prior == 0, 0) * prior).sum(-1), smoothing.mixing(y, prior)
    return SmoothedTerms(nll, (less_label + expected) * -mixing), y, rows


def _at_labels(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """Values of the labels which count at their places, 0 at the others."""
    whole = values if rows is None else values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return whole.reshape(shape)


def _soft_target_losses(
    logits: Tensor, targets: Tensor, smoothing: Smoothing, class_weight: Tensor | None, smooth_soft_targets: bool
) -> Tensor:
    """The loss of each row, not yet checked."""
    if targets.shape != logits.shape:
        raise ValueError(
            f"expected integer labels {tuple(logits.shape[:-1])} or soft targets {tuple(logits.shape)}, got float labels "
            f"{tuple(targets.shape)}; cast class ids to long (regression has no classes to smooth)"
        )
    if class_weight is not None:
        raise ValueError(
            f"expected no class_weight with soft targets, got {tuple(class_weight.shape)}; they have no single class: weight "
            "your sampler instead"
        )
    if smoothing.epsilon and not smooth_soft_targets:
        raise ValueError(
            f"expected epsilon = 0 with soft targets, got {smoothing.epsilon}: they are smoothed already; set epsilon=0 or "
            "say smooth_soft_targets=True"
        )
    z = logits if logits.dtype == torch.float64 else logits.float()
    q = targets.to(z.dtype)
    check_soft_targets(q, smoothing)
    if smoothing.epsilon:
        prior = smoothing.prior_for(torch.zeros((), dtype=torch.long, device=z.device), z.shape[-1], z.dtype)
        q = (1 - smoothing.epsilon) * q + smoothing.epsilon * prior
    return z.logsumexp(-1) * q.sum(-1) - (z.masked_fill(q == 0, 0) * q).sum(-1)


def check_soft_targets(targets: Tensor, smoothing: Smoothing) -> None:
    """Refuse soft targets [..., K] which are no distributions, and a smoothing which needs a single label.

    Raises: ValueError.
    """
    if (smoothing.convention != "all" and smoothing.epsilon) or (smoothing.prior is not None and smoothing.prior.dim() == 2):
        shape = "no prior" if smoothing.prior is None else f"a prior {tuple(smoothing.prior.shape)}"
        raise ValueError(
            f"expected convention='all' and a prior [K] over soft targets, got {smoothing.convention!r} and {shape}, which need "
            "a single label; change it"
        )
    total = targets.sum(-1)
    wrong = ~((targets >= 0).all(-1) & ((total - 1).abs() < 1e-3))
    refuse(
        wrong,
        "soft targets >= 0 summing to 1 in each row",
        lambda: f"a row with sum {float(total[wrong][0]):g} and minimum {float(targets[wrong][0].min()):g}",
        "divide the counts by their sum",
    )


def check_no_probabilities(logits: Tensor) -> None:
    """Refuse logits which are probabilities: of 4 rows or more each from 0 to 1 with sum 1, which no classifier's logits are.

    Shape [..., K]; the first 64 rows are looked at. For the first batch: a softmax inside the model squares every lesson.

    Raises: ValueError.
    """
    rows = logits.detach().reshape(-1, logits.shape[-1])[:64].float()
    if len(rows) < 4 or not bool(((rows >= 0) & (rows <= 1)).all()):
        return
    if bool(((rows.sum(-1) - 1).abs() < 1e-3).all()) and bool(((rows > 0) & (rows < 1)).any()):
        raise ValueError(
            "expected logits, got rows from 0 to 1 with sum 1, which are probabilities: the loss has its own softmax; return "
            f"the {logits.shape[-1]} scores before the softmax"
        )


def _check_tensors(logits: Any, labels: Any) -> None:
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} as a tensor, got {type(value).__name__}; use torch.as_tensor({name})")


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"expected floating-point logits, got {logits.dtype}; pass the scores before the softmax")
    if labels.shape == logits.shape:
        raise ValueError(
            f"expected one label per row of logits {tuple(logits.shape)}, got one per class; use labels.argmax(-1) if each row "
            "has exactly one class, or transformers.Trainer for multi-label classification"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected labels {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, got {tuple(labels.shape)}; "
            "one label per row of logits (squeeze [B, 1]; use the causal-LM shift for language models)"
        )
    if logits.shape[-1] < 2:
        raise ValueError(f"expected logits over at least 2 classes, got {logits.shape[-1]}; a single output is a regression head")
