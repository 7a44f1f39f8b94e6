"""Smoothing which follows the model: epsilon per item from its confidence, and a target learned from its predictions.

Graduated and instance-wise epsilon are formulas; online label smoothing has a state of K² numbers, whose epochs and checkpoints
the Trainer drives. An epsilon which follows the training step is `smoothing.Schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_ls.losses._checks import class_ids
from hf_ls.losses.cross_entropy import SmoothedTerms, logits_of, smoothed_cross_entropy, smoothed_terms
from hf_ls.losses.smoothing import Smoothing

Confidence = Literal["label", "max", "entropy"]
MAX_ONLINE_CLASSES = 4096
# Probabilities are added as multiples of 2^-30: float64 sums of up to 2^23 of them are exact, in any order.
_RESOLUTION = 2.0**30


def graduated_epsilon(
    confidence: Tensor, thresholds: Sequence[float] = (0.3, 0.7), values: Sequence[float] = (0.0, 0.1, 0.3)
) -> Tensor:
    """Graduated smoothing: an epsilon for each bucket of confidence, larger where the model is surer.

    ε = values[i] where thresholds[i−1] ≤ confidence < thresholds[i]; any shape, values of the paper.

    >>> graduated_epsilon(torch.tensor([0.1, 0.3, 0.9]))
    tensor([0.0000, 0.1000, 0.3000])

    Raises: ValueError for thresholds which do not increase inside (0, 1), values outside [0, 1), or another
    number of values than buckets.
    Source: Wang et al. 2020, "On the Inference Calibration of Neural Machine Translation", section 5.
    """
    edges = [0.0, *thresholds, 1.0]
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"expected thresholds increasing inside (0, 1), got {tuple(thresholds)}; sort them")
    if len(values) != len(thresholds) + 1 or not all(0 <= value < 1 for value in values):
        raise ValueError(
            f"expected {len(thresholds) + 1} values with 0 <= epsilon < 1, got {tuple(values)}; one epsilon per bucket"
        )
    boundaries = torch.tensor(thresholds, dtype=confidence.dtype, device=confidence.device)
    epsilons = torch.tensor(values, dtype=confidence.dtype, device=confidence.device)
    return epsilons[torch.bucketize(confidence, boundaries, right=True)]


def instance_epsilon(confidence: Tensor, *, maximum: float = 0.2) -> Tensor:
    """Instance-wise smoothing: ε = maximum·confidence, 0 to `maximum`; shape of `confidence`.

    With `adaptive_smoothed_terms(..., confidence="entropy")` it is maximum·(1 − H(p)/log K). The paper has
    maximum = 1, because its prior is the model's own past prediction; towards a fixed prior that erases the
    label, hence 0.2 here.

    Raises: ValueError for maximum outside [0, 1].
    Source: Lee, Cheung & Zhang 2022, "Adaptive Label Smoothing with Self-Knowledge in Natural Language
    Generation".
    """
    if not 0 <= maximum <= 1:
        raise ValueError(f"expected maximum in [0, 1], got {maximum}; it is the epsilon of a fully confident prediction")
    return maximum * confidence


def entropy(log_p: Tensor) -> Tensor:
    """H(p) = −Σ p_k log p_k of log-probabilities: [..., K] -> [...], 0 to log K, nats."""
    # p·log p tends to 0 with p, but 0·(−inf) is NaN.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def normalised_entropy(logits: Tensor) -> Tensor:
    """H(p)/log(number of finite logits) of p = softmax(logits): [..., K] -> [...], 0 to 1; 0 where one class is possible."""
    log_p = logits.log_softmax(-1)
    largest = (log_p != -torch.inf).sum(-1).to(log_p.dtype).log().clamp_min(torch.finfo(log_p.dtype).tiny)
    return (entropy(log_p) / largest).clamp(0, 1)


def adaptive_smoothed_terms(
    logits: Tensor,
    labels: Tensor,
    smoothing: Smoothing,
    epsilon_of_confidence: Callable[[Tensor], Tensor] = graduated_epsilon,
    *,
    confidence: Confidence = "label",
    ignore_index: int = -100,
) -> SmoothedTerms:
    """The terms of the smoothed cross entropy with an epsilon per item taken from the model's own confidence.

    nll_i + e_i·(z_y − ⟨u, z⟩), e_i = ε_i ("all") or ε_i/(1−u_y) ("wrong"), ε_i = f(confidence_i), without a
    gradient through ε_i. Shapes: logits [..., K], labels [...]; terms as `smoothed_terms`.

    Args:
        smoothing: gives prior and convention; its own epsilon and schedule are not used.
        epsilon_of_confidence: f, maps confidences to epsilons of the same shape.
        confidence: 0 to 1, "label" the probability p_y of the label (Wang 2020), "max" the largest
            probability, "entropy" 1 − H(p)/log(number of classes with a finite logit) (Lee 2022).

    Raises: as `smoothed_terms`; ValueError for an unknown confidence or epsilons of another shape or outside
    [0, 1].
    """
    if confidence not in get_args(Confidence):
        raise ValueError(f"expected confidence in {get_args(Confidence)}, got {confidence!r}; choose one of them")
    labels = class_ids(labels)
    # The smoothing term is linear in ε: take it at ε = 1/2 (exact to rescale) and give each item its own.
    half = smoothed_terms(logits, labels, replace(smoothing, epsilon=0.5, schedule=None), ignore_index=ignore_index)
    with torch.no_grad():
        value = _confidence(logits, half.nll, confidence).masked_fill(labels == ignore_index, 0)
        epsilon = epsilon_of_confidence(value)
        if epsilon.shape != labels.shape or not bool(((epsilon >= 0) & (epsilon <= 1)).all()):
            inside = f" from {float(epsilon.min())} to {float(epsilon.max())}" if epsilon.numel() else ""
            raise ValueError(
                f"expected epsilons {tuple(labels.shape)} in [0, 1], got {tuple(epsilon.shape)}{inside}; "
                "epsilon_of_confidence maps each confidence to one epsilon"
            )
    return SmoothedTerms(half.nll, half.smoothing_term * (2 * epsilon))


def _confidence(logits: Tensor, nll: Tensor, kind: Confidence) -> Tensor:
    if kind == "label":
        return torch.exp(-nll)
    z = logits.to(nll.dtype)
    return z.softmax(-1).amax(-1) if kind == "max" else 1 - normalised_entropy(z)


@dataclass(frozen=True)
class OnlineSettings:
    """Online label smoothing before the number of classes is known.

    Args:
        alpha: weight of the hard label, 0 to 1; 0.5 in the paper.

    Raises: ValueError for alpha outside [0, 1].
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"expected alpha in [0, 1], got {self.alpha}; it is the weight of the hard label, 0.5 in the paper")

    def build(self, num_classes: int) -> OnlineLabelSmoothing:
        """The state for this number of classes.

        Raises: ValueError above 4096 classes.
        """
        return OnlineLabelSmoothing(num_classes, alpha=self.alpha)


class OnlineLabelSmoothing(nn.Module):
    """Online label smoothing: the soft target of a class is the mean prediction for it in the previous epoch.

    loss = α·nll − (1−α)·Σ_k S[y, k]·log p_k, with S the matrix of the previous epoch. Training batches add p
    to row y of the next matrix where the prediction is right; `end_epoch` turns these sums into S. A class
    without a right prediction keeps its row. In `.eval()` mode the loss is the plain NLL and nothing is
    added. No causal shift.

    State (buffers, float64 K² twice and int64 K): `matrix`, `total`, `count`; all of it is in `state_dict`.
    Sums are exact in any order (up to 2^23 predictions per class and epoch), so several processes give bit
    for bit the matrix of one. Call `end_epoch` on every process after each epoch, and `synchronise` on every
    process before saving in the middle of one. All processes then load the same state, once the process group
    exists: all but process 0 drop its sums, so that they count once.

    Args:
        num_classes: K, at most 4096.
        alpha: weight of the hard label, 0 to 1; 0.5 in the paper.
        prior: S of the first epoch, [K] or [K, K]; uniform as in the paper when None. Give −inf-masked
            classes no mass.

    Raises: ValueError for K > 4096, alpha outside [0, 1], a prior for another K.
    Source: Zhang et al. 2021, "Delving Deep into Label Smoothing".
    """

    matrix: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int, *, alpha: float = 0.5, prior: Tensor | None = None, ignore_index: int = -100) -> None:
        """Start with the prior as the matrix and with empty sums."""
        super().__init__()
        if not 2 <= num_classes <= MAX_ONLINE_CLASSES:
            raise ValueError(
                f"expected 2 to {MAX_ONLINE_CLASSES} classes for online label smoothing, got {num_classes}: "
                "its state has K² entries; use Smoothing(prior=unigram_prior(...)) for a vocabulary"
            )
        OnlineSettings(alpha)
        if prior is None:
            prior = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
        rows = Smoothing(prior=prior).prior_for(torch.arange(num_classes), num_classes, torch.float64)
        self.num_classes = num_classes
        self.alpha = alpha
        self.ignore_index = ignore_index
        matrix = rows.expand(num_classes, num_classes)
        self.register_buffer("matrix", matrix / matrix.sum(1, keepdim=True))
        self.register_buffer("total", torch.zeros(num_classes, num_classes, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """The mean loss over the kept labels, or their sum divided by `num_items_in_batch`.

        outputs as in `losses.logits_of` with logits [..., K]; labels [...]. Nothing kept: a differentiable 0.

        Raises: as `terms`.
        """
        losses = self.terms(logits_of(outputs), labels).loss
        count = (class_ids(labels) != self.ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(count, device=losses.device).clamp_min(1)

    def terms(self, logits: Tensor, labels: Tensor) -> SmoothedTerms:
        """NLL and (1−α)·(soft − nll) per item, shaped as the labels; adds to the sums in training mode.

        Raises: as `smoothed_terms`; ValueError for logits over another number of classes.
        """
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"expected logits over {self.num_classes} classes, got {tuple(logits.shape)}; "
                "build OnlineLabelSmoothing with the model's number of labels"
            )
        labels = class_ids(labels)
        hard = smoothed_terms(logits, labels, Smoothing(0.0), ignore_index=self.ignore_index)
        if not self.training:
            return hard
        kept = labels != self.ignore_index
        rows, kept_labels = logits[kept], labels[kept]
        soft = smoothed_cross_entropy(rows, self.matrix[kept_labels], 0.0, reduction="none")
        self._accumulate(rows.detach(), kept_labels)
        term = (1 - self.alpha) * (soft - hard.nll[kept])
        return SmoothedTerms(hard.nll, hard.smoothing_term.masked_scatter(kept, term))

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Make the sums of this epoch, over all processes, the matrix of the next; collective."""
        total, count = self._reduced()
        mean = total / total.sum(1, keepdim=True)
        self.matrix.copy_(torch.where(count.unsqueeze(1) > 0, mean, self.matrix))
        self.total.zero_()
        self.count.zero_()

    @torch.no_grad()
    def synchronise(self) -> None:
        """Move the sums of all processes to process 0, whose `state_dict` is then complete; collective."""
        total, count = self._reduced()
        mine = _rank() == 0
        self.total.copy_(total * mine)
        self.count.copy_(count * mine)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{self.num_classes}, alpha={self.alpha}, ignore_index={self.ignore_index}"

    @torch.no_grad()
    def _accumulate(self, logits: Tensor, labels: Tensor) -> None:
        right = logits.argmax(-1) == labels
        p = logits[right].to(torch.float64 if logits.dtype == torch.float64 else torch.float32).softmax(-1)
        self.total.index_add_(0, labels[right], (p.double() * _RESOLUTION).round() / _RESOLUTION)
        self.count += torch.bincount(labels[right], minlength=self.num_classes)

    def _reduced(self) -> tuple[Tensor, Tensor]:
        total, count = self.total.clone(), self.count.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(count)
        return total, count

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Every process loads the sums of process 0, but only one may hand them to the next all_reduce.
        if _rank() != 0:
            self.total.zero_()
            self.count.zero_()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
