"""From predictions alone to a report and its card: any library, exact zeros, names of classes, validation kept apart."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from reports import toy_logits
from scipy.special import softmax
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import hf_ls
from hf_ls.calibration.temperature import fit_temperature
from hf_ls.report.calibration_report import EVALUATED, REPORT, CalibrationReport
from hf_ls.report.card import model_card
from hf_ls.report.sentences import infinite

NAMES = np.array(["cat", "dog", "fish"])
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def split() -> dict[str, Any]:
    """Three noisy classes; scikit-learn sorts the names of classes."""
    x = RNG.normal(size=(900, 4))
    y = np.clip(np.rint(x[:, 0] + 1 + 0.6 * RNG.normal(size=900)), 0, 2).astype(int)
    parts = {"train": slice(0, 300), "validation": slice(300, 600), "test": slice(600, 900)}
    return {name: (x[part], NAMES[y[part]]) for name, part in parts.items()}


def report_of(model: Any, split: dict[str, Any], **more: Any) -> CalibrationReport:
    model.fit(*split["train"])
    x, y = split["test"]
    return hf_ls.calibration_report(probabilities=model.predict_proba(x), labels=y, label_names=model.classes_, **more)


def validation(model: Any, split: dict[str, Any]) -> tuple[Any, Any]:
    x, y = split["validation"]
    return model.fit(*split["train"]).predict_proba(x), y


def test_the_numbers_are_those_of_scikit_learn(split: dict[str, Any]) -> None:
    model = LogisticRegression(C=100)
    report = report_of(model, split, validation=validation(model, split))
    x, y = split["test"]
    plain, tempered = report.rows
    assert (plain.name, tempered.name) == (EVALUATED, f"{EVALUATED} + temperature")
    assert plain.value("accuracy") == pytest.approx(model.score(x, y))
    assert plain.value("nll") == pytest.approx(log_loss(y, model.predict_proba(x)), rel=1e-12)
    held_out, labels = validation(model, split)
    assert tempered.temperature == pytest.approx(fit_temperature(np.log(held_out), np.searchsorted(NAMES, labels)))
    assert report.label_names == list(NAMES) and report.dataset.class_counts == [int((y == name).sum()) for name in NAMES]
    assert report.posthoc["temperature"]["nll"] == pytest.approx(tempered.value("nll"))
    assert {(d.row, d.against) for d in report.differences} == {(tempered.name, plain.name)}


def test_logits_and_their_probabilities_give_one_report() -> None:
    logits, labels = toy_logits(300)
    first = hf_ls.calibration_report(logits=logits[:200], labels=labels[:200], validation=(logits[200:], labels[200:]))
    p = softmax(logits, axis=1)
    second = hf_ls.calibration_report(probabilities=p[:200], labels=labels[:200], validation=(p[200:], labels[200:]))
    for ours, theirs in zip(first.rows, second.rows, strict=True):
        for metric in ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc"):
            assert ours.value(metric) == pytest.approx(theirs.value(metric), rel=1e-6), metric
    assert (first.predictions, second.predictions) == ("logits", "probabilities")


def test_a_card_speaks_of_no_epsilon_which_nobody_knows(split: dict[str, Any]) -> None:
    model = RandomForestClassifier(30, random_state=0)
    text = model_card(report_of(model, split, validation=validation(model, split), library="sklearn"))
    assert "| epsilon |" not in text and "moothing" not in text
    assert "No vector scaling: a probability which is exactly 0." in text
    assert "| epsilon |" in model_card(report_of(model, split, epsilon=0.1))
    assert "∞: a label has probability 0." in text


def test_names_as_labels_need_the_classes_in_order(split: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected label_names .* got none.*classes_"):
        hf_ls.calibration_report(probabilities=np.full((3, 2), 0.5), labels=["a", "b", "a"])


@pytest.mark.parametrize("precision", [np.float64, np.float32])
def test_probabilities_of_zero_are_counted_and_never_hidden(precision: Any, tmp_path: Path) -> None:
    p = np.full((40, 3), 1 / 3)
    p[:3] = [0.0, 0.25, 0.75]
    p, labels = p.astype(precision), np.array([0, 0, 2, *[1] * 37])
    report = hf_ls.calibration_report(probabilities=p, labels=labels, output_dir=tmp_path)
    row = report.rows[0]
    assert row.metrics["nll"]["impossible"] == 2 and row.show("nll") == "∞" and row.interval("nll") is None
    assert row.metrics["nll"]["clipped"] == pytest.approx(log_loss(labels, p, labels=[0, 1, 2]), rel=1e-6)
    assert row.value("brier") == pytest.approx(float(((p - np.eye(3)[labels]) ** 2).sum(1).mean()), rel=1e-6)
    text = (tmp_path / "README.md").read_text()
    assert "is infinite: 2 of 40 examples" in text and "NLL ∞ nats" in text and "inf " not in text and "nan" not in text
    assert json.loads((tmp_path / REPORT).read_text())["rows"][0]["metrics"]["nll"]["value"] is None
    assert CalibrationReport.load(tmp_path / REPORT) == report
    assert not infinite(hf_ls.calibration_report(probabilities=p[2:], labels=labels[2:] * 0 + 1))


def test_a_forest_with_zeros_on_validation_gets_no_temperature_and_the_reason(split: dict[str, Any], tmp_path: Path) -> None:
    model = RandomForestClassifier(5, random_state=0)
    held_out = validation(model, split)
    report = report_of(model, split, validation=held_out, output_dir=tmp_path)
    labels = np.searchsorted(NAMES, held_out[1])
    zeros = int((held_out[0][np.arange(300), labels] == 0).sum())
    assert zeros and [row.name for row in report.rows] == [EVALUATED]
    text = (tmp_path / "README.md").read_text()
    assert f"No temperature: −inf (probability 0) in {zeros} of 300 rows, whose NLL is infinite at every temperature." in text
    assert "| isotonic |" in text and "power=None" not in text and "Without validation" not in text


def test_the_card_says_nothing_which_nobody_knows(split: dict[str, Any], tmp_path: Path) -> None:
    model = LogisticRegression()
    report_of(model, split, validation=validation(model, split), output_dir=tmp_path, model_name="pets", library="sklearn")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sklearn" and card.data.pipeline_tag is None and card.data.eval_results is None
    for untrue in (
        "transformers",
        "AutoModel",
        "torch",
        "tokenizer",
        "Weights",
        "weights beside",
        "smoothing",
        "base model",
        "seed 0",
    ):
        assert untrue not in card.content, untrue
    assert "described here by its predictions alone" in card.text
    unnamed = model_card(report_of(model, split))
    assert "library_name" not in unnamed and "Without validation data no temperature" in unnamed
    for plot in re.findall(r"\]\((plots/\S+)\)", card.text):
        assert (tmp_path / plot).is_file()


def test_the_code_of_the_card_gives_the_row_with_temperature(split: dict[str, Any]) -> None:
    model = LogisticRegression(C=100)
    report = report_of(model, split, validation=validation(model, split))
    code = re.search(r"```python\n(.*?)```", model_card(report), re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    x, y = split["test"]
    assert log_loss(y, space["calibrated"](model.predict_proba(x))) == pytest.approx(report.rows[1].value("nll"), rel=1e-5)
    zero = space["calibrated"]([[0.0, 0.5, 0.5]])
    np.testing.assert_allclose(zero, [[0, 0.5, 0.5]])


def test_a_named_task_and_data_give_results_for_the_hub(split: dict[str, Any]) -> None:
    report = report_of(
        LogisticRegression(), split, task="tabular-classification", dataset_name="Pets of 2026", license="mit", language="en"
    )
    card = ModelCard(model_card(report))
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert {(r.dataset_type, r.dataset_name, r.task_type) for r in card.data.eval_results} == {
        ("local", "Pets of 2026", "tabular-classification")
    }
    assert {"nll", "brier_score", "expected_calibration_error"} < {r.metric_type for r in card.data.eval_results}


def test_labels_are_read_as_their_user_means_them(split: dict[str, Any]) -> None:
    p, ids = softmax(toy_logits(60)[0], axis=1), toy_logits(60)[1]
    wanted = hf_ls.calibration_report(probabilities=p, labels=ids).rows
    for labels, names in (
        (ids, ["a", "b", "c"]),
        (np.array(["a", "b", "c"])[ids], ["a", "b", "c"]),
        (ids + 1, np.array([1, 2, 3])),  # classes_ which are numbers: 1 is the first class
        (ids.astype(float) + 1, [1.0, 2.0, 3.0]),
        ([" A"] * 0 + [str(name).upper() for name in np.array(["a", "b", "c"])[ids]], ["a", "b", "c"]),
    ):
        assert hf_ls.calibration_report(probabilities=p, labels=labels, label_names=names).rows == wanted


def test_columns_in_another_order_are_noticed() -> None:
    logits, labels = toy_logits(200)
    with pytest.warns(UserWarning, match="labels look permuted"):
        hf_ls.calibration_report(logits=logits[:, [1, 2, 0]], labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_ls.calibration_report(logits=logits, labels=labels)


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    p, labels = softmax(toy_logits(60)[0], axis=1), toy_logits(60)[1]
    for arguments, message in (
        ({"labels": labels}, "logits or probabilities, got neither"),
        ({"labels": labels, "probabilities": p, "logits": p}, "got both"),
        ({"labels": labels, "logits": p}, "got 60 rows of probabilities"),
        ({"labels": labels, "probabilities": np.log(p)}, "look like logits"),
        ({"labels": labels, "probabilities": p[:, 0]}, "shape"),
        ({"labels": labels[1:], "probabilities": p}, "one label per prediction"),
        ({"labels": labels, "probabilities": p, "label_names": ["a", "b"]}, "expected 3 label_names"),
        ({"labels": labels, "probabilities": p, "validation": (p, labels)}, "of other examples, got the reported ones"),
        (
            {"labels": labels, "probabilities": p, "validation": (p[:9, :2] / p[:9, :2].sum(1)[:, None], labels[:9] % 2)},
            "3 classes",
        ),
        ({"labels": ["x"] * 60, "probabilities": p, "label_names": list("abc")}, "label_map"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_ls.calibration_report(**arguments)
    with pytest.raises(TypeError, match="a pair"):
        hf_ls.calibration_report(labels=labels, probabilities=p, validation=p)
    (tmp_path / "README.md").write_text("# By hand\n")
    with pytest.raises(ValueError, match="written by hand"):
        hf_ls.calibration_report(labels=labels, probabilities=p, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
