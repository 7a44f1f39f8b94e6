"""Temperature scaling of next-token predictions without keeping any logits: one pass, a few sums.

Source: Guo et al. 2017 (temperature scaling).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_ls.calibration.temperature import NoFiniteTemperature

# Inverse temperatures 2**-5 … 2**5 in steps of √2: two chains of exponentials, each the square of the one before, so
# that a pass costs two exponentials whatever the number of points. Between two points a quintic Hermite polynomial over
# log β gives T within 5e-4, on three heavy-tailed rows too (steps of 2: 6e-3).
_LOG2_LIMIT = 5
_GRID = 2.0 ** (np.arange(4 * _LOG2_LIMIT + 1) / 2 - _LOG2_LIMIT)
_COUNT, _AT_ZERO, _AT_INFINITY, _FIRST = 0, 1, 2, 3
# On a CPU four float64 arrays of a chunk stay in its cache, on a GPU a launch must be worth its while.
_CHUNK_ELEMENTS = {"cpu": 1 << 15}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 22


class TokenTemperature:
    """Sums over tokens of the NLL and its first two derivatives at 21 inverse temperatures β = 1 / T, 1/32 to 32.

    NLL(β) = Σ_i [logsumexp(β·z_i) − β·z_{i, y_i}] in nats is convex in β; d NLL / dβ = Σ_i [E_i z − z_{i, y_i}] and
    d² NLL / dβ² = Σ_i Var_i z under p_i = softmax(β·z_i).

    Attributes: sums: float64 [66] on the CPU. It is additive: to fit over several processes, replace it by its sum over
    them.
    """

    def __init__(self) -> None:
        """Start with no tokens."""
        self.sums = torch.zeros(_FIRST + 3 * len(_GRID), dtype=torch.float64)

    def __len__(self) -> int:
        """Return the number of tokens added so far."""
        return int(self.sums[_COUNT])

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> None:
        """Add logits [..., V] with hard labels [...], skipping `ignore_index`; n may be 0. −inf masks a class.

        Computed in float64 (float32 on MPS) in chunks of rows, so memory does not grow with the number of tokens.

        Raises:
            TypeError: labels not integers.
            ValueError: shapes which differ, labels outside [0, V), NaN or +inf, or a label whose logit is −inf; nothing
            is then added.
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"expected integer labels, got {labels.dtype}; give token ids")
        if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"expected logits [..., V] and labels [...], got {[*logits.shape]} and {[*labels.shape]}; align them"
            )
        num_classes = logits.shape[-1]
        flat, y = logits.reshape(-1, num_classes), labels.reshape(-1)
        kept = y != ignore_index
        if bool((kept & ((y < 0) | (y >= num_classes))).any()):
            raise ValueError(
                f"expected labels in [0, {num_classes}) or {ignore_index}, got others; map class names to ids 0..K-1"
            )
        dtype = torch.float64 if logits.device.type != "mps" else torch.float32
        added = torch.zeros_like(self.sums)
        elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        for rows in kept.nonzero().squeeze(1).split(max(1, elements // max(1, num_classes))):
            if len(rows):
                added += _sums(flat[rows].to(dtype), y[rows]).to(added)
        self.sums += added

    def fit(self) -> float:
        """Return the T > 0 that minimises the mean NLL of all tokens, equal to `fit_temperature` within 1e-3 relative.

        The derivative changes its sign between two points of the grid; there its root is that of the quintic in log β
        which has the sums' values, slopes and curvatures at both.

        Raises:
            NoFiniteTemperature: every label has its row's largest logit (the NLL falls for ever as T → 0), the labels
            score no better than the mean logit (it falls for ever as T → ∞), or the optimum is not within 1/32 to 32.
            ValueError: fewer than 2 tokens.
        """
        from scipy.optimize import brentq

        n = len(self)
        if n < 2:
            raise ValueError(f"expected at least 2 tokens to fit a temperature, got {n}; use the whole validation split")
        if self.sums[_AT_ZERO] >= 0:
            raise NoFiniteTemperature(
                "expected labels to score above the mean logit, got logits no better than a uniform guess: the NLL "
                "falls for ever as T → ∞; check the label mapping, or train longer"
            )
        if self.sums[_AT_INFINITY] == 0:
            raise NoFiniteTemperature(
                f"expected at least one misclassified token, got {n} tokens that are all right: the NLL "
                "falls for ever as T → 0; use a larger validation split, or keep T = 1"
            )
        nll, slope, curvature = self.sums[_FIRST:].reshape(-1, 3).numpy().T
        # Over u = log β, where the NLL is nearer to a polynomial.
        slope, curvature = _GRID * slope, _GRID * slope + _GRID**2 * curvature
        low = int((slope < 0).sum()) - 1  # the NLL is convex, so the slope rises
        if not 0 <= low < len(_GRID) - 1:
            raise NoFiniteTemperature(
                f"expected an optimum between T = {1 / _GRID[-1]:g} and {1 / _GRID[0]:g}, got one beyond; divide the logits "
                "by a constant first, or keep T = 1 (T → 0: the validation split is all but separable, use a larger one)"
            )
        width = np.log(_GRID[low + 1] / _GRID[low])
        ends = [(nll[k], slope[k] * width, curvature[k] * width**2) for k in (low, low + 1)]
        step = brentq(_quintic(*ends).deriv(), 0.0, 1.0)
        return float(1.0 / (_GRID[low] * np.exp(step * width)))


def _sums(z: Tensor, labels: Tensor) -> Tensor:
    """Return the sums of rows z [n, V], which is overwritten, and labels [n]."""
    top = z.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise ValueError("expected a finite largest logit in every row, got NaN, +inf or a row of −inf; fix the model")
    z -= top
    masked = z.isneginf()
    z_label = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if bool(z_label.isneginf().any()):
        raise ValueError("expected a finite logit for every label, got −inf; the label's class must not be masked")
    chains = [(z * _GRID[first]).exp_() for first in (0, 1)]  # 0 where masked
    z.masked_fill_(masked, 0.0)
    mean = z.sum(-1) / (~masked).sum(-1)
    sums = [z.new_full((), len(z)), (mean - z_label).sum(), -z_label.sum()]
    powers = torch.stack([torch.ones_like(z), z, z * z], 1)
    for k, beta in enumerate(_GRID.tolist()):
        weights = chains[k % 2]  # exp(β·z), the largest 1
        total, first, second = (powers @ weights.unsqueeze(-1)).squeeze(-1).unbind(-1)
        first, second = first / total, second / total
        sums += [(total.log() - beta * z_label).sum(), (first - z_label).sum(), (second - first * first).sum()]
        weights *= weights
    return torch.stack(sums)


def _quintic(start: tuple[float, float, float], end: tuple[float, float, float]) -> np.polynomial.Polynomial:
    """Return the polynomial over [0, 1] with the given (value, slope, curvature) at 0 and at 1."""
    value, slope, curvature = start
    d0 = end[0] - value - slope - curvature / 2
    d1 = end[1] - slope - curvature
    d2 = end[2] - curvature
    return np.polynomial.Polynomial(
        [value, slope, curvature / 2, 10 * d0 - 4 * d1 + d2 / 2, -15 * d0 + 7 * d1 - d2, 6 * d0 - 3 * d1 + d2 / 2]
    )
