"""Label smoothing in other people's code: their subclass, a stock Trainer, SFTTrainer with LoRA, a hyperparameter search."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import arguments, classification_rows, collate, tiny_bert, tiny_llama, token_rows, weights
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingMixin, LabelSmoothingTrainer, SmoothedCrossEntropy
from hf_ls.metrics.core import PredictionStatistics, ece

# A user's trainer --------------------------------------------------------------------------------------------------------


class Theirs(tf.Trainer):
    """What users do: another term of the loss, a metric of their own from the logits, one more log entry."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.margins = getattr(self, "margins", [])
        top = outputs.logits.detach().topk(2, -1).values
        self.margins.append(float((top[:, 0] - top[:, 1]).mean()))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["margin"] = self.margins[-1]
        super().log(logs, *args, **kwargs)


class Logging(tf.Trainer):
    """One more log entry, and no loss of its own."""

    def log(self, logs, *args, **kwargs):
        super().log(logs | {"margin": 3.0} if "loss" in logs else logs, *args, **kwargs)


class Before(LabelSmoothingMixin, Logging):
    """The mixin first: their `log` is called; a `compute_loss` of theirs would not be (`test_other_trainers` has the refusal)."""


class After(Theirs, LabelSmoothingMixin, tf.Trainer):
    """Their class first: it builds upon ours."""


def logits_and_labels(model, rows):
    batch = collate(rows.rows)
    with torch.no_grad():
        return model(**batch).logits, batch["labels"]


def test_a_users_compute_loss_builds_upon_the_smoothed_one(tmp_path):
    rows = classification_rows()
    logits, labels = logits_and_labels(tiny_bert(), rows)
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.1, learning_rate=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer = After(
            model=tiny_bert(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate,
            compute_metrics=lambda p: {"classes": p.predictions.shape[-1]},
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        record = trainer.state.log_history[0]
        assert record["loss"] == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5)
        assert record["loss"] == pytest.approx(record["nll"] + record["smoothing_term"], rel=1e-6)
        assert len(trainer.margins) == steps and record["margin"] == trainer.margins[-1]
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert metrics["eval_classes"] == 5


def test_the_mixin_before_a_users_trainer_keeps_the_rest_of_it(tmp_path):
    rows = classification_rows()
    args = arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.1, per_device_train_batch_size=8)
    trainer = Before(model=tiny_bert(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    logits, labels = logits_and_labels(tiny_bert(), rows)
    record = trainer.state.log_history[0]
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5)
    assert record["margin"] == 3.0


def test_metrics_by_hand_from_predict_are_those_of_evaluate(tmp_path):
    rows = classification_rows(23)
    args = arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.1, per_device_eval_batch_size=4)
    trainer = LabelSmoothingTrainer(model=tiny_bert().double(), args=args, eval_dataset=rows, data_collator=collate)
    output = trainer.predict(rows)
    stats = PredictionStatistics.from_logits(output.predictions, output.label_ids)
    assert output.metrics["test_nll"] == pytest.approx(stats.nll.mean(), abs=1e-9)
    assert output.metrics["test_ece"] == pytest.approx(ece(stats.confidence, stats.correct), abs=1e-9)


# A stock trainer ---------------------------------------------------------------------------------------------------------


def stock_steps(folder, size, steps):
    args = arguments(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=2,
        num_train_epochs=2,
        learning_rate=0.1,
    )
    trainer = tf.Trainer(
        model=tiny_llama(sharpness=30), args=args, train_dataset=token_rows(), data_collator=collate,
        compute_loss_func=SmoothedCrossEntropy(0.1, shift=True),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r], weights(trainer.model)


def test_a_stock_trainer_with_our_loss_is_that_of_the_whole_batch(tmp_path):
    """Rows of 3 to 40 tokens, so that a mean over micro-batches would show."""
    (whole, expected), (parts, found) = stock_steps(tmp_path, 8, 1), stock_steps(tmp_path, 2, 4)
    batch = collate(token_rows().rows)
    logits = tiny_llama(sharpness=30)(**batch).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert whole[0] == pytest.approx(loss.item(), rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Supervised fine-tuning with adapters ------------------------------------------------------------------------------------


def test_sft_with_lora_trains_the_adapter_alone_without_logits(tmp_path):
    """The columns of a dataset which is tokenised already: no tokenizer, nothing from TRL's templates."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from sft_rows import tokenizer

    from hf_ls import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer

    rows = [{"input_ids": row["input_ids"].tolist()} for row in token_rows().rows]
    args = arguments(
        tmp_path, LabelSmoothingSFTConfig, label_smoothing_factor=0.1, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, max_steps=4, num_train_epochs=2, learning_rate=0.05, remove_unused_columns=True,
    )  # fmt: skip
    trainer = LabelSmoothingSFTTrainer(
        model=tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(), peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert trainer._head is not None  # `all-linear` of peft leaves the head alone
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert records[-1]["nll"] < records[0]["nll"] and records[0]["entropy"] > 0
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_nll"]
    assert 0 <= metrics["eval_ece"] <= 1 and metrics["eval_perplexity"] > 1


# Hyperparameter search ---------------------------------------------------------------------------------------------------


def searched(folder, trainer_class, args_class, epsilons, **kwargs):
    """The trainer after a search over epsilon, the best trial, and each trial's epsilon, first loss and objective."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = classification_rows()
    trainer = trainer_class(
        model_init=lambda: tiny_bert(), train_dataset=rows, eval_dataset=rows, data_collator=collate,
        args=arguments(folder, args_class, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    seen = []

    class Keep(tf.TrainerCallback):
        def on_train_end(self, args, state, control, **_):
            seen.append((args.label_smoothing_factor, next(r["loss"] for r in state.log_history if "loss" in r)))

    trainer.add_callback(Keep())
    best = trainer.hyperparameter_search(
        lambda trial: {"label_smoothing_factor": trial.suggest_categorical("label_smoothing_factor", epsilons)},
        backend="optuna", n_trials=len(epsilons), sampler=optuna.samplers.GridSampler({"label_smoothing_factor": epsilons}), **kwargs,
    )  # fmt: skip
    return trainer, best, seen


def test_optuna_searches_over_the_epsilon_which_is_trained_and_judges_by_the_unsmoothed_loss(tmp_path):
    trainer, best, seen = searched(tmp_path, LabelSmoothingTrainer, LabelSmoothingArguments, [0.0, 0.1, 0.3])
    logits, labels = logits_and_labels(tiny_bert(), classification_rows())
    assert sorted(epsilon for epsilon, _ in seen) == [0.0, 0.1, 0.3]
    for epsilon, loss in seen:
        assert loss == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=epsilon).item(), rel=1e-5)
    # The weights stay as they are (learning rate 0): every trial has one and the same unsmoothed loss.
    assert best.objective == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert trainer.args.label_smoothing_factor in (0.0, 0.1, 0.3)


def test_the_best_trial_of_a_search_can_be_trained(tmp_path):
    trainer, best, _ = searched(tmp_path, LabelSmoothingTrainer, LabelSmoothingArguments, [0.2, 0.4])
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    logits, labels = logits_and_labels(tiny_bert(), classification_rows())
    epsilon = best.hyperparameters["label_smoothing_factor"]
    record = [r for r in trainer.state.log_history if "loss" in r][-1]
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=epsilon).item(), rel=1e-5)


@pytest.mark.stock
def test_stock_search_trains_every_trial_with_the_first_epsilon(tmp_path):
    _, _, seen = searched(tmp_path, tf.Trainer, tf.TrainingArguments, [0.1, 0.3], compute_objective=lambda m: m["eval_loss"])
    if seen[0][1] != seen[1][1]:
        pytest.skip("this version of transformers makes its smoother anew for each trial")
    assert {epsilon for epsilon, _ in seen} == {0.1, 0.3}


def test_a_search_for_more_needs_an_objective_of_which_more_is_better(tmp_path):
    with pytest.raises(ValueError, match="compute_objective with direction='maximize'"):
        searched(tmp_path, LabelSmoothingTrainer, LabelSmoothingArguments, [0.1], direction="maximize")
