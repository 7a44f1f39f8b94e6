"""What the Trainer reports in one process, and what a best checkpoint is: unsmoothed, over all items, nothing invented."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    Rows,
    arguments,
    classification_rows,
    collate,
    ours,
    tiny_bert,
    tiny_llama,
    token_rows,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.calibration.token_temperature import CrossFittedTemperature, temperature_curves
from hf_ls.metrics.core import ece, full_ece


@pytest.mark.parametrize("batch_size", [1, 3, 7, 23])
def test_trap_04_evaluation_is_unsmoothed_and_does_not_depend_on_the_batch_size(tmp_path, batch_size):
    rows = classification_rows(23)
    model = tiny_bert().double().eval()
    metrics = ours(tmp_path, model, rows, per_device_eval_batch_size=batch_size, label_smoothing_factor=0.1).evaluate()
    batch = collate(rows.rows)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    y, p = batch["labels"], logits.softmax(-1)
    confidence, prediction = p.max(-1)
    assert metrics["eval_nll"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-9)
    assert metrics["eval_loss"] == metrics["eval_nll"]
    assert metrics["eval_brier"] == pytest.approx(((p - F.one_hot(y, 5)) ** 2).sum(-1).mean().item(), abs=1e-9)
    assert metrics["eval_accuracy"] == pytest.approx((prediction == y).double().mean().item())
    assert metrics["eval_ece"] == pytest.approx(ece(confidence.numpy(), (prediction == y).numpy()), abs=1e-9)
    assert metrics["eval_signed_gap"] == pytest.approx((confidence - (prediction == y).double()).mean().item(), abs=1e-9)


@pytest.mark.stock
def test_trap_04_stock_eval_loss_is_smoothed_and_a_mean_of_means(tmp_path):
    model, rows = tiny_llama(sharpness=30).eval(), token_rows(seed=3)
    batch = collate(rows.rows)
    nll = model(**batch).loss.item()
    stock, mine = {}, {}
    for size in (1, 8):
        kwargs = dict(per_device_eval_batch_size=size, label_smoothing_factor=0.1)
        trainer = tf.Trainer(model=model, args=arguments(tmp_path, **kwargs), eval_dataset=rows, data_collator=collate)
        stock[size] = trainer.evaluate()["eval_loss"]
        mine[size] = ours(tmp_path, model, rows, **kwargs).evaluate()["eval_loss"]
    assert mine[1] == pytest.approx(nll, rel=1e-5)
    assert mine[8] == pytest.approx(mine[1], rel=1e-6)
    if stock[1] == pytest.approx(nll, rel=1e-3) and stock[8] == pytest.approx(nll, rel=1e-3):
        pytest.skip("this version of transformers reports the unsmoothed, token-weighted eval_loss")
    assert abs(stock[1] - stock[8]) > 1e-3 or abs(stock[8] - nll) > 1e-3


def test_evaluation_leaves_the_training_loss_smoothed(tmp_path):
    trainer = ours(tmp_path, tiny_bert(), classification_rows(), label_smoothing_factor=0.3)
    batch, model = collate(classification_rows().rows), trainer.model
    logits = model.train()(**batch).logits
    assert trainer.compute_loss(model, batch).item() == pytest.approx(
        F.cross_entropy(logits, batch["labels"], label_smoothing=0.3).item()
    )
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(F.cross_entropy(logits, batch["labels"]).item())
    assert "labels" in batch


class _Wrapper(torch.nn.Module):
    """An engine as DeepSpeed's: `training` is what it likes, and eval() goes no further than it likes."""

    def __init__(self, module, training, passes_on):
        super().__init__()
        self.module, self.training, self.passes_on = module, training, passes_on

    def train(self, mode=True):
        if self.passes_on or mode:
            self.module.train(mode)
        return self

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize(("training", "passes_on"), [(True, True), (True, False), (False, True)])
def test_the_mode_of_a_wrapper_decides_nothing(tmp_path, training, passes_on):
    """Evaluation is unsmoothed and without dropout, training smoothed, whatever the `training` of a wrapper says."""
    rows, dropout = classification_rows(8), dict(hidden_dropout_prob=0.5)
    fixed = dict(per_device_eval_batch_size=8, per_device_train_batch_size=8, label_smoothing_factor=0.1)
    wanted = ours(tmp_path, tiny_bert(**dropout), rows, **fixed).evaluate()
    trainer = ours(tmp_path, tiny_bert(**dropout), rows, **fixed)
    wrapper = _Wrapper(trainer.model, training, passes_on)
    trainer._wrap_model = lambda model, **kwargs: wrapper
    trainer.model_wrapped = wrapper
    found = trainer.evaluate()
    measured = {name for name in wanted if not name.endswith(("runtime", "second", "time"))}
    assert {name: found[name] for name in measured} == {name: wanted[name] for name in measured}
    batch = collate(rows.rows)
    loss, _, _ = trainer.prediction_step(wrapper, batch, prediction_loss_only=True)  # outside an evaluation too
    assert loss.item() == pytest.approx(wanted["eval_loss"], abs=1e-6)
    wrapper.train()
    logs = {"loss": trainer.training_step(wrapper, batch).item()}
    trainer._terms.add_to(logs, 1, trainer.accelerator.gather)
    assert abs(logs["smoothing_term"]) > 1e-4
    assert logs["loss"] == pytest.approx(logs["nll"] + logs["smoothing_term"], rel=1e-5)


def test_own_compute_metrics_are_kept_beside_ours(tmp_path):
    trainer = ours(tmp_path, tiny_bert(), classification_rows(11), per_device_eval_batch_size=4)
    trainer.compute_metrics = lambda p: {"n": p.predictions.shape[0], "accuracy": 2.0}
    metrics = trainer.evaluate()
    assert (metrics["eval_n"], metrics["eval_accuracy"]) == (11, 2.0)
    assert 0 <= metrics["eval_ece"] <= 1


def test_named_evaluation_sets_get_their_own_metrics(tmp_path):
    trainer = ours(tmp_path, tiny_bert(), classification_rows())
    metrics = trainer.evaluate({"a": classification_rows(5), "b": classification_rows(6, seed=1)})
    assert metrics["eval_a_nll"] != metrics["eval_b_nll"]
    assert metrics["eval_a_loss"] == metrics["eval_a_nll"]


def test_predict_returns_logits_and_prefixed_metrics(tmp_path):
    output = ours(tmp_path, tiny_bert(), classification_rows(9), per_device_eval_batch_size=4).predict(classification_rows(9))
    assert output.predictions.shape == (9, 5)
    assert output.metrics["test_loss"] == output.metrics["test_nll"]


def test_unlabelled_prediction_has_no_invented_metrics(tmp_path):
    rows = Rows([{k: v for k, v in row.items() if k != "labels"} for row in classification_rows(5).rows])
    output = ours(tmp_path, tiny_bert(), classification_rows()).predict(rows)
    assert output.predictions.shape == (5, 5)
    assert not any("nll" in name or "loss" in name for name in output.metrics)


@pytest.mark.parametrize("name", ["ece", "eval_nll", "brier", "loss", "eval_test_ece", "eval_loss"])
def test_trap_10_lower_is_better_for_losses_and_calibration_errors(tmp_path, name):
    assert LabelSmoothingArguments(str(tmp_path), metric_for_best_model=name).greater_is_better is False
    with pytest.raises(ValueError, match="greater_is_better=False"):
        LabelSmoothingArguments(str(tmp_path), metric_for_best_model=name, greater_is_better=True)


def test_trap_10_greater_is_better_for_accuracy(tmp_path):
    assert LabelSmoothingArguments(str(tmp_path), metric_for_best_model="accuracy").greater_is_better is True


def test_trap_10_plain_arguments_which_guessed_wrong_are_refused(tmp_path):
    stock = arguments(tmp_path, metric_for_best_model="ece")
    if stock.greater_is_better is False:
        pytest.skip("this version of transformers knows that ece is lower-is-better")
    with pytest.raises(ValueError, match="LabelSmoothingArguments"):
        LabelSmoothingTrainer(model=tiny_bert(), args=stock)


def test_trap_10_the_best_checkpoint_is_the_one_with_the_lowest_nll(tmp_path):
    args = LabelSmoothingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        learning_rate=5e-2, load_best_model_at_end=True, metric_for_best_model="nll", disable_tqdm=True, label_smoothing_factor=0.1,
    )  # fmt: skip
    trainer = LabelSmoothingTrainer(
        model=tiny_bert(),
        args=args,
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(16, seed=5),
        data_collator=collate,
    )
    trainer.train()
    history = {r["step"]: r["eval_nll"] for r in trainer.state.log_history if "eval_nll" in r}
    assert trainer.state.best_global_step == min(history, key=history.get)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(min(history.values()), rel=1e-6)


@pytest.mark.parametrize("logits_free", ["auto", "off"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_full_ece_and_calibrated_nll_of_tokens(tmp_path, logits_free, batch_size):
    """By whole sequences: their tokens are never on both sides of a fit."""
    model, rows = tiny_llama(sharpness=30).double().eval(), token_rows(seed=3)
    settings = dict(
        per_device_eval_batch_size=batch_size, label_smoothing_logits_free=logits_free, metric_for_best_model="calibrated_nll"
    )
    found = ours(tmp_path, model, rows, **settings).evaluate()
    batch = collate(rows.rows)
    with torch.no_grad():
        z = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    y = batch["labels"][:, 1:]
    kept = y != -100
    assert found["eval_full_ece"] == pytest.approx(full_ece(z[kept].softmax(-1).numpy(), y[kept].numpy()), abs=1e-9)
    crossed = CrossFittedTemperature()
    crossed.update(temperature_curves(z, y).sum(1).numpy())
    assert found["eval_calibrated_nll"] == pytest.approx(crossed.nll(), abs=1e-9)
    assert "eval_calibrated_nll" not in ours(tmp_path, model, rows).evaluate()


@pytest.mark.parametrize("batch_size", [3, 23])
def test_calibrated_nll_chooses_the_best_checkpoint(tmp_path, batch_size):
    rows, model = classification_rows(23), tiny_bert()
    settings = dict(
        per_device_eval_batch_size=batch_size, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=2, max_steps=-1,
        load_best_model_at_end=True, metric_for_best_model="calibrated_nll", greater_is_better=False,
    )  # fmt: skip
    trainer = LabelSmoothingTrainer(
        model=model, args=arguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    trainer.train()
    logged = [record["eval_calibrated_nll"] for record in trainer.state.log_history if "eval_calibrated_nll" in record]
    assert len(logged) == 2 and trainer.state.best_metric == min(logged)
