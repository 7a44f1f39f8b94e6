"""Where the smoothing mass may go: priors for `Smoothing(prior=...)` and soft targets from annotator counts.

Priors are tensors [K] or [K, K], and targets per example [..., K], from ids, counts, confusions or embeddings.

A class with zero mass here adds exactly 0 to loss and gradient, even where its logit is −inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ls.losses._checks import class_ids

_IDS_PER_COUNT = 1 << 20


def support_prior(support: Tensor | Sequence[int] | Sequence[bool] | range, num_classes: int) -> Tensor:
    """The uniform prior over some of the classes, float32 [K].

    u_k = 1/|S| for k in S, else exactly 0. Use it to keep mass off padding rows, unused vocabulary and
    −inf-masked classes.

    Args:
        support: class ids (repeats count once), or a bool mask [K] which is True inside the support.

    >>> support_prior([0, 2], 4)
    tensor([0.5000, 0.0000, 0.5000, 0.0000])

    Raises: ValueError for an empty support, ids outside [0, K) or a mask of another length; TypeError for
    float ids.
    """
    tensor = torch.as_tensor(support if isinstance(support, Tensor) else list(support))
    if not tensor.numel() or (tensor.dtype == torch.bool and not bool(tensor.any())):
        raise ValueError(
            f"expected at least one class in the support, got none in {tuple(tensor.shape)}; name those which may receive mass"
        )
    if tensor.dtype == torch.bool:
        if tensor.shape != (num_classes,):
            raise ValueError(f"expected a mask of shape ({num_classes},), got {tuple(tensor.shape)}; one entry per class")
        mask = tensor
    else:
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"expected class ids or a bool mask, got {tensor.dtype}; threshold scores first")
        tensor = class_ids(tensor)
        if int(tensor.min()) < 0 or int(tensor.max()) >= num_classes:
            raise ValueError(
                f"expected class ids in [0, {num_classes}), got {int(tensor.min())}..{int(tensor.max())}; "
                "num_classes is the number of logits"
            )
        mask = torch.zeros(num_classes, dtype=torch.bool, device=tensor.device)
        mask[tensor.reshape(-1)] = True
    return (mask.double() / mask.sum()).float()


def unigram_prior(counts: Tensor | Sequence[float], *, power: float = 1.0, additive: float = 0.0) -> Tensor:
    """The prior proportional to how often each class occurs, float32 [K].

    u_k = (c_k + additive)^power / Σ_j (c_j + additive)^power; a class with c_k + additive = 0 gets exactly 0.

    Args:
        counts: occurrences per class [K], e.g. from `count_labels`.
        power: 1 is the unigram distribution, 0.75 flattens it, 0 is uniform over the classes which occur.
        additive: pseudo-count of every class.

    >>> unigram_prior([6, 2, 0])
    tensor([0.7500, 0.2500, 0.0000])

    Raises: ValueError for negative or non-finite input, or when all counts are 0.
    Source: Pereyra et al. 2017 (unigram smoothing); Mikolov et al. 2013 (power 0.75).
    """
    values = _non_negative(counts, "counts", 1) + _amount(additive, "additive")
    if not bool(values.any()):
        raise ValueError(
            f"expected at least one counted label, got all zeros over {len(values)} classes; check the labels and ignore_index"
        )
    # Relative to the largest count no power overflows; 0^0 would be 1 and give mass to an unseen class.
    weight = (values / values.max()).pow(_amount(power, "power")).masked_fill(values == 0, 0)
    return (weight / weight.sum()).float()


def count_labels(dataset: Iterable[Any], num_classes: int, column: str = "labels", ignore_index: int = -100) -> Tensor:
    """How often each class is a label in a tokenised dataset, exact int64 [K].

    Positions labelled `ignore_index` are not counted.

    Args:
        dataset: a `datasets.Dataset` (one split; formats and transforms are respected), or any iterable of
            dicts with `column`, of lists of ids, or of batches of either.
        column: where the label ids are, one id or a list of ids per row.

    >>> count_labels([{"labels": [1, 1, -100]}, {"labels": [2]}], 4)
    tensor([0, 2, 1, 0])

    Raises: ValueError for a missing column or an id outside [0, K) other than `ignore_index`; TypeError for
    labels which are no integers.
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for ids in _id_blocks(dataset, column):
        kept = ids[ids != ignore_index]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= num_classes):
            raise ValueError(
                f"expected label ids in [0, {num_classes}) or {ignore_index} for ignored, got "
                f"{int(kept.min())}..{int(kept.max())}; num_classes is the number of logits"
            )
        counts += torch.bincount(kept, minlength=num_classes)
    return counts


def confusion_prior(confusion: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """A class-dependent prior from the errors of an earlier model, float32 [K, K] with row y for label y.

    S[y, k] = c[y, k] / Σ_{j≠y} c[y, j] for k ≠ y, and S[y, y] = 0. A row without any error says nothing about
    which class it is confused with and falls back to uniform over the wrong classes, 1/(K−1).
    The diagonal is 0, so `convention` "all" and "wrong" give the same target.

    Args:
        confusion: counts [K, K], rows the true class and columns the predicted one (as scikit-learn's
            `confusion_matrix`).

    >>> confusion_prior([[8, 2, 0], [1, 5, 3], [0, 0, 9]])
    tensor([[0.0000, 1.0000, 0.0000],
            [0.2500, 0.0000, 0.7500],
            [0.5000, 0.5000, 0.0000]])

    Raises: ValueError for another shape, K < 2, negative or non-finite counts.
    """
    counts = _non_negative(confusion, "confusion", 2).clone()
    num_classes = counts.shape[0]
    if counts.shape != (num_classes, num_classes) or num_classes < 2:
        raise ValueError(f"expected confusion counts [K, K] with K >= 2, got {tuple(counts.shape)}; rows are true classes")
    counts.fill_diagonal_(0)
    no_errors = counts.sum(1, keepdim=True) == 0
    counts = torch.where(no_errors, 1 - torch.eye(num_classes, dtype=counts.dtype, device=counts.device), counts)
    return (counts / counts.sum(1, keepdim=True)).float()


def similarity_prior(embedding: Tensor, *, temperature: float, top_k: int | None = None) -> Tensor:
    """A class-dependent prior which prefers similar classes, float32 [K, K] with row y for label y.

    S[y, ·] = softmax over k ≠ y of cos(w_y, w_k)/temperature, S[y, y] = 0; with `top_k` only the k most
    similar classes keep mass (exactly 0 elsewhere). K² floats: 64 MiB at K = 4096, 4 GiB at K = 32768.

    Args:
        embedding: one vector per class [K, d], e.g. the output embedding; a zero vector is similar to none
            (cosine 0).
        temperature: > 0; small is peaked on the nearest classes, large is uniform over the wrong (or top-k)
            classes.

    >>> similarity_prior(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), temperature=1.0)
    tensor([[0.0000, 0.7311, 0.2689],
            [0.7311, 0.0000, 0.2689],
            [0.5000, 0.5000, 0.0000]])

    Raises: ValueError for another shape, K < 2, non-finite vectors, temperature ≤ 0, top_k outside [1, K−1].
    """
    if embedding.dim() != 2 or embedding.shape[0] < 2:
        raise ValueError(f"expected an embedding [K, d] with K >= 2, got {tuple(embedding.shape)}; one row per class")
    bad = ~torch.isfinite(embedding).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"expected finite embedding vectors, got NaN or inf in {int(bad.sum())} of {len(bad)} rows, first row "
            f"{int(bad.nonzero()[0])}; check the checkpoint"
        )
    num_classes = embedding.shape[0]
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, got {temperature}; 0.1 is a usual value for cosines")
    if top_k is not None and not 1 <= top_k < num_classes:
        raise ValueError(f"expected top_k in [1, {num_classes - 1}], got {top_k}; use None for all wrong classes")
    unit = nn.functional.normalize(embedding.detach().double(), dim=-1)
    scores = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    if top_k is not None:
        best = scores.topk(top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter_(1, best.indices, best.values)
    return scores.softmax(-1).float()


def restrict_prior(prior: Tensor, support: Tensor | Sequence[int] | Sequence[bool] | range) -> Tensor:
    """The same prior with mass on the support only, float32 of the prior's shape [K] or [K, K].

    u_k/Σ_{j∈S} u_j for k in S, else exactly 0; a row without mass on the support becomes uniform over it.
    Use it to take −inf-masked classes out of a unigram, confusion or similarity prior.

    >>> restrict_prior(unigram_prior([2, 1, 1]), [0, 1])
    tensor([0.6667, 0.3333, 0.0000])

    Raises: as `support_prior`.
    """
    uniform = support_prior(support, prior.shape[-1]).double().to(prior.device)
    kept = prior.double() * (uniform > 0)
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total, uniform).float()


def soft_targets(counts: Tensor | Sequence[Any], *, additive: float = 0.0) -> Tensor:
    """Per-example target distributions from annotator counts, float32 [..., K]; rows sum to 1.

    q_k = (c_k + additive) / Σ_j (c_j + additive). They are the labels of `smoothed_cross_entropy` at ε = 0.

    >>> soft_targets([[3, 1, 0]])
    tensor([[0.7500, 0.2500, 0.0000]])

    Raises: ValueError for negative or non-finite counts, or a row without any annotation.
    """
    values = _non_negative(counts, "counts", None) + _amount(additive, "additive")
    total = values.sum(-1, keepdim=True)
    empty = (total == 0).squeeze(-1)
    if bool(empty.any()):
        raise ValueError(
            f"expected at least one annotation per row, got a row of zeros ({int(empty.sum())} of {empty.numel()} rows); "
            "drop it or pass additive > 0"
        )
    return (values / total).float()


def _non_negative(values: Any, name: str, dim: int | None) -> Tensor:
    tensor = torch.as_tensor(values).double()
    if tensor.dim() == 0 or (dim is not None and tensor.dim() != dim) or not tensor.numel():
        raise ValueError(
            f"expected {name} with {dim or 'one or more'} dimension(s), got {tuple(tensor.shape)}; the classes come last"
        )
    bad = ~torch.isfinite(tensor) | (tensor < 0)
    if bool(bad.any()):
        raise ValueError(f"expected finite {name} >= 0, got {float(tensor[bad][0]):g}; count occurrences, do not pass logits")
    return tensor


def _amount(value: float, name: str) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected finite {name} >= 0, got {value}; 0 switches it off")
    return value


def _id_blocks(dataset: Iterable[Any], column: str) -> Iterator[Tensor]:
    """Flat label ids in large blocks: one bincount over the classes per block, not per row."""
    block: list[Tensor] = []
    size = 0
    for row in dataset:
        if isinstance(row, str):
            raise TypeError(f"expected rows of label ids, got {row!r}; pass one split, e.g. dataset['train']")
        if isinstance(row, Mapping):
            if column not in row:
                raise ValueError(f"expected a column {column!r}, got {list(row)}; pass column=... with the label ids")
            row = row[column]
        block.append(_flat_ids(row))
        size += block[-1].numel()
        if size >= _IDS_PER_COUNT:
            yield torch.cat(block)
            block, size = [], 0
    if block:
        yield torch.cat(block)


def _flat_ids(value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value)
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int):
        return torch.cat([_flat_ids(item) for item in value])
    try:
        # A copy of an array, because the arrays of a formatted dataset are read-only.
        tensor = torch.tensor(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected integer label ids, got {type(value).__name__}; tokenise the labels first") from error
    ids = tensor.reshape(-1).cpu()
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"expected integer label ids, got {ids.dtype}; soft targets and scores cannot be counted")
    return class_ids(ids) if ids.numel() else ids.long()  # torch makes an empty list a float tensor
