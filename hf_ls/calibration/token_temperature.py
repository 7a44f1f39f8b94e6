"""Temperature scaling of next-token predictions without keeping any logits: one pass, a few sums.

Source: Guo et al. 2017 (temperature scaling).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_ls.calibration.temperature import NoFiniteTemperature
from hf_ls.losses._checks import check_range

# Inverse temperatures 2**-5 … 2**5 in steps of √2: two chains of exponentials, each the square of the one before, so
# that a pass costs two exponentials whatever the number of points. Between two points a quintic Hermite polynomial over
# log β gives T within 5e-4, on three heavy-tailed rows too (steps of 2: 6e-3).
_LOG2_LIMIT = 5
_GRID = 2.0 ** (np.arange(4 * _LOG2_LIMIT + 1) / 2 - _LOG2_LIMIT)
_WIDTH = float(np.log(2.0) / 2)  # of a step in log β
_COUNT, _AT_ZERO, _AT_INFINITY, _FIRST = 0, 1, 2, 3
CURVES = _FIRST + 3 * len(_GRID)
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
        self.sums = torch.zeros(CURVES, dtype=torch.float64)

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
        added = torch.zeros_like(self.sums)
        for _, curves in _chunks(logits, labels, ignore_index):
            added += curves.sum(0).to(added)
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
        low = int((self._over_log_beta()[:, 1] < 0).sum()) - 1  # the NLL is convex, so the slope rises
        if not 0 <= low < len(_GRID) - 1:
            raise NoFiniteTemperature(
                f"expected an optimum between T = {1 / _GRID[-1]:g} and {1 / _GRID[0]:g}, got one beyond; divide the logits "
                "by a constant first, or keep T = 1 (T → 0: the validation split is all but separable, use a larger one)"
            )
        step = brentq(np.polynomial.Polynomial(_between(self._over_log_beta()[low : low + 2])).deriv(), 0.0, 1.0)
        return float(1.0 / (_GRID[low] * np.exp(step * _WIDTH)))

    def nll(self, temperature: float) -> float:
        """Return the mean NLL of all tokens in nats at a T from 1/32 to 32, by the same polynomial, off by less than 1e-5.

        Raises:
            ValueError: another T, or no tokens yet.
        """
        if not len(self):
            raise ValueError("expected tokens, got none; call update() first")
        return float(nll_at(self.sums.numpy(), temperature)) / len(self)

    def _over_log_beta(self) -> np.ndarray:
        return _over_log_beta(self.sums.numpy())


def nll_at(curves: np.ndarray, temperature: float) -> np.ndarray:
    """Σ NLL in nats [...] at a T from 1/32 to 32 of curves [..., 66], sums of `temperature_curves` over tokens.

    Raises:
        ValueError: another T.
    """
    place = -np.log(temperature * _GRID[0]) / _WIDTH
    if not -1e-9 <= place <= len(_GRID) - 1 + 1e-9:
        raise ValueError(f"expected a temperature from 1/32 to 32, got {temperature}; divide the logits by a constant first")
    low = min(max(int(place), 0), len(_GRID) - 2)
    return np.polynomial.polynomial.polyval(place - low, _between(_over_log_beta(curves)[..., low : low + 2, :]))


def _over_log_beta(curves: np.ndarray) -> np.ndarray:
    """NLL, slope and curvature [..., 21, 3] over u = log β, where the NLL is nearer to a polynomial."""
    nll, slope, curvature = np.moveaxis(curves[..., _FIRST:].reshape(*curves.shape[:-1], len(_GRID), 3), -1, 0)
    return np.stack([nll, _GRID * slope, _GRID * slope + _GRID**2 * curvature], -1)


def _between(ends: np.ndarray) -> np.ndarray:
    """Coefficients [6, ...] of the NLL between two points of the grid, over 0 to 1, from what `_over_log_beta` has there."""
    start, end = np.moveaxis(ends * [1, _WIDTH, _WIDTH**2], -2, 0)
    return _quintic(np.moveaxis(start, -1, 0), np.moveaxis(end, -1, 0))


class CrossFittedTemperature:
    """The NLL of examples at a temperature which was fitted on others of the same split: constant memory, one pass.

    Examples are dealt to `folds` parts, at random and evenly, by their rank and `seed` alone; each part is measured at the T of
    all the others (at T = 1 where these have none). All tokens of a sequence are in one part. What is left is the error which no
    temperature mends ("refinement"). Source: Berta, Holzmüller, Jordan and Bach 2025.
    """

    def __init__(self, folds: int = 5, seed: int = 0, *, keep: bool = False) -> None:
        """Start with no examples; keep: the curves of each one, for `by_example`, which takes 528 bytes each."""
        self.folds, self.seed, self.examples = folds, seed, 0
        self._parts = np.zeros((folds, CURVES))
        self._kept: list[tuple[np.ndarray, np.ndarray]] | None = [] if keep else None

    def update(self, curves: np.ndarray) -> None:
        """Add examples in their order: float64 [n, 66], each the sum of `temperature_curves` over its tokens, maybe 0."""
        first, last = self.examples // self.folds, -(-(self.examples + len(curves)) // self.folds)
        deals = [np.random.default_rng((self.seed, block)).permutation(self.folds) for block in range(first, last)]
        part = np.concatenate([np.empty(0, dtype=np.int64), *deals])[self.examples - first * self.folds :][: len(curves)]
        np.add.at(self._parts, part, curves)
        self.examples += len(curves)
        if self._kept is not None:
            self._kept.append((part, curves))

    def nll(self) -> float | None:
        """The mean NLL of all tokens in nats; None where a part is empty."""
        if not (self._parts[:, _COUNT] > 0).all():
            return None
        total = sum(float(nll_at(own, t)) for own, t in zip(self._parts, self._temperatures(), strict=True))
        return total / float(self._parts[:, _COUNT].sum())

    def by_example(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each example its number of tokens, their summed NLL, and the same cross-fitted: float64 [n] each, in their order.

        Raises:
            ValueError: nothing was kept.
        """
        if not self._kept:
            raise ValueError("expected examples which were kept, got none; make it with keep=True")
        part, curves = (np.concatenate(columns) for columns in zip(*self._kept, strict=True))
        crossed = np.empty(len(part))
        for fold, temperature in enumerate(self._temperatures()):
            crossed[part == fold] = nll_at(curves[part == fold], temperature)
        return curves[:, _COUNT], nll_at(curves, 1.0), crossed

    def _temperatures(self) -> list[float]:
        """For each part the T of all the others."""
        found = []
        for own in self._parts:
            others = TokenTemperature()
            others.sums = torch.from_numpy(self._parts.sum(axis=0) - own)
            try:
                found.append(others.fit())
            except NoFiniteTemperature:
                found.append(1.0)
        return found


@torch.no_grad()
def temperature_curves(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """What `TokenTemperature` sums of each token, float64 [..., 66] for logits [..., V] and labels [...]; 0 where ignored.

    Raises: as `TokenTemperature.update`.
    """
    found = torch.zeros((labels.numel(), CURVES), dtype=torch.float64 if logits.device.type != "mps" else torch.float32)
    found = found.to(logits.device)
    for rows, curves in _chunks(logits, labels, ignore_index):
        found[rows] = curves
    return found.reshape(*labels.shape, CURVES)


def _chunks(logits: Tensor, labels: Tensor, ignore_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The kept rows of logits [..., V], a few at a time, with their curves [n, 66]."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}; give token ids")
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"expected logits [..., V] and labels [...], got {[*logits.shape]} and {[*labels.shape]}; align them")
    for rows, z, y in kept_rows(logits, labels, ignore_index, _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)):
        yield rows, _curves(z, y)


def kept_rows(logits: Tensor, labels: Tensor, ignore_index: int, elements: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of logits [..., K] whose labels count, about `elements` numbers at a time: places, a copy in float64, labels.

    Raises: ValueError for labels outside [0, K) other than `ignore_index`.
    """
    num_classes = logits.shape[-1]
    flat, y = logits.reshape(-1, num_classes), labels.reshape(-1)
    kept = y != ignore_index
    check_range(y, kept, num_classes, ignore_index)
    dtype = torch.float64 if logits.device.type != "mps" else torch.float32
    for rows in kept.nonzero().squeeze(1).split(max(1, elements // max(1, num_classes))):
        if len(rows):
            yield rows, flat[rows].to(dtype), y[rows]


def _curves(z: Tensor, labels: Tensor) -> Tensor:
    """Return [n, 66] of rows z [n, V], which is overwritten, and labels [n]."""
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
    columns = [torch.ones_like(mean), mean - z_label, -z_label]
    powers = torch.stack([torch.ones_like(z), z, z * z], 1)
    for k, beta in enumerate(_GRID.tolist()):
        weights = chains[k % 2]  # exp(β·z), the largest 1
        total, first, second = (powers @ weights.unsqueeze(-1)).squeeze(-1).unbind(-1)
        first, second = first / total, second / total
        columns += [total.log() - beta * z_label, first - z_label, second - first * first]
        weights *= weights
    return torch.stack(columns, -1)


def _quintic(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Coefficients [6, ...] of the polynomial over [0, 1] with the given (value, slope, curvature) [3, ...] at 0 and at 1."""
    value, slope, curvature = start
    d0 = end[0] - value - slope - curvature / 2
    d1 = end[1] - slope - curvature
    d2 = end[2] - curvature
    return np.stack([value, slope, curvature / 2, 10 * d0 - 4 * d1 + d2 / 2, -15 * d0 + 7 * d1 - d2, 6 * d0 - 3 * d1 + d2 / 2])
