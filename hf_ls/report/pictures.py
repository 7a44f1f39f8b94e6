"""What smoothing does to a classifier, in pictures: tight clusters and bounded logit gaps.

They need predictions and features beside the report; `plots` draws what a report alone holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_ls.common.files import write_arrays
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.figures import (
    GREY,
    LIGHT,
    PALETTE,
    figure_style,
    new_figure,
    save_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

PENULTIMATE = "penultimate.npz"
_GAP_BINS = 60
POINTS = 150  # of one class in a panel: more hide each other, and each costs a forward
_CLASS_COLOURS = [strong for strong, _ in PALETTE[:3]]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Penultimate:
    """What the last linear layer of a classifier sees: features [n, d], labels [n], its weight [K, d] and bias [K].

    Logits are features·weightᵀ + bias; row k of the weight is the template of class k.

    Raises: ValueError for shapes which do not match.
    """

    features: _Floats
    labels: NDArray[np.int64]
    weight: _Floats
    bias: _Floats

    def __post_init__(self) -> None:
        for name, kind in (("features", np.float64), ("labels", np.int64), ("weight", np.float64), ("bias", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        shapes = [self.features.shape, self.labels.shape, self.weight.shape, self.bias.shape]
        sizes = [len(shape) for shape in shapes]
        fits = sizes == [2, 1, 2, 1] and shapes[0] == (*shapes[1], shapes[2][1]) and shapes[3] == shapes[2][:1]
        if not fits:
            raise ValueError(f"expected features [n, d], labels [n], weight [K, d] and bias [K], got {shapes}; see penultimate()")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write them as a compressed npz, in float32."""
        small = {name: getattr(self, name).astype(np.float32) for name in ("features", "weight", "bias")}
        return write_arrays(path, labels=self.labels, **small)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["features"], arrays["labels"], arrays["weight"], arrays["bias"])


def penultimate(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, label_name: str = "labels") -> Penultimate:
    """The inputs of the final linear layer of a transformers classifier over some batches, taken by a forward pre-hook.

    Evaluation mode, on the model's device. The layer is the one which a forward shows to produce the logits; where it gives
    logits at each position (decoder-only classifiers), the features are those of the position which the model selects.

    Raises: ValueError without such a layer, for batches without labels, or without any batch.
    """
    import torch

    from hf_ls.calibration.temperature import find_head
    from hf_ls.common.models import in_eval_mode

    device, seen = next(model.parameters()).device, []
    features, labels, head = [], [], None
    with in_eval_mode(model), torch.no_grad():
        for batch in batches:
            if batch.get(label_name) is None:
                raise ValueError(f"expected {label_name!r} in each batch, got {sorted(batch)}; the colours are the labels")
            inputs = {key: value.to(device) for key, value in batch.items() if key != label_name}
            if head is None:  # two rows show it as well as a batch
                head = find_head(model, {key: value[:2] for key, value in inputs.items()})[2]
            handles = [
                head.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
                head.register_forward_hook(lambda _, args, output: seen.append(output)),
            ]
            try:
                logits = model(**inputs).logits
            finally:
                for handle in handles:
                    handle.remove()
            found, output = seen
            seen.clear()
            if found.dim() == 3:  # scored at each position, then one is selected
                position = (output == logits.unsqueeze(1)).all(-1).int().argmax(1)
                found = found[torch.arange(len(found), device=device), position]
            features.append(found.double().cpu())
            labels.append(batch[label_name].cpu())
    if head is None:
        raise ValueError("expected at least one batch, got none; pass a DataLoader")
    weight = head.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().double().cpu()
    arrays = [part.numpy() for part in (torch.cat(features), torch.cat(labels), weight, bias)]
    return Penultimate(*arrays)


def class_plane(templates: ArrayLike) -> _Floats:
    """An orthonormal basis [2, d] of the plane through three class templates [3, d].

    Gram-Schmidt on w_1 − w_0 and w_2 − w_0. The differences of the three classes' logits depend on a feature only through its
    coordinates in this basis, so that the projection loses nothing of the decision among the three.

    Raises: ValueError for templates which are not three, or lie on one line.
    Source: Müller, Kornblith & Hinton 2019, "When Does Label Smoothing Help?", section 2.
    """
    w = np.asarray(templates, np.float64)
    if w.ndim != 2 or len(w) != 3 or w.shape[1] < 2:
        raise ValueError(f"expected three templates [3, d] with d >= 2, got {w.shape}; choose three classes")
    first, second = w[1] - w[0], w[2] - w[0]
    length = np.linalg.norm(first)
    across = second - first * (first @ second) / max(length**2, np.finfo(float).tiny)
    if not (length > 0 and np.linalg.norm(across) > 1e-9 * np.linalg.norm(second)):
        raise ValueError("expected three templates which span a plane, got some on one line; choose other classes")
    return np.stack([first / length, across / np.linalg.norm(across)])


def within_between(points: ArrayLike, labels: ArrayLike) -> float:
    """How tight clusters are: mean distance to the own class mean over mean distance of two class means; 0 is tightest.

    points [n, 2], labels [n]. It does not depend on scale, so that models compare.

    Raises: ValueError for fewer than two classes.
    """
    x, y = np.asarray(points, np.float64), np.asarray(labels)
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"expected two or more classes, got {len(classes)}; there is nothing between them")
    means = np.stack([x[y == c].mean(0) for c in classes])
    within = np.linalg.norm(x - means[np.searchsorted(classes, y)], axis=1).mean()
    pairs = [np.linalg.norm(means[i] - means[j]) for i in range(len(classes)) for j in range(i)]
    return float(within / np.mean(pairs))


def logit_gap(logits: ArrayLike, labels: ArrayLike) -> _Floats:
    """The gap between the label's logit and the mean of the others, z_y − mean_{k≠y} z_k, nats; [n, K], [n] -> [n].

    At the optimum of label smoothing all K − 1 gaps of an example are `Smoothing.optimal_logit_gap`, and so is their mean.

    Raises: ValueError for shapes which do not match or fewer than two classes.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels)
    if z.ndim != 2 or y.shape != z.shape[:1] or z.shape[1] < 2:
        raise ValueError(f"expected logits [n, K] with K >= 2 and labels [n], got {z.shape} and {y.shape}; one label per row")
    own = z[np.arange(len(z)), y]
    return own - (z.sum(1) - own) / (z.shape[1] - 1)


def optimal_gap(report: CalibrationReport, name: str) -> float | None:
    """The gap at which the loss of a row is least, nats; None where it is infinite (ε = 0) or has no single value."""
    row = next(row for row in report.rows if row.name == name)
    known = report.smoothing_of(row)
    if row.epsilon == known.epsilon:
        return known.optimal_logit_gap
    if not row.epsilon or row.epsilon < 0 or known.prior != "uniform" or known.convention is None or not report.label_names:
        return None
    from hf_ls.losses.smoothing import Smoothing

    return Smoothing(row.epsilon, known.convention).optimal_logit_gap(len(report.label_names))


def penultimate_plane(
    runs: Mapping[str, Penultimate], label_names: list[str] | None = None, classes: tuple[int, int, int] | None = None
) -> Figure:
    """Features of three classes on the plane of their templates, a panel a run, shaded by which of the three wins.

    Args:
        runs: title -> features, e.g. without and with smoothing, of the same examples.
        classes: three of the K; the most frequent ones of the first run when None. Of each the first `POINTS` are drawn.

    Raises: ValueError for fewer than three classes, and as `class_plane`.
    """
    if not runs:
        raise ValueError("expected at least one run, got none; skip this picture")
    three = _three_classes(next(iter(runs.values())), classes)
    names = [short_name(label_names[c]) if label_names else f"class {c}" for c in three]
    with figure_style():
        figure = new_figure(0.4 + 4.1 * len(runs), 5.2)
        axes = figure.subplots(1, len(runs), squeeze=False)[0]
        for ax, (title, run) in zip(axes, runs.items(), strict=True):
            _draw_plane(ax, run, three)
            ax.set_title(short_name(title), loc="left", fontweight="bold", pad=18)
            ax.set_xlabel("what the last layer sees of them (own scale)", fontsize=8)
        handles = [axes[0].collections[i] for i in range(3)]
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, markerscale=1.8)
        return figure


def logit_gap_histogram(gaps: Mapping[str, ArrayLike], optima: Mapping[str, float | None] | None = None) -> Figure:
    """How large the logit gaps of each run are, with the gap at which its smoothed loss is least marked.

    Args:
        gaps: run -> what `logit_gap` gives, [n].
        optima: run -> `Smoothing.optimal_logit_gap`; None or infinite for no line.

    Raises: ValueError for no run, or one without a finite gap.
    """
    values = {name: np.asarray(gap, np.float64) for name, gap in gaps.items()}
    values = {name: gap[np.isfinite(gap)] for name, gap in values.items()}
    if not values or not all(len(gap) for gap in values.values()):
        raise ValueError("expected finite logit gaps for each run, got none; skip this picture")
    known = {name: value for name, value in (optima or {}).items() if value is not None and math.isfinite(value)}
    drawn = np.concatenate([*values.values(), [value for name, value in known.items() if name in values]])
    edges = np.linspace(drawn.min(), drawn.max() if drawn.max() > drawn.min() else drawn.min() + 1, _GAP_BINS + 1)
    with figure_style():
        figure = new_figure(6.4, 3.9)
        ax = figure.subplots()
        for i, (name, gap) in enumerate(values.items()):
            colour = PALETTE[i % len(PALETTE)][0]
            share = np.histogram(gap, edges)[0] / len(gap)
            ax.stairs(share, edges, fill=True, color=colour, alpha=0.18)
            ax.stairs(
                share, edges, color=colour, lw=1.4, label=f"{short_name(name)} (median {np.median(gap):.2f}, n = {len(gap):,})"
            )
            if name in known:
                ax.axvline(
                    known[name], color=colour, lw=1.4, ls=(0, (4, 2)), label=f"optimum of {short_name(name)}: {known[name]:.2f}"
                )
        ax.axvline(0, color=GREY, lw=0.8)
        ax.set_xlabel("logit of the label less the mean of the others, nats")
        ax.set_ylabel("share of examples")
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", color=LIGHT, lw=0.8)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        return figure


def write_pictures(
    report: CalibrationReport,
    folder: str | os.PathLike[str],
    *,
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    features: Mapping[str, Penultimate] | None = None,
) -> list[Path]:
    """Save those of logit_gap.png and penultimate.png which there is data for.

    Args:
        predictions: name of a row without temperature -> logits [n, K], labels [n] of the reported split.
        features: name of a row -> its `Penultimate`; needs three classes.
    """
    found = []
    if predictions:
        gaps = {name: logit_gap(*arrays) for name, arrays in predictions.items()}
        optima = {name: optimal_gap(report, name) for name in gaps}
        found.append(save_figure(logit_gap_histogram(gaps, optima), Path(folder, "logit_gap.png")))
    if features and all(len(np.unique(run.labels)) >= 3 for run in features.values()):
        epsilons = {row.name: report.epsilon_text(row) for row in report.rows}
        titled = {f"{name} (ε = {epsilons[name]})": run for name, run in features.items()}
        found.append(save_figure(penultimate_plane(titled, report.label_names), Path(folder, "penultimate.png")))
    return found


def drawn_rows(labels: ArrayLike) -> NDArray[np.int64]:
    """The rows of labels [n] which `penultimate_plane` draws, in their order; none of fewer than three classes."""
    y = np.asarray(labels, np.int64)
    counts = np.bincount(y)
    if np.count_nonzero(counts) < 3:
        return np.zeros(0, np.int64)
    return np.sort(_points(y, _most_frequent(counts)))


def _most_frequent(counts: NDArray[np.int64]) -> list[int]:
    return sorted(int(c) for c in np.argsort(-counts, kind="stable")[:3])


def _points(labels: NDArray[np.int64], three: list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.flatnonzero(labels == c)[:POINTS] for c in three])


def _three_classes(run: Penultimate, classes: tuple[int, int, int] | None) -> list[int]:
    counts = np.bincount(run.labels, minlength=len(run.weight))
    three = sorted(classes) if classes is not None else _most_frequent(counts)
    if len(set(three)) != 3 or not all(0 <= c < len(run.weight) and counts[c] for c in three):
        raise ValueError(f"expected three classes with examples, got {three} of {len(run.weight)}; name others in classes=")
    return three


def _draw_plane(ax: Axes, run: Penultimate, three: list[int]) -> None:
    basis = class_plane(run.weight[three])
    kept = _points(run.labels, three)
    points, labels = run.features[kept] @ basis.T, run.labels[kept]
    centre, half = (points.max(0) + points.min(0)) / 2, max(float(np.ptp(points, axis=0).max()) * 0.55, 1e-9)
    extent = (centre[0] - half, centre[0] + half, centre[1] - half, centre[1] + half)
    grid = [np.linspace(low, high, 240) for low, high in (extent[:2], extent[2:])]
    plane = np.stack(np.meshgrid(*grid), -1)
    winner = (plane @ (run.weight[three] @ basis.T).T + run.bias[three]).argmax(-1)
    from matplotlib.colors import to_rgb

    shades = np.array([to_rgb(colour) for colour in _CLASS_COLOURS])
    ax.imshow(1 - 0.13 * (1 - shades[winner]), extent=extent, origin="lower", interpolation="bilinear", aspect="equal")
    for c, colour in zip(three, _CLASS_COLOURS, strict=True):
        ax.scatter(points[labels == c, 0], points[labels == c, 1], s=9, color=colour, alpha=0.65, lw=0)
    logits = run.features[kept] @ run.weight[three].T + run.bias[three]
    right = float((np.array(three)[logits.argmax(1)] == labels).mean())
    spread = within_between(points, labels)
    facts = f"spread within / between {spread:.2f} (0: tight), right {right:.0%}".replace("%", " %")
    ax.annotate(facts, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, va="bottom")
    ax.tick_params(labelsize=7)
    ax.locator_params(nbins=6)
