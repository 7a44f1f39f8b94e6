"""Facts about the pictures: which numbers they draw, what they say, and that no report makes them fail."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from reports import make_report, make_token_report

from hf_ls.metrics import wilson_interval
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.figures import DPI
from hf_ls.report.plots import confidence, groups, loss_curve, plots_of, reliability, write_plots

REPORTS: dict[str, dict[str, Any]] = {
    "default": {},
    "single": {"rows": 1},
    "two classes": {"num_classes": 2},
    "tiny": {"n": 3},
    "one example": {"n": 1, "rows": 1},
    "three rows": {"rows": 3},
    "many classes": {"num_classes": 40},
}


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    return make_report()


def texts(ax: Axes | Figure) -> str:
    return "\n".join(text.get_text() for text in ax.findobj(Text))


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def test_reliability_draws_bins_intervals_band_and_counts_of_every_row(report: CalibrationReport) -> None:
    figure = reliability(report)
    mains, strips = figure.axes[::2], figure.axes[1::2]
    assert len(mains) == len(strips) == len(report.rows)
    for ax, strip, row in zip(mains, strips, report.rows, strict=True):
        bins = {key: np.array(value, float) for key, value in row.reliability.items()}
        filled = bins["count"] > 0
        bars, points = ax.collections
        np.testing.assert_allclose(points.get_offsets(), np.stack([bins["confidence"], bins["accuracy"]], 1)[filled])
        low, high = wilson_interval(np.rint((bins["accuracy"] * bins["count"])[filled]), bins["count"][filled])
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack([low, high], 1), atol=1e-12)
        band = ax.containers[0].patches
        np.testing.assert_allclose([p.get_y() for p in band], bins["band_low"][filled])
        np.testing.assert_allclose([p.get_y() + p.get_height() for p in band], bins["band_high"][filled])
        assert any(np.array_equal(line.get_xydata(), [[0, 0], [1, 1]]) for line in ax.lines)
        assert [p.get_height() for p in strip.containers[0].patches] == row.reliability["count"]
        for count in bins["count"][filled]:
            assert f"{count:.0f}" in texts(strip).split("\n")


def test_reliability_titles_state_ece_its_null_and_n(report: CalibrationReport) -> None:
    for ax, row in zip(reliability(report).axes[::2], report.rows, strict=True):
        null = row.metrics["ece"]["null"]
        assert ax.get_title(loc="left") == f"ECE {row.value('ece'):.3f} (null {null:.3f}), n = 200"
        assert row.name in texts(ax).split("\n")
        assert (f"ε = 0.1, T = {row.temperature:.3g}" in texts(ax)) == (row.name == "smoothed + temperature")


def test_large_counts_are_written_short(report: CalibrationReport) -> None:
    row = report.rows[0]
    count = [0, 0, 0, 0, 0, 9_999, 10_000, 123_456, 4_000_000, *row.reliability["count"][9:]]
    many = replace(row, reliability=row.reliability | {"count": count})
    data = replace(report.dataset, n=many.n, class_counts=[many.n, 0, 0])
    shown = texts(reliability(replace(report, rows=[many], history={}, published=None, dataset=data)).axes[1])
    assert {"9999", "10k", "123k", "4M"} <= set(shown.split("\n"))


def test_confidence_stacks_both_histograms_and_marks_the_two_means(report: CalibrationReport) -> None:
    for ax, row in zip(confidence(report).axes, report.rows, strict=True):
        wrong, right = (container.patches for container in ax.containers)
        hits = np.rint(np.nan_to_num(np.array(row.reliability["accuracy"], float)) * row.reliability["count"])
        assert [p.get_height() for p in wrong] == (row.reliability["count"] - hits).tolist()
        assert [p.get_height() for p in right] == hits.tolist() and hits.sum() == pytest.approx(row.value("accuracy") * row.n)
        assert [p.get_y() for p in right] == (row.reliability["count"] - hits).tolist()
        mean = row.value("accuracy") + row.value("signed_gap")
        assert [line.get_xdata()[0] for line in ax.lines] == [mean, row.value("accuracy")]
        assert f"mean confidence {mean:.3f}, accuracy {row.value('accuracy'):.3f}" in ax.get_title(loc="left")


@pytest.mark.parametrize(("num_classes", "rows"), [(2, 1), (3, 4), (40, 1)])
def test_axes_start_at_the_lowest_bin_with_a_prediction(num_classes: int, rows: int) -> None:
    report = make_report(60, num_classes, rows=rows)
    low = min(np.flatnonzero(row.reliability["count"])[0] for row in report.rows) / 15
    for ax in [*reliability(report).axes, *confidence(report).axes]:
        assert ax.get_xlim() == pytest.approx((low, 1))


def test_bins_of_few_predictions_are_pale(report: CalibrationReport) -> None:
    for ax, row in zip(reliability(report).axes[::2], report.rows, strict=True):
        count = np.array([n for n in row.reliability["count"] if n])
        alpha = ax.collections[-1].get_facecolors()[:, 3]
        assert alpha[count.argmax()] == 1 and (np.argsort(alpha, kind="stable") == np.argsort(count, kind="stable")).all()


def test_a_run_has_one_colour_in_all_plots(report: CalibrationReport) -> None:
    of_bins = [matplotlib.colors.to_hex(ax.collections[-1].get_facecolors()[0]) for ax in reliability(report).axes[::2]]
    of_bars = [matplotlib.colors.to_hex(ax.containers[1].patches[0].get_facecolor()) for ax in confidence(report).axes]
    assert [c.lower() for c in of_bins] == of_bars and len(set(of_bars)) == 4
    curves = {line.get_color().lower() for line in loss_curve(report).axes[0].lines}
    assert curves == {of_bins[0], of_bins[2]}


def test_the_evaluations_have_an_axis_of_their_own(report: CalibrationReport) -> None:
    training, evaluation = loss_curve(report).axes
    values = [y for line in evaluation.lines for y in line.get_ydata()]
    assert evaluation.get_ylim()[0] >= min(values) - 0.1 and evaluation.get_ylim() != training.get_ylim()


def test_loss_curve_sets_the_smoothed_objective_apart(report: CalibrationReport) -> None:
    training, evaluation = loss_curve(report).axes
    lines = {line.get_label(): line for line in training.lines}
    assert list(lines) == [
        "baseline (ε = 0): nll",
        "smoothed (ε = 0.1): nll",
        "smoothed (ε = 0.1): objective",
    ]
    nll, objective = lines["smoothed (ε = 0.1): nll"], lines["smoothed (ε = 0.1): objective"]
    assert nll.get_linestyle() == "-" and objective.get_linestyle() == "--"
    assert objective.get_linewidth() < nll.get_linewidth()
    np.testing.assert_allclose(objective.get_ydata() - nll.get_ydata(), 0.1)
    assert list(nll.get_xdata()) == [10, 20, 30, 40, 50]
    assert "not comparable" in training.get_xlabel()
    assert [line.get_label() for line in evaluation.lines] == [
        "baseline (ε = 0): nll",
        "smoothed (ε = 0.1): nll",
    ]
    assert list(evaluation.lines[0].get_ydata()) == [0.8]


def test_loss_curve_of_a_baseline_alone_has_no_second_quantity() -> None:
    training = loss_curve(make_report(rows=1)).axes[0]
    assert [line.get_label() for line in training.lines] == ["baseline (ε = 0): nll"]
    assert "objective" not in training.get_xlabel()


def test_loss_curve_of_a_stock_trainer_calls_its_loss_an_objective() -> None:
    history = {"smoothed": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    figure = loss_curve(make_report(history=history))
    assert [line.get_label() for ax in figure.axes for line in ax.lines] == ["smoothed (ε = 0.1): objective"]


def test_diverged_losses_leave_a_gap(report: CalibrationReport) -> None:
    records = [{"step": s, "nll": value} for s, value in enumerate([1.0, math.nan, 0.5])]
    line = loss_curve(replace(report, history={"baseline": records})).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [1.0, math.nan, 0.5])


def test_no_history_no_loss_curve(report: CalibrationReport, tmp_path: Path) -> None:
    bare = replace(report, history={"baseline": [{"step": 3, "train_runtime": 1.0}]})
    with pytest.raises(ValueError, match="in history, got none"):
        loss_curve(bare)
    assert [path.name for path in write_plots(bare, tmp_path)] == ["reliability.png", "confidence.png"]


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_can_be_drawn(name: str) -> None:
    report = make_report(**REPORTS[name])
    for plot in (reliability, confidence, loss_curve):
        drawn(plot(report))


def test_texts_do_not_overlap_in_the_panel_titles(report: CalibrationReport) -> None:
    rows = [replace(row, run=f"a very long name of a run, number {i}") for i, row in enumerate(report.rows)]
    figure = drawn(confidence(replace(report, rows=rows, history={}, published=None)))
    for ax in figure.axes:
        name, settings = (text.get_window_extent() for text in ax.texts)
        assert name.x1 < settings.x0
        (facts,) = (t for t in ax.findobj(Text) if t.get_text() == ax.get_title(loc="left"))
        assert facts.get_window_extent().y1 <= name.y0 + 1


@pytest.mark.filterwarnings("error", "ignore:Glyph")
@pytest.mark.parametrize("hostile", ["$x$", "$\\frac{$", "$\\frac{", "a\nb", "_x^2", "🙂", "$", "\\"])
def test_names_are_text_and_never_formulas(hostile: str, report: CalibrationReport) -> None:
    rows = [replace(report.rows[0], run=hostile)]
    named = replace(report, rows=rows, history={hostile: report.history["baseline"]}, published=None)
    figure = drawn(loss_curve(named))
    drawn(reliability(named))
    shown = figure.legends[0].get_texts()[0].get_text()
    assert shown.replace("\\$", "$").strip().startswith(hostile.replace("\n", " "))


def test_files_are_png_at_150_dpi_whatever_the_users_settings(report: CalibrationReport, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"savefig.dpi": 20, "font.size": 40, "savefig.bbox": "tight", "axes.facecolor": "red"}):
        first = write_plots(report, tmp_path / "a")
    second = write_plots(report, tmp_path / "b")
    assert [p.name for p in first] == ["reliability.png", "confidence.png", "loss_curve.png", "calibration_steps.png"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    width, height = reliability(report).get_size_inches() * DPI
    assert imread(first[0]).shape[:2] == (int(height), int(width))
    assert dict(matplotlib.rcParams) == before


def test_plots_come_from_the_file_alone(report: CalibrationReport, tmp_path: Path) -> None:
    loaded = CalibrationReport.load(report.save(tmp_path / "calibration.json"))
    (one,), (two,) = (write_plots(given, tmp_path / name, ["reliability.png"]) for name, given in (("1", report), ("2", loaded)))
    assert one.read_bytes() == two.read_bytes()


@pytest.fixture(scope="module")
def tokens() -> CalibrationReport:
    return make_token_report()


def test_groups_draw_nll_and_ece_by_position_and_frequency_of_every_row(tokens: CalibrationReport) -> None:
    figure = drawn(groups(tokens))
    axes = np.array(figure.axes).reshape(2, 2)
    for column, kind in enumerate(("position", "frequency")):
        for ax, metric in zip(axes[:, column], ("nll", "ece"), strict=True):
            assert len(ax.lines) == len(tokens.rows)
            for line, row in zip(ax.lines, tokens.rows, strict=True):
                expected = [group[metric] for group in row.groups if group["kind"] == kind]
                assert list(line.get_ydata()) == expected
                assert line.get_linestyle() == ("-" if row.temperature == 1 else "--")
        ticks = [label.get_text() for label in axes[1, column].get_xticklabels()]
        named = [group for group in tokens.rows[0].groups if group["kind"] == kind]
        assert [tick.split("\n")[1] for tick in ticks] == [str(group["n"]) for group in named]
    assert [tick.split("\n")[0] for tick in ticks[-2:]] == ["10k-99k", "100k-999k"]
    assert {axes[0, 0].get_ylabel(), axes[1, 0].get_ylabel()} == {"NLL, nats per token", "ECE"}
    colours = [matplotlib.colors.to_hex(ax.collections[-1].get_facecolors()[0]).upper() for ax in reliability(tokens).axes[::2]]
    assert [line.get_color() for line in axes[0, 0].lines] == colours


def test_groups_of_few_tokens_are_hollow(tokens: CalibrationReport) -> None:
    row = tokens.rows[0]
    position = [group for group in row.groups if group["kind"] == "position"]
    changed = [group | {"n": 49 + i} for i, group in enumerate(position)]
    figure = groups(replace(tokens, rows=[replace(row, groups=changed)], history={}, published=None))
    (hollow,) = figure.axes[0].collections
    np.testing.assert_allclose(hollow.get_offsets(), [[0, position[0]["nll"]]])
    np.testing.assert_allclose(hollow.get_facecolors(), [[1, 1, 1, 1]])


def test_a_group_which_a_row_lacks_leaves_a_gap(tokens: CalibrationReport) -> None:
    position = [group for group in tokens.rows[0].groups if group["kind"] == "position"]
    rows = [tokens.rows[0], replace(tokens.rows[2], groups=position[:1])]
    figure = groups(replace(tokens, rows=rows, history={}, published=None))
    data = figure.axes[0].lines[1].get_ydata()
    assert data[0] == position[0]["nll"] and np.isnan(data[1:]).all() and len(data) == len(position)


def test_tick_labels_of_groups_do_not_overlap(tokens: CalibrationReport) -> None:
    for ax in drawn(groups(tokens)).axes[2:]:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_no_groups_no_picture_of_them(report: CalibrationReport, tokens: CalibrationReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"groups of a kind in .*got none; skip this plot"):
        groups(report)
    names = [path.name for path in write_plots(tokens, tmp_path)]
    assert names == ["reliability.png", "confidence.png", "loss_curve.png", "groups.png", "calibration_steps.png"]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_token_counts_stand_on_a_log_axis_which_holds_1_and_1e7(rows: int) -> None:
    report = make_token_report(rows=rows)
    row = report.rows[0]
    n = row.n - 1 + 10_000_000
    count = [1, *[0] * 13, n - 1]
    huge = replace(
        row,
        reliability=row.reliability
        | {"count": count, "accuracy": [0.0, *[None] * 13, 0.9], "confidence": [0.05, *[None] * 13, 0.97]},
    )
    report = replace(report, rows=[huge], history={}, published=None, dataset=replace(report.dataset, n=n))
    strip = reliability(report).axes[1]
    assert strip.get_yscale() == "log" and "log" in strip.get_ylabel()
    assert "10M" in texts(strip).split("\n")
    (ax,) = drawn(confidence(report)).axes
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "tokens"
    assert ax.get_ylim()[0] < 1 and ax.get_ylim()[1] > 1e7
    wrong, right = (container.patches for container in ax.containers)
    hits = np.rint(0.9 * (n - 1))
    assert [p.get_height() for p in wrong] == [1, *[0] * 13, n - 1 - hits]
    assert [p.get_height() for p in right] == [*[0] * 14, hits]
    for grey, coloured in zip(wrong, right, strict=True):  # side by side inside the bin
        assert coloured.get_y() == grey.get_y() and coloured.get_x() == pytest.approx(grey.get_x() + grey.get_width())


def test_nothing_leaves_the_picture(tokens: CalibrationReport) -> None:
    for plot in (reliability, confidence, loss_curve, groups):
        figure = drawn(plot(tokens))
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, plot.__name__


def test_units_are_tokens(tokens: CalibrationReport) -> None:
    assert loss_curve(tokens).axes[0].get_ylabel() == "nats per token"
    assert loss_curve(make_report()).axes[0].get_ylabel() == "nats per example"


@pytest.mark.filterwarnings("error", "ignore:Glyph")
@pytest.mark.parametrize("hostile", ["$x$", "$\\frac{$", "a\nb", "_x^2", "12345678901234567890", "\\"])
def test_group_names_are_text_and_never_formulas(hostile: str, tokens: CalibrationReport) -> None:
    group = tokens.rows[0].groups[-1] | {"name": hostile}
    row = replace(tokens.rows[0], run=hostile, groups=[group])
    drawn(groups(replace(tokens, rows=[row], history={}, published=None)))


def test_the_caption_of_groups_names_the_kinds_which_are_drawn() -> None:
    report = make_token_report()
    rows = [replace(row, groups=[group for group in row.groups if group["kind"] == "position"]) for row in report.rows]
    captions = [{p.file: p.caption for p in plots_of(r)}["groups.png"] for r in (report, replace(report, rows=rows))]
    assert "seen in training" in captions[0] and "seen in training" not in captions[1]
