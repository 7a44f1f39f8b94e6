"""Facts about the pictures of smoothing: projections, gaps and lines against independent computations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import CLASSES, classification_rows, collate, tiny_bert, tiny_distilbert, tiny_llama
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from reports import make_report

from hf_ls.losses.smoothing import Smoothing
from hf_ls.report.pictures import (
    POINTS,
    Penultimate,
    class_plane,
    drawn_rows,
    logit_gap,
    logit_gap_histogram,
    optimal_gap,
    penultimate,
    penultimate_plane,
    within_between,
    write_pictures,
)
from hf_ls.report.plots import calibration_over_steps


def example(n=300, d=8, classes=4, seed=0):
    g = np.random.default_rng(seed)
    weight, bias, labels = g.normal(size=(classes, d)), g.normal(size=classes), g.integers(0, classes, n)
    return Penultimate(weight[labels] + g.normal(size=(n, d)), labels, weight, bias)


def history(names):
    steps = [{"step": s, "eval_nll": 1 / s, "eval_ece": 0.1 * s, "eval_signed_gap": 0.05 - 0.01 * s} for s in (1, 2, 3)]
    return {name: [{"step": 1, "loss": 1.0}, *steps] for name in names}


def test_the_plane_is_an_orthonormal_basis_of_the_differences_of_the_templates():
    w = example().weight[:3]
    basis = class_plane(w)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-12)
    differences = (w[1:] - w[0]).T
    # The same plane by another way: the projector of the singular vectors.
    u = np.linalg.svd(differences, full_matrices=False)[0]
    np.testing.assert_allclose(basis.T @ basis, u @ u.T, atol=1e-12)
    np.testing.assert_allclose(basis.T @ basis @ differences, differences, atol=1e-12)


def test_the_projection_keeps_every_difference_of_the_three_logits():
    run = example()
    basis = class_plane(run.weight[:3])
    points = run.features @ basis.T
    full = run.features @ run.weight[:3].T
    flat = points @ (run.weight[:3] @ basis.T).T
    np.testing.assert_allclose(full - full[:, :1], flat - flat[:, :1], atol=1e-10)


def test_templates_without_a_plane_are_refused():
    with pytest.raises(ValueError, match="span a plane"):
        class_plane([[0.0, 0], [1, 1], [2, 2]])
    with pytest.raises(ValueError, match="three templates"):
        class_plane(np.ones((2, 4)))


def test_the_picture_shows_each_example_of_the_three_classes_where_it_projects():
    runs = {"ε = 0": example(), "ε = 0.1": example(seed=1)}
    figure = penultimate_plane(runs, list("abcd"), classes=(0, 1, 3))
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 2
    for ax, (title, run) in zip(figure.axes, runs.items(), strict=True):
        assert ax.get_title(loc="left") == title
        basis = class_plane(run.weight[[0, 1, 3]])
        assert len(ax.collections) == 3
        for c, drawn in zip((0, 1, 3), ax.collections, strict=True):
            expected = run.features[run.labels == c] @ basis.T
            np.testing.assert_allclose(drawn.get_offsets(), expected)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "d"]


def test_the_most_frequent_classes_are_chosen_and_points_are_limited():
    run = example(n=2400, classes=3)
    run = Penultimate(run.features, np.where(run.labels == 1, 4, run.labels), np.eye(5, 8), np.zeros(5))
    ax = penultimate_plane({"x": run}).axes[0]
    assert [len(part.get_offsets()) for part in ax.collections] == [POINTS] * 3
    basis = class_plane(run.weight[[0, 2, 4]])
    np.testing.assert_allclose(ax.collections[2].get_offsets(), run.features[run.labels == 4][:POINTS] @ basis.T)
    drawn = drawn_rows(run.labels)  # of other rows nothing need be known
    less = Penultimate(run.features[drawn], run.labels[drawn], run.weight, run.bias)
    again = penultimate_plane({"x": less}).axes[0]
    for one, other in zip(ax.collections, again.collections, strict=True):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())
    assert len(drawn) == 3 * POINTS and not len(drawn_rows([0, 1, 1]))
    with pytest.raises(ValueError, match="three classes with examples"):
        penultimate_plane({"x": run}, classes=(0, 1, 2))
    with pytest.raises(ValueError, match="three classes"):
        penultimate_plane({"x": Penultimate(np.ones((2, 3)), [0, 1], np.ones((2, 3)), np.zeros(2))})


def test_the_shading_is_the_class_with_the_largest_logit():
    run = example()
    ax = penultimate_plane({"x": run}, classes=(0, 1, 2)).axes[0]
    image, (left, right, bottom, top) = np.asarray(ax.images[0].get_array()), ax.images[0].get_extent()
    kept = np.isin(run.labels, [0, 1, 2])
    points = run.features[kept] @ class_plane(run.weight[:3]).T
    winner = (run.features[kept] @ run.weight[:3].T + run.bias[:3]).argmax(1)
    size = len(image) - 1
    columns = np.rint((points[:, 0] - left) / (right - left) * size).astype(int)
    rows = np.rint((points[:, 1] - bottom) / (top - bottom) * size).astype(int)
    shades = image[rows, columns]
    colours = [np.median(shades[winner == c], axis=0) for c in range(3)]
    assert len({tuple(np.round(c, 3)) for c in colours}) == 3
    agree = [np.allclose(shade, colours[c], atol=1e-6) for shade, c in zip(shades, winner, strict=True)]
    assert np.mean(agree) > 0.97  # but for points within half a pixel of a border


def test_spread_has_a_known_value_and_no_scale():
    points, labels = [[-1, 0], [1, 0], [9, 0], [11, 0]], [0, 0, 7, 7]
    assert within_between(points, labels) == pytest.approx(0.1)
    assert within_between(np.array(points) * 30, labels) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="two or more"):
        within_between(points, [0, 0, 0, 0])


@pytest.mark.parametrize("convention", ["all", "wrong"])
def test_the_gap_of_a_model_at_the_optimum_is_the_marked_line(convention):
    smoothing, labels = Smoothing(0.1, convention), torch.tensor([0, 2, 1])
    gaps = logit_gap(smoothing.target(labels, 4).log().double() + 3, labels)
    optimum = smoothing.optimal_logit_gap(4)
    np.testing.assert_allclose(gaps, optimum, rtol=1e-6)
    figure = logit_gap_histogram({"baseline": [1.0, 2, 9], "smoothed": gaps}, {"baseline": np.inf, "smoothed": optimum})
    lines = [line for line in figure.axes[0].lines if "optimum" in str(line.get_label())]
    assert [line.get_xdata()[0] for line in lines] == [optimum]
    assert f"{optimum:.2f}" in lines[0].get_label()


def test_the_gap_is_that_to_the_mean_of_the_others_and_the_shares_add_up():
    z = np.array([[3.0, 0, 1], [1, 2, 6]])
    assert logit_gap(z, [0, 1]).tolist() == [2.5, -1.5]
    figure = logit_gap_histogram({"a": np.arange(50.0), "b": [7.0] * 5})
    filled = [patch for patch in figure.axes[0].patches if patch.get_fill()]
    assert [patch.get_data().values.sum() for patch in filled] == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="one label per row"):
        logit_gap(z, [0, 1, 2])
    with pytest.raises(ValueError, match="finite logit gaps"):
        logit_gap_histogram({"a": [np.inf]})


def test_the_optimum_of_a_row_comes_from_the_report():
    report = make_report()
    k = len(report.label_names)
    expected = Smoothing(0.1, report.smoothing.convention).optimal_logit_gap(k)
    assert optimal_gap(report, "smoothed") == pytest.approx(expected, rel=1e-3)
    assert optimal_gap(report, "baseline") is None
    other = replace(report, smoothing=replace(report.smoothing, epsilon=0.2, optimal_logit_gap=1.0))
    assert optimal_gap(other, "smoothed") == pytest.approx(expected)
    assert optimal_gap(replace(other, smoothing=replace(other.smoothing, prior="unigram")), "smoothed") is None


def test_calibration_over_steps_draws_the_evaluations_of_every_run():
    report = replace(make_report(), history=history(["baseline", "smoothed"]))
    figure = calibration_over_steps(report)
    for ax, key in zip(figure.axes, ("eval_nll", "eval_ece", "eval_signed_gap"), strict=True):
        drawn = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
        assert len(drawn) == 2
        for line in drawn:
            records = [r for r in report.history["baseline"] if key in r]
            assert line.get_xdata().tolist() == [r["step"] for r in records]
            assert line.get_ydata().tolist() == [r[key] for r in records]
    with pytest.raises(ValueError, match="evaluate during training"):
        calibration_over_steps(replace(report, history={"baseline": [{"step": 1, "loss": 1.0}]}))


def llama_classifier():
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**tiny_llama(num_labels=CLASSES).config.to_dict()))


@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert, llama_classifier])
def test_penultimate_features_give_the_models_own_logits(make, tmp_path):
    model, rows = make().train(), classification_rows(7).rows
    found = penultimate(model, [collate(rows[:4]), collate(rows[4:])])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in collate(rows).items() if k != "labels"}).logits
    np.testing.assert_allclose(found.features @ found.weight.T + found.bias, logits, atol=1e-5)
    assert found.labels.tolist() == [int(row["labels"]) for row in rows]
    again = Penultimate.load(found.save(tmp_path / "penultimate.npz"))
    np.testing.assert_allclose(again.features, found.features, rtol=1e-6)
    assert again.labels.dtype == np.int64


def test_what_has_no_features_is_refused():
    batch = collate(classification_rows(3).rows)
    with pytest.raises(ValueError, match="'labels'"):
        penultimate(tiny_bert(), [{k: v for k, v in batch.items() if k != "labels"}])
    with pytest.raises(ValueError, match="at least one batch"):
        penultimate(tiny_bert(), [])
    with pytest.raises(ValueError, match="features"):
        Penultimate(np.ones((3, 4)), [0, 1], np.ones((2, 4)), np.ones(2))


def test_pictures_are_written_for_what_there_is(tmp_path):
    report = make_report()
    assert write_pictures(replace(report, history={}), tmp_path) == []
    k = len(report.label_names)
    logits = np.random.default_rng(0).normal(size=(50, k))
    runs = {name: example(classes=k, seed=i) for i, name in enumerate(("baseline", "smoothed"))}
    found = write_pictures(
        replace(report, history=history(["baseline", "smoothed"])),
        tmp_path,
        predictions={name: (logits, logits.argmax(1)) for name in runs},
        features=runs,
    )
    assert [path.name for path in found] == ["logit_gap.png", "penultimate.png"]
    assert all(imread(path).shape[1] > 600 for path in found)
