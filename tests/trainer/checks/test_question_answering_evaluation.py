"""Question answering: evaluation, predictions, temperature and the card of start and end positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import Rows, collate
from test_question_answering import ENDS, STARTS, make, ours, rows

from hf_ls.metrics import PredictionStatistics, ece


def expected_items(model, data):
    """The items of the metrics by NumPy alone: log-probabilities [n, T] and labels [n] of all starts and ends in the text."""
    batch = collate(data.rows)
    with torch.no_grad():
        outputs = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = np.concatenate([outputs.start_logits.numpy(), outputs.end_logits.numpy()])
    labels = np.concatenate([batch["start_positions"].numpy(), batch["end_positions"].numpy()])
    kept = (labels >= 0) & (labels < logits.shape[1])
    return logits[kept], labels[kept]


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", ["bert", "bart"])
def test_trap_08_evaluation_reports_the_plain_metrics_whatever_the_batch_size(tmp_path, name, size):
    model, data = make(name), rows(width=12)
    trainer = ours(tmp_path, model, data, label_smoothing_factor=0.3, per_device_eval_batch_size=size)
    found = trainer.evaluate()
    logits, labels = expected_items(model, data)
    items = PredictionStatistics.from_logits(logits, labels)
    expected = dict(
        nll=items.nll.mean(), brier=items.brier.mean(), accuracy=items.correct.mean(), ece=ece(items.confidence, items.correct),
        signed_gap=items.confidence.mean() - items.correct.mean(),
    )  # fmt: skip
    for metric, value in expected.items():
        assert found[f"eval_{metric}"] == pytest.approx(value, abs=1e-9), metric
    assert found["eval_loss"] == found["eval_nll"]
    assert len(labels) == 11
    assert not {"eval_perplexity", "eval_eos_nll"} & set(found)  # its classes are no tokens of a vocabulary
    assert trainer.token_calibration is None


def test_evaluation_is_the_models_own_loss_where_each_answer_has_both_ends(tmp_path):
    data = Rows([row for row in rows(width=12).rows if int(row["end_positions"]) != 40 and int(row["start_positions"]) >= 0])
    model = make()
    own = model.eval()(**collate(data.rows)).loss.item()
    assert ours(tmp_path, model, data).evaluate()["eval_nll"] == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_predictions_are_those_of_a_stock_trainer(tmp_path, name):
    """Two arrays [n, T] for the usual post-processing; widths which differ between batches are filled with -100."""
    data, model = rows(), make(name)
    kwargs = dict(per_device_eval_batch_size=3)
    expected = ours(tmp_path, model, data, tf.Trainer, **kwargs).predict(data)
    found = ours(tmp_path, model, data, label_smoothing_factor=0.2, **kwargs).predict(data)
    assert type(found.predictions) is type(expected.predictions) is tuple
    assert len(found.predictions) == len(expected.predictions)
    assert found.predictions[0].shape == (8, 12)
    for mine, theirs in zip(found.predictions, expected.predictions, strict=True):
        assert np.array_equal(mine, theirs)
    for mine, theirs, given in zip(found.label_ids, expected.label_ids, (STARTS, ENDS), strict=True):
        assert mine.tolist() == theirs.tolist() == list(given)
    assert found.metrics["test_nll"] == found.metrics["test_loss"]


def test_compute_metrics_gets_what_the_stock_trainer_gives(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        start, end = prediction.predictions
        return {
            "exact": float(((start.argmax(1) == prediction.label_ids[0]) & (end.argmax(1) == prediction.label_ids[1])).mean())
        }

    data = rows(width=12)
    found = ours(tmp_path, make(), data, trainer_args={"compute_metrics": compute_metrics}).evaluate()
    assert 0 <= found["eval_exact"] <= found["eval_accuracy"] + 1
    assert seen[0].predictions[0].shape == seen[0].predictions[1].shape == (8, 12)


def test_features_without_positions_are_predicted_as_by_a_stock_trainer(tmp_path):
    """The test set of a competition."""
    data = Rows([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows(width=12).rows])
    found = ours(tmp_path, make(), data).predict(data)
    assert len(found.predictions) == 2 and found.label_ids is None
    assert "test_nll" not in found.metrics


def test_the_temperature_of_positions_is_the_minimum_of_their_nll(tmp_path):
    data, model = rows(width=12), make()
    trainer = ours(tmp_path, model, data)
    trainer.temperature = trainer.fit_temperature(data)
    logits, labels = expected_items(model, data)

    def nll(t):
        return PredictionStatistics.from_logits(logits / t, labels).nll.mean()

    fitted = trainer.evaluate()["eval_nll"]
    assert fitted == pytest.approx(nll(trainer.temperature), rel=1e-9)
    assert fitted <= min(nll(trainer.temperature * factor) for factor in (0.9, 1.1)) and not math.isclose(trainer.temperature, 1)


def test_the_card_speaks_of_positions(tmp_path):
    trainer = ours(tmp_path, make(), label_smoothing_factor=0.1, per_device_train_batch_size=8)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: question-answering" in text
    assert "the mass goes to all tokens of the text" in text and "none for padding" in text
    assert "each counted for itself, not of whole answers" in text
    assert "confidence ceiling" not in text and "logit gap" not in text  # they depend on the length
