"""Other people's Trainers and models around ours: a second loss, an own evaluation step, outputs which are no dict.

And what is said of nothing: a mean over no label is NaN, never 0.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import (
    CLASSES,
    VOCAB,
    Rows,
    arguments,
    classification_rows,
    collate,
    ours,
    seq2seq_rows,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    token_rows,
)
from torch import nn
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingMixin, LabelSmoothingSeq2SeqArguments, LabelSmoothingTrainer
from hf_ls.metrics.ceiling import ceiling_warning

METRICS = {"eval_nll", "eval_ece", "eval_brier", "eval_accuracy"}


class Weighted(tf.Trainer):
    """A loss of its own, as it is found in many repositories."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss * 2, outputs) if return_outputs else outputs.loss * 2


class Before(LabelSmoothingMixin, Weighted):
    pass


class Behind(Weighted, LabelSmoothingMixin, tf.Trainer):
    pass


class Below(LabelSmoothingTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        return model(**inputs).loss


class Adding(tf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs) + 1.0


class AddingInFront(Adding, LabelSmoothingMixin, tf.Trainer):
    pass


class AddingBehind(LabelSmoothingMixin, Adding):
    pass


def trainer_of(kind, folder, model, rows, args_class=LabelSmoothingArguments, compute_metrics=None, **kwargs):
    trainer = kind(
        model=model, args=arguments(folder, args_class, **kwargs), train_dataset=rows, eval_dataset=rows, data_collator=collate,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize(
    ("kind", "culprit", "what"),
    [
        (Before, "Weighted", "would never be called"),
        (AddingBehind, "Adding", "would never be called"),
        (Behind, "Weighted", "calls no super"),
        (Below, "Below", "calls no super"),
    ],
)
def test_a_second_loss_is_refused_at_construction_with_the_way_out(tmp_path, kind, culprit, what):
    with pytest.raises(ValueError, match=rf"compute_loss in {culprit} too, which {what}.*class_weight=.*super\(\).compute_loss"):
        trainer_of(kind, tmp_path, tiny_bert(), classification_rows())


def test_a_loss_which_adds_to_ours_is_welcome(tmp_path):
    batch, model = collate(classification_rows().rows), tiny_bert().train()
    added = trainer_of(AddingInFront, tmp_path, model, classification_rows()).compute_loss(model, batch).item()
    assert added == pytest.approx(ours(tmp_path, model).compute_loss(model, batch).item() + 1)


def all_ignored():
    return Rows([row | {"labels": torch.full_like(row["labels"], -100)} for row in token_rows((6,) * 8).rows])


def no_class():
    return Rows([row | {"labels": torch.tensor(-100)} for row in classification_rows().rows])


@pytest.mark.parametrize(("make", "rows"), [(tiny_llama, all_ignored), (tiny_bert, no_class)], ids=["tokens", "classes"])
def test_a_mean_over_no_label_is_nan_and_never_the_best(tmp_path, caplog, make, rows):
    kept = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = ours(tmp_path, make(), rows(), max_steps=2, label_smoothing_factor=0.1, metric_for_best_model="loss", **kept)
    with caplog.at_level(logging.WARNING):
        result = trainer.train()
    assert math.isnan(trainer.evaluate()["eval_loss"])
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trained and all(math.isnan(entry[name]) for entry in trained for name in ("loss", "nll"))
    assert math.isnan(result.metrics["train_loss"]) and math.isnan(trainer.state.log_history[-2]["train_nll"])
    assert trainer.state.best_metric is None or not math.isfinite(trainer.state.best_metric)
    assert "No label counted" in caplog.text


@pytest.mark.parametrize(
    ("ignored", "said"), [((0, 4), "1 of the 2 steps up to 2"), ((4, 8), "1 of the 2 steps up to 2"), ((2, 6), None)]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_a_label_among_others_is_told(tmp_path, caplog, ignored, said, accumulation):
    rows = token_rows((6,) * 8)
    for i in range(*ignored):
        rows.rows[i] = rows.rows[i] | {"labels": torch.full_like(rows.rows[i]["labels"], -100)}
    batch = dict(per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = ours(
        tmp_path, tiny_llama(), rows, max_steps=2, **batch | dict(logging_steps=2, train_sampling_strategy="sequential")
    )
    with caplog.at_level(logging.WARNING, logger="hf_ls"):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "No label counted" in record.getMessage()]
    assert told == ([f"No label counted in {said}: they are 0 in the mean loss and nll"] if said else [])


def test_data_without_labels_say_nothing_and_are_predicted(tmp_path, caplog):
    rows = Rows([{key: value for key, value in row.items() if key != "labels"} for row in classification_rows().rows])
    trainer = ours(tmp_path, tiny_bert(), rows)
    assert trainer.predict(rows).predictions.shape == (8, CLASSES)
    assert not {name for name in trainer.evaluate() if name.endswith(("loss", "nll"))}
    assert "No label counted" not in caplog.text


class Generating(tf.Seq2SeqTrainer):
    """An evaluation step of its own, whose loss is the model's."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        inputs = self._prepare_inputs(inputs)
        made = self.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
        with torch.no_grad():
            loss = model(**inputs).loss
        return loss, made, inputs.pop("labels")


class GeneratingBehind(LabelSmoothingMixin, Generating):
    pass


class GeneratingInFront(Generating, LabelSmoothingMixin, tf.Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_own_evaluation_step_leaves_our_metrics_whole(tmp_path, size):
    model, rows = tiny_t5(), seq2seq_rows()
    batch = collate(rows.rows)
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    seen = []

    def compute(prediction):
        seen.append(len(prediction.predictions))
        return {}

    trainer = trainer_of(
        GeneratingBehind, tmp_path, model, rows, LabelSmoothingSeq2SeqArguments, compute,
        per_device_eval_batch_size=size, predict_with_generate=True,
    )  # fmt: skip
    found = trainer.evaluate()
    assert set(found) >= METRICS and seen == [8]
    assert found["eval_loss"] == found["eval_nll"] == pytest.approx(expected, rel=1e-5)


class Writing(tf.T5ForConditionalGeneration):
    """Turns ignored labels into padding, in place."""

    def forward(self, *args, labels=None, **kwargs):
        found = super().forward(*args, labels=None if labels is None else labels.clone(), **kwargs)
        if labels is not None:
            labels[labels == -100] = 0
        return found


@pytest.mark.parametrize("kind", [GeneratingBehind, GeneratingInFront])
def test_an_own_evaluation_step_hands_no_tensor_of_the_user_to_the_model(tmp_path, kind):
    rows, batch = seq2seq_rows(), collate(seq2seq_rows().rows)
    before = {key: value.clone() for key, value in batch.items()}
    trainer = trainer_of(kind, tmp_path, Writing(tiny_t5().config), rows, LabelSmoothingSeq2SeqArguments)
    trainer.data_collator = lambda rows: batch
    found = trainer.predict(rows)
    assert (before["labels"] == -100).any() and (found.label_ids == before["labels"].numpy()).all()
    assert all(torch.equal(batch[key], before[key]) for key in before)


def test_an_evaluation_step_which_never_reaches_ours_is_named(tmp_path, caplog):
    trainer = trainer_of(GeneratingInFront, tmp_path, tiny_t5(), seq2seq_rows(), LabelSmoothingSeq2SeqArguments)
    with caplog.at_level(logging.WARNING, logger="hf_ls"):
        trainer.evaluate()
    assert "prediction_step of Generating does not call super" in caplog.text


@pytest.mark.parametrize("size", [3, 4, 10, 16])
def test_compute_metrics_gets_one_loss_a_row(tmp_path, size):
    seen = {}

    def compute(prediction):
        seen.update(losses=prediction.losses, rows=len(prediction.label_ids), inputs=len(prediction.inputs))
        return {}

    settings = dict(per_device_eval_batch_size=size, include_for_metrics=["inputs", "loss"])
    found = trainer_of(
        LabelSmoothingTrainer, tmp_path, tiny_bert(), classification_rows(10), compute_metrics=compute, **settings
    ).evaluate()
    assert (len(seen["losses"]), seen["rows"], seen["inputs"]) == (10, 10, 10)
    assert np.mean(seen["losses"]) == pytest.approx(found["eval_loss"], rel=1e-5)


class OutOfMemory(LabelSmoothingTrainer):
    """Whose first try fails after its first backward, as a GPU's does."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return loss


@pytest.mark.parametrize("objective", ["smoothed_ce", "online"])
def test_nothing_of_a_failed_try_stays(tmp_path, objective):
    epsilon = 0.1 if objective == "smoothed_ce" else 0.0
    settings = dict(label_smoothing_objective=objective, label_smoothing_factor=epsilon, learning_rate=0.0, max_steps=2)
    found = [
        trainer_of(OutOfMemory, tmp_path, tiny_bert(), classification_rows(), per_device_train_batch_size=size,
                   auto_find_batch_size=size == 8, **settings)
        for size in (8, 4)
    ]  # fmt: skip
    for trainer in found:
        trainer.train()
    first, second = (
        [{key: value for key, value in entry.items() if key in ("loss", "nll", "smoothing_term", "train_nll")} for entry in log]
        for log in (trainer.state.log_history for trainer in found)
    )
    assert first[0]["loss"] == pytest.approx(first[0]["nll"] + first[0]["smoothing_term"], rel=1e-5)
    assert first == second
    if objective == "online":
        assert torch.equal(found[0].criterion.online.count, found[1].criterion.online.count)


class Own(nn.Module):
    """Returns (loss, logits, embedding) with labels and (logits, embedding) without, or a bare tensor."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bare, self.embed, self.head = bare, nn.Embedding(VOCAB, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids, labels=None, attention_mask=None):
        embedding = self.embed(input_ids[:, :4]).mean(1)  # no row is shorter: padding does not count
        logits = 20 * self.head(embedding)
        if labels is not None:
            return nn.functional.cross_entropy(logits, labels), logits, embedding
        return logits if self.bare else (logits, embedding)


def tuple_bert():
    return tiny_bert(return_dict=False)


@pytest.mark.parametrize("make", [tuple_bert, lambda: Own(False), lambda: Own(True)], ids=["return_dict", "tuple", "tensor"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_outputs_which_are_no_dict_keep_their_logits(tmp_path, make, epsilon, size):
    model, rows, seen = make(), classification_rows(), {}
    batch = collate(rows.rows)
    with torch.no_grad():
        outputs = model.eval()(**{key: value for key, value in batch.items() if key != "labels"})
    logits = (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).numpy()

    def compute(prediction):
        found = prediction.predictions
        seen["logits"] = found[0] if isinstance(found, tuple) else found
        return {"own": float((seen["logits"].argmax(-1) == prediction.label_ids).mean())}

    settings = dict(label_smoothing_factor=epsilon, per_device_eval_batch_size=size, label_names=["labels"])
    trainer = trainer_of(LabelSmoothingTrainer, tmp_path, model, rows, compute_metrics=compute, **settings)
    found = trainer.evaluate()
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-4, atol=1e-5)
    assert found["eval_own"] == pytest.approx(found["eval_accuracy"])
    bare = Rows([{key: value for key, value in row.items() if key != "labels"} for row in rows.rows])
    predicted = trainer.predict(bare).predictions
    predicted = predicted[0] if isinstance(predicted, tuple) else predicted
    np.testing.assert_allclose(predicted, logits, rtol=1e-4, atol=1e-5)


class Broken(nn.Module):
    """Has NaN logits for one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.embed(input_ids).mean(1))
        logits = torch.where((input_ids == 77).any(1, keepdim=True), math.nan, logits)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def test_a_batch_with_nan_logits_ends_training_and_is_named(tmp_path):
    rows = [dict(input_ids=torch.tensor([5, 6, 7 + 70 * (i == 5)]), labels=torch.tensor(i % CLASSES)) for i in range(8)]
    settings = dict(per_device_train_batch_size=2, max_steps=4, label_names=["labels"], logging_nan_inf_filter=True)
    with pytest.raises(ValueError, match=r"NaN.*\(step 3, process 0, a micro-batch of 2 rows, .* ids \[5, 6, 7\]\)"):
        ours(tmp_path, Broken(), Rows(rows), **settings).train()


def test_train_nll_after_a_resume_is_of_the_steps_of_train_loss(tmp_path):
    settings = dict(max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, learning_rate=0.1)
    whole = ours(tmp_path, tiny_bert(), classification_rows(), **settings)
    whole.train()
    assert "train_nll_steps" not in whole.state.log_history[-1]
    resumed = ours(tmp_path, tiny_bert(), classification_rows(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last, log = resumed.state.log_history[-1], [entry for entry in resumed.state.log_history if "nll" in entry]
    assert last["train_nll_steps"] == 2
    assert last["train_nll"] == pytest.approx(np.mean([entry["nll"] for entry in log[-2:]]), rel=1e-6)
    assert last["train_nll"] == pytest.approx(last["train_loss"], rel=1e-4)  # ε = 0


@pytest.mark.parametrize("name", ["signed_gap", "eval_signed_gap", "eval_validation_signed_gap"])
@pytest.mark.parametrize("greater", [True, False, None])
def test_a_metric_whose_target_is_zero_chooses_no_checkpoint(tmp_path, name, greater):
    with pytest.raises(ValueError, match="signed_gap"):
        LabelSmoothingArguments(str(tmp_path), metric_for_best_model=name, greater_is_better=greater)
    with pytest.raises(ValueError, match="signed_gap"):
        trainer_of(LabelSmoothingTrainer, tmp_path, tiny_bert(), None, tf.TrainingArguments, metric_for_best_model=name)


class Softmaxed(Own):
    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.embed(input_ids[:, :4]).mean(1)).softmax(-1)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize("first", [1, 2, 3])
def test_probabilities_are_found_behind_a_first_batch_which_is_too_small(tmp_path, first):
    rows = classification_rows(8).rows
    trainer = ours(tmp_path, Softmaxed(True), Rows(rows), label_names=["labels"])
    trainer.compute_loss(trainer.model.train(), collate(rows[:first]))
    with pytest.raises(ValueError, match="probabilities"):
        trainer.compute_loss(trainer.model.train(), collate(rows))


class Choice(tf.BertForMultipleChoice):
    """Chooses where token 60 stands first."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = 8 * nn.functional.one_hot(input_ids[:, :, 0].argmax(1), 4).float()
        logits = logits + 0 * super().forward(input_ids=input_ids, **kwargs).logits
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def choices(n=200, wrong=7):
    g, rows = torch.Generator().manual_seed(0), []
    for i in range(n):
        ids = torch.randint(5, 50, (4, 3), generator=g)
        ids[i % 4, 0] = 60
        rows.append(dict(input_ids=ids, labels=torch.tensor(i % 4 if i % 100 >= wrong else (i + 1) % 4)))
    return Rows(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.25},
        {"label_smoothing_schedule": "linear", "label_smoothing_final_factor": 0.25},
        {"label_smoothing_schedule": "linear", "label_smoothing_factor": 0.25},
    ],
    ids=["constant", "rising", "falling"],
)
def test_the_ceiling_is_that_of_the_logits_and_of_the_last_epsilon(tmp_path, caplog, settings):
    model = Choice(tiny_bert(num_labels=2).config)
    trainer = ours(tmp_path, model, choices(), per_device_eval_batch_size=50, **settings)
    with caplog.at_level(logging.WARNING, logger="hf_ls"):
        found = trainer.evaluate()
    expected = ceiling_warning(0.25, "all", found["eval_accuracy"], 200, 4)
    assert found["eval_accuracy"] == pytest.approx(0.93) and expected and "K = 4" in expected
    falls = settings.get("label_smoothing_final_factor", 0.0) == 0 and "label_smoothing_schedule" in settings
    assert (expected in caplog.text) is not falls


def test_trainers_whose_evaluation_counts_no_row_keep_the_order_of_the_dataset(tmp_path):
    """Rows without a label among rows with one: they are predicted, and not counted."""
    rows = [
        row | {"labels": torch.tensor(-100 if i % 2 else int(row["labels"]))} for i, row in enumerate(classification_rows(9).rows)
    ]
    trainer = ours(tmp_path, tiny_bert(), Rows(rows), per_device_eval_batch_size=2)
    kept = ours(tmp_path, trainer.model, Rows(rows[::2]), per_device_eval_batch_size=2).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(kept["eval_loss"], rel=1e-6)
    assert trainer.predict(Rows(rows)).predictions.shape == (9, CLASSES)


@pytest.mark.parametrize(("size", "name"), [("get_sp_size", "sequence"), ("get_cp_size", "context")])
def test_sequences_are_not_cut_among_processes(tmp_path, monkeypatch, size, name):
    monkeypatch.setattr(tf.Trainer, size, lambda self: 2)
    with pytest.raises(ValueError, match=f"expected no {name} parallelism, got .* = 2"):
        ours(tmp_path, tiny_llama())
