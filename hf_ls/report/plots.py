"""The plots of a report: reliability diagrams, confidence histograms, loss curves, groups of tokens, calibration while it trains.

Each makes a matplotlib Figure of a `CalibrationReport`; `write_plots` saves them all. matplotlib is imported on use, without
pyplot: such a Figure always saves through Agg and leaves the caller's backend alone.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_ls.metrics.intervals import wilson_interval
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.figures import (
    GREY,
    INK,
    LIGHT,
    Series,
    figure_style,
    logged_series,
    new_figure,
    row_colours,
    save_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND, _WRONG = "#DDDDDD", "#B5B5B5"
FEW = 50  # tokens, below which a group says little
_CURVES = ("loss", "nll", "eval_nll")
_STEPS = {"eval_nll": "NLL, nats", "eval_ece": "ECE", "eval_signed_gap": "confidence − accuracy"}
_GROUPS = {"position": "position in the sequence", "frequency": "occurrences of the label token in training"}


def loss_curve(report: CalibrationReport) -> Figure:
    """NLL and objective in training, and the evaluation NLL, by optimizer step, one colour a run.

    The NLL (solid) can be compared between runs. The objective (thin, dashed) cannot: smoothing adds a term
    to it and moves its minimum. Where the two are equal, only the NLL is drawn. The objective of a run whose log has no NLL
    is left out beside other runs: nothing there could be compared with it.

    Raises: ValueError for a report without such records.
    """
    runs = {name: {key: logged_series(records, key) for key in _CURVES} for name, records in report.history.items()}
    if len(runs) > 1:
        runs = {name: run if run["nll"] else run | {"loss": []} for name, run in runs.items()}
    panels = [
        (title, keys)
        for title, keys in (("Training", ("nll", "loss")), ("Evaluation during training", ("eval_nll",)))
        if any(run[key] for run in runs.values() for key in keys)
    ]
    if not panels:
        raise ValueError(f"expected 'step' with one of {_CURVES} in history, got none; skip this plot")
    epsilons = {row.name: report.epsilon_text(row) for row in report.rows}
    colours, objective = row_colours(report), False
    with figure_style():
        figure = new_figure(0.6 + 4.1 * len(panels), 3.7)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]  # each its own range: the evaluations lie close together
        for ax, (title, keys) in zip(axes, panels, strict=True):
            for (name, run), key in itertools.product(runs.items(), keys):
                if not run[key] or (key == "loss" and not _differ(run["loss"], run["nll"])):
                    continue
                style: dict[str, Any] = {"lw": 1.6, "marker": "o" if len(run[key]) <= 30 else "", "ms": 3.5}
                if key == "loss":
                    style, objective = {"lw": 0.9, "ls": (0, (4, 2))}, True
                what = "objective" if key == "loss" else "nll"
                label = f"{short_name(name)} (ε = {epsilons[name]}): {what}"
                ax.plot(*zip(*run[key], strict=True), color=colours[name], label=label, **style)
            ax.set_title(title, loc="left", fontweight="bold")
            ax.set_xlabel("optimizer step")
            ax.set_xlim(left=0)
            ax.grid(axis="y", color=LIGHT, lw=0.8)
        axes[0].set_ylabel(f"nats per {'token' if report.is_token_task else 'example'}")
        if objective:
            axes[0].set_xlabel("optimizer step\nobjective = nll + smoothing term: not comparable between runs")
        if len(panels) > 1:
            axes[1].set_xlabel("optimizer step\nown axis: compare the runs, not the panels" if objective else "optimizer step")
        named = {line.get_label(): line for ax in axes[::-1] for line in ax.lines}
        figure.legend(handles=named.values(), loc="outside lower center", ncols=len(panels) + 1, fontsize=8)
        return figure


def reliability(report: CalibrationReport) -> Figure:
    """Accuracy against confidence per bin, a panel a row: Wilson 95 % intervals, consistency band, counts.

    Each bin of a calibrated model lies inside the band with probability 95 %: one in twenty lies outside. Both take
    predictions as independent, also tokens of one sequence, whose counts stand on a logarithmic axis.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = row_colours(report)
    top = max(_array(row, "count").max() for row in report.rows)
    alone = ", tokens taken as independent" if report.is_token_task else ""
    with figure_style():
        columns, lines = _grid(len(report.rows))
        figure = new_figure(0.4 + 3.9 * columns, 0.5 + 4.7 * lines)
        # The third, empty line of each group parts it from the title of the next.
        grid = figure.add_gridspec(3 * lines, columns, height_ratios=(4.5, 1, 0.12) * lines)
        for i, row in enumerate(report.rows):
            main = figure.add_subplot(grid[3 * (i // columns), i % columns])
            strip = figure.add_subplot(grid[3 * (i // columns) + 1, i % columns], sharex=main)
            _draw_bins(main, row, colours[row.name])
            _draw_counts(strip, row, colours[row.name], top)
            null = row.metrics["ece"].get("null")
            beside = "" if null is None else f" (null {null:.3f})"
            _title(main, report, row, f"ECE {row.value('ece'):.3f}{beside}, n = {row.n:,}")
            main.set_xlim(_left(report), 1)
            main.tick_params(bottom=False, labelbottom=False, labelleft=i % columns == 0)
            if i % columns == 0:
                main.set_ylabel("accuracy")
                strip.set_ylabel("count\n(log axis)" if row.is_token else "count")
        figure.legend(
            handles=[
                Line2D(
                    [],
                    [],
                    color=INK,
                    marker="o",
                    ms=4,
                    lw=1,
                    label=f"accuracy in the bin, Wilson 95 %{alone}; paler: fewer predictions",
                ),
                Patch(facecolor=_BAND, label="95 % band of a calibrated model, per bin"),
                Line2D([], [], color=GREY, lw=1, ls=(0, (4, 3)), label="perfect calibration"),
            ],
            loc="outside lower center",
            ncols=1 if columns == 1 else 2 if alone else 3,
            fontsize=8,
        )
        return figure


def confidence(report: CalibrationReport) -> Figure:
    """How many predictions have which confidence, right and wrong ones stacked, a panel a row.

    Tokens: side by side, on a logarithmic axis, where a stack would hide the upper part.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = row_colours(report)
    with figure_style():
        columns, lines = _grid(len(report.rows))
        figure = new_figure(0.4 + 3.9 * columns, 0.5 + 2.7 * lines, hspace=0.05)
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for ax in axes[len(report.rows) :]:
            ax.remove()
        for i, (ax, row) in enumerate(zip(axes, report.rows, strict=False)):
            edges, count = _array(row, "edges"), _array(row, "count")
            right = np.rint(np.nan_to_num(_array(row, "accuracy")) * count)
            wrong = count - right
            bars: dict[str, Any] = {
                "width": np.diff(edges),
                "align": "edge",
                "edgecolor": "white",
                "lw": 0.6,
            }
            if row.is_token:
                bars |= {"width": bars["width"] / 2, "log": True}
                ax.bar(edges[:-1], wrong, color=_WRONG, **bars)
                ax.bar(edges[:-1] + bars["width"], right, color=colours[row.name], **bars)
                ax.set_ylim(bottom=0.5)
            else:
                ax.bar(edges[:-1], wrong, color=_WRONG, **bars)
                ax.bar(edges[:-1], right, bottom=wrong, color=colours[row.name], **bars)
                ax.yaxis.get_major_locator().set_params(integer=True)
            accuracy = row.value("accuracy")
            mean = accuracy + row.value("signed_gap")
            ax.axvline(mean, color=INK, lw=1.2)
            ax.axvline(accuracy, color=INK, lw=1.2, ls=(0, (2, 2)))
            _title(ax, report, row, f"mean confidence {mean:.3f}, accuracy {accuracy:.3f}, n = {row.n:,}")
            ax.set_xlim(_left(report), 1)
            ax.set_xlabel("confidence")
            if i % columns == 0:
                ax.set_ylabel("tokens" if row.is_token else "predictions")
        figure.legend(
            handles=[
                Patch(facecolor=colours[report.rows[0].name], label="correct (colour of the run)"),
                Patch(facecolor=_WRONG, label="incorrect"),
                Line2D([], [], color=INK, lw=1.2, label="mean confidence"),
                Line2D([], [], color=INK, lw=1.2, ls=(0, (2, 2)), label="accuracy"),
            ],
            loc="outside lower center",
            ncols=4 if columns > 1 else 2,
            fontsize=8,
        )
        return figure


def groups(report: CalibrationReport) -> Figure:
    """NLL and ECE of the tokens by position and by how often the label occurs in training, a line a row.

    Raises: ValueError for a report without such groups.
    """
    kinds = [(kind, title) for kind, title in _GROUPS.items() if _names(report, kind)]
    if not kinds:
        raise ValueError(f"expected rows with groups of a kind in {list(_GROUPS)}, got none; skip this plot")
    colours = row_colours(report)
    with figure_style():
        figure = new_figure(0.6 + 5.0 * len(kinds), 6.2)
        axes = figure.subplots(2, len(kinds), sharey="row", sharex="col", squeeze=False)
        for (kind, title), (above, below) in zip(kinds, axes.T, strict=True):
            names = _names(report, kind)
            for row in report.rows:
                found = {group["name"]: group for group in row.groups if group["kind"] == kind}
                for ax, metric in ((above, "nll"), (below, "ece")):
                    values = [found.get(name, {}).get(metric) for name in names]
                    points = [math.nan if value is None else value for value in values]
                    dashes = (0, (4, 2)) if row.tempered else "-"
                    label = f"{short_name(row.name)} (ε = {report.epsilon_text(row)})"
                    ax.plot(range(len(names)), points, color=colours[row.name], ls=dashes, lw=1.6, marker="o", ms=4, label=label)
                    few = [i for i, name in enumerate(names) if found.get(name, {}).get("n", FEW) < FEW]
                    ax.scatter(few, [points[i] for i in few], s=18, facecolor="white", edgecolors=colours[row.name], zorder=3)
                    ax.grid(axis="y", color=LIGHT, lw=0.8)
            ticks = [f"{re.sub('[0-9]+', _rounded_down, short_name(name))}\n{_short(n)}" for name, n in names.items()]
            below.set_xticks(range(len(names)), ticks)
            below.set_xlabel(f"{title}\n(below each group: number of tokens; hollow: fewer than {FEW})")
            above.set_title(f"By {kind}", loc="left", fontweight="bold")
        axes[0][0].set_ylabel("NLL, nats per token")
        axes[1][0].set_ylabel("ECE")
        for ax in axes[:, 0]:
            ax.set_ylim(bottom=0)
        figure.legend(handles=axes[0][0].lines, loc="outside lower center", ncols=2, fontsize=8)
        return figure


def calibration_over_steps(report: CalibrationReport) -> Figure:
    """NLL, ECE and signed gap of the evaluations during training, by optimizer step, one colour a run.

    Raises: ValueError for a history without evaluations.
    """
    runs = {name: {key: logged_series(records, key) for key in _STEPS} for name, records in report.history.items()}
    panels = [key for key in _STEPS if any(run[key] for run in runs.values())]
    if not panels:
        raise ValueError(f"expected 'step' with one of {list(_STEPS)} in history, got none; evaluate during training")
    colours, epsilons = row_colours(report), {row.name: report.epsilon_text(row) for row in report.rows}
    with figure_style():
        figure = new_figure(0.5 + 3.3 * len(panels), 3.5)
        for ax, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, run in runs.items():
                if run[key]:
                    label = f"{short_name(name)} (ε = {epsilons[name]})"
                    ax.plot(*zip(*run[key], strict=True), color=colours[name], lw=1.6, marker="o", ms=3.5, label=label)
            if key == "eval_signed_gap":
                ax.axhline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
                ax.set_title("above 0: over-confident", loc="left")
            ax.set_ylabel(_STEPS[key])
            ax.set_xlabel("optimizer step")
            ax.set_xlim(left=0)
            if key == "eval_ece":
                ax.set_ylim(bottom=0)
            ax.grid(axis="y", color=LIGHT, lw=0.8)
        named = {line.get_label(): line for ax in figure.axes for line in ax.lines if not str(line.get_label()).startswith("_")}
        figure.legend(handles=list(named.values()), loc="outside lower center", ncols=max(1, len(panels)), fontsize=8)
        return figure


@dataclass(frozen=True)
class Plot:
    """One plot of a report: its file, what it is called and what it shows, a sentence."""

    file: str
    title: str
    caption: str


def plots_of(report: CalibrationReport) -> list[Plot]:
    """The plots which a report has the data for, and the pictures which were drawn beside it, in the order of a card."""
    logged = {key for records in report.history.values() for record in records if "step" in record for key in record}
    kinds = [
        (True, "reliability.png", "Reliability diagram: accuracy against confidence for each row of the table",
         "On the dashed line a model is right as often as it is sure; below it, it is over-confident, above it under-confident. "
         "The grey band is where 95 % of the points of a calibrated model would lie."),
        (True, "confidence.png", "Confidence of right and wrong predictions for each row of the table",
         "How sure the right predictions (in colour) and the wrong ones (grey) are; where the mean confidence lies right of the "
         "accuracy, the model is over-confident."),
        (bool(logged & {*_CURVES}), "loss_curve.png", "NLL during training and evaluation of each run",
         "The NLL can be compared between runs; the training objective of a smoothed run cannot, since smoothing adds a term."),
        (any(_names(report, kind) for kind in _GROUPS), "groups.png", "NLL and ECE by group of tokens for each row of the table",
         _group_caption(report)),
        (bool(logged & {*_STEPS}), "calibration_steps.png", "NLL, ECE and signed gap during training of each run",
         "How calibration changes while the model trains; a signed gap above 0 means over-confident."),
        ("logit_gap.png" in report.pictures, "logit_gap.png", "Gap between the logit of the label and the mean of the others",
         "How far each model sets the right class apart, in nats; smoothing has a finite optimum (dashed), the plain cross "
         "entropy has none, so that its gaps grow."),
        ("penultimate.png" in report.pictures, "penultimate.png", "Examples of three classes as the last layer sees them",
         "Each point is an example, coloured by its label; the shade behind it is the class which the model chooses there. "
         "Tighter clusters (a smaller spread within / between) are what smoothing does; they do not make predictions better by "
         "themselves."),
    ]  # fmt: skip
    return [Plot(*texts) for there, *texts in kinds if there]


def write_plots(report: CalibrationReport, folder: str | os.PathLike[str], only: Collection[str] | None = None) -> list[Path]:
    """Save `plots_of`, or of these `only` some by file name, as PNG files of 150 dpi."""
    draw = {
        "reliability.png": reliability,
        "confidence.png": confidence,
        "groups.png": groups,
        "loss_curve.png": loss_curve,
        "calibration_steps.png": calibration_over_steps,
    }
    return [
        save_figure(draw[plot.file](report), Path(folder, plot.file))
        for plot in plots_of(report)
        if plot.file in (draw if only is None else only)
    ]


def _draw_bins(ax: Axes, row: CalibrationRow, colour: str) -> None:
    from matplotlib.colors import to_rgba

    edges, count = _array(row, "edges"), _array(row, "count")
    filled = count > 0
    mean, accuracy = _array(row, "confidence")[filled], _array(row, "accuracy")[filled]
    low, high = _array(row, "band_low")[filled], _array(row, "band_high")[filled]
    ax.bar(edges[:-1][filled], high - low, np.diff(edges)[filled], low, align="edge", color=_BAND)
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls=(0, (4, 3)))
    ends = wilson_interval(np.rint(accuracy * count[filled]), count[filled])
    # The fewer predictions, the paler: what a glance takes in should be what most predictions say.
    shades = [to_rgba(colour, alpha) for alpha in 0.25 + 0.75 * np.sqrt(count[filled] / count.max())]
    ax.vlines(mean, *ends, colors=shades, lw=1.2)
    ax.scatter(mean, accuracy, s=20, c=shades, lw=0, zorder=3)
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks(np.arange(6) / 5)


def _draw_counts(ax: Axes, row: CalibrationRow, colour: str, top: float) -> None:
    edges, count = _array(row, "edges"), _array(row, "count")
    ax.bar(edges[:-1], count, np.diff(edges), align="edge", color=colour, edgecolor="white", lw=0.6, log=row.is_token)
    for centre, number in zip((edges[:-1] + edges[1:]) / 2, count, strict=True):
        if number:  # bars on a linear axis keep their proportions, so the small ones need their number
            above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 6}
            ax.annotate(_short(number), (centre, number), (0, 1.5), **above)
    ax.set_ylim((0.5, 4 * top**1.15) if row.is_token else (0, top * 1.3))
    ax.set_yticks([])
    ax.minorticks_off()
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("confidence")


def _short(count: float) -> str:
    """A count in at most four characters: 9999, 12k, 3M."""
    power = 0 if count < 10_000 else int(np.log10(count) // 3)
    return f"{count / 1000**power:.0f}{('', 'k', 'M', 'G')[power]}"


def _rounded_down(number: re.Match[str]) -> str:
    """The ends of 10000-99999 as 10k and 99k."""
    power = (len(number[0]) - 1) // 3
    return f"{int(number[0]) // 1000**power}{('', 'k', 'M', 'G')[power]}" if power < 4 else number[0]


def _title(ax: Axes, report: CalibrationReport, row: CalibrationRow, facts: str) -> None:
    ax.set_title(facts, loc="left", pad=5)
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    ax.annotate(short_name(row.name), (0, 1), (0, 17), fontweight="bold", fontsize=9.5, **above)
    settings = f"ε = {report.epsilon_text(row)}" + (f", T = {row.temperature:.3g}" if row.tempered else "")
    ax.annotate(settings, (1, 1), (0, 17), ha="right", color=GREY, **above)


def _left(report: CalibrationReport) -> float:
    """Where the axis of confidence begins: at the lowest bin in which any row has a prediction."""
    return min(float(_array(row, "edges")[:-1][_array(row, "count") > 0].min()) for row in report.rows)


def _names(report: CalibrationReport, kind: str) -> dict[str, int]:
    """The groups of one kind with their numbers of tokens, in order."""
    return {group["name"]: group["n"] for row in report.rows for group in row.groups if group["kind"] == kind}


def _group_caption(report: CalibrationReport) -> str:
    words = {"position": "by the position of a token", "frequency": "by how often it was seen in training"}
    return f"How good the probabilities are {' and '.join(words[kind] for kind in _GROUPS if _names(report, kind))}."


def _grid(panels: int) -> tuple[int, int]:
    """Columns and lines: four panels as plain and tempered side by side, one line a run."""
    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    return columns, -(-panels // columns)


def _array(row: CalibrationRow, key: str) -> NDArray[np.float64]:
    return np.array(row.reliability[key], dtype=np.float64)  # None becomes NaN


def _differ(loss: Series, nll: Series) -> bool:
    """Whether the objective is another quantity than the NLL, beyond the Trainer's rounding of its log."""
    known = dict(nll)
    return any(not abs(value - known.get(step, math.inf)) < 1e-3 for step, value in loss)
