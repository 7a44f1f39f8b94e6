"""Generation and calibration of encoder-decoders in one evaluation; trap 5 by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import arguments, collate, seq2seq_rows, tiny_bart, tiny_llama, tiny_t5, token_rows
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingSeq2SeqArguments, LabelSmoothingSeq2SeqTrainer
from hf_ls.calibration.temperature import fit_temperature
from hf_ls.metrics.core import ece

LENGTHS = (7, 3, 5, 2, 6)
MODELS = {"bart": tiny_bart, "t5": tiny_t5}


def sharp(name, dtype=torch.float64):
    """A model whose probabilities are far from uniform, so that smoothing and confidences matter."""
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return model.to(dtype).eval()


def rows_with_ends(model, lengths=LENGTHS):
    rows = seq2seq_rows(lengths, seed=3)
    for row in rows.rows:
        row["labels"] = torch.cat([row["labels"], torch.tensor([model.config.eos_token_id])])
    return rows


def trainer_of(folder, model, rows, trainer_class=LabelSmoothingSeq2SeqTrainer, compute_metrics=None, **kwargs):
    args_class = LabelSmoothingSeq2SeqArguments if trainer_class is LabelSmoothingSeq2SeqTrainer else tf.Seq2SeqTrainingArguments
    kwargs = dict(predict_with_generate=True, generation_max_length=9) | kwargs
    other = {name: kwargs.pop(name) for name in ("compute_loss_func",) if name in kwargs}
    trainer = trainer_class(
        model=model, args=arguments(folder, args_class, **kwargs), train_dataset=rows, eval_dataset=rows, data_collator=collate,
        compute_metrics=compute_metrics, **other,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def token_nll(model, rows):
    batch = collate(rows.rows)
    with torch.no_grad():
        logits = model(**batch).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()


def count(prediction):
    return {"rows": len(prediction.predictions), "integers": int(np.issubdtype(prediction.predictions.dtype, np.integer))}


@pytest.mark.parametrize("name", MODELS)
def test_trap_05_one_evaluation_gives_the_unsmoothed_token_nll_and_generated_tokens(tmp_path, name):
    model = sharp(name)
    rows = rows_with_ends(model)
    metrics = trainer_of(tmp_path, model, rows, compute_metrics=count, label_smoothing_factor=0.1).evaluate()
    assert metrics["eval_nll"] == pytest.approx(token_nll(model, rows), abs=1e-9)
    assert metrics["eval_loss"] == metrics["eval_nll"]
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_nll"]))
    assert (metrics["eval_rows"], metrics["eval_integers"]) == (len(LENGTHS), 1)
    for metric in ("ece", "brier", "eos_nll", "eos_ece", "exact_match", "sequence_ece"):
        assert 0 <= metrics[f"eval_{metric}"] < float("inf")


@pytest.mark.stock
def test_trap_05_stock_ignores_the_loss_function_where_it_generates(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return torch.tensor(123.0)

    model = sharp("bart", torch.float32)
    rows = rows_with_ends(model)
    losses = {
        generate: trainer_of(
            tmp_path,
            model,
            rows,
            tf.Seq2SeqTrainer,
            lambda p: {},
            predict_with_generate=generate,
            compute_loss_func=loss_function,
        ).evaluate()["eval_loss"]
        for generate in (False, True)
    }
    assert losses[False] == 123.0
    if losses[True] == 123.0:
        pytest.skip("this version of transformers asks compute_loss_func under predict_with_generate too")
    assert losses[True] == pytest.approx(token_nll(model, rows), rel=1e-5)


@pytest.mark.parametrize("generation", [dict(num_beams=3), dict(max_new_tokens=4), dict(max_length=12), {}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_labels_are_those_of_the_stock_class(tmp_path, name, generation):
    model = sharp(name, torch.float32)
    rows = rows_with_ends(model)
    seen = {}

    def keep(prediction):
        seen["last"] = prediction
        return {}

    outputs = {}
    for trainer_class in (tf.Seq2SeqTrainer, LabelSmoothingSeq2SeqTrainer):
        trainer = trainer_of(tmp_path, model, rows, trainer_class, keep, per_device_eval_batch_size=2, generation_max_length=10)
        output = trainer.predict(rows, **generation)
        trainer.evaluate(**generation)
        assert np.array_equal(seen["last"].predictions, output.predictions)
        outputs[trainer_class] = output
    stock, ours = outputs.values()
    assert ours.predictions.dtype == stock.predictions.dtype
    assert np.array_equal(ours.predictions, stock.predictions)
    assert np.array_equal(ours.label_ids, stock.label_ids)


def special_ids(model):
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    return {getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None}


def reference_confidences(model, rows, temperature=1.0, **generation):
    """One sequence at a time, without padding: exp Σ log p of what greedy search writes, and whether it is the label."""
    confidences, correct = [], []
    special = special_ids(model)
    for row in rows.rows:
        ids = model.generate(row["input_ids"][None], **generation)
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None], decoder_input_ids=ids[:, :-1]).logits
        log_p = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
        confidences.append(log_p.exp().item())
        written, label = ([i for i in x.tolist() if i not in special] for x in (ids[0], row["labels"]))
        correct.append(written == label)
    return np.array(confidences), np.array(correct)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sequence_calibration_is_that_of_single_sequences(tmp_path, name, temperature):
    model = sharp(name)
    rows = rows_with_ends(model, (3,) * 6)
    for i in (0, 3, 4):  # half of the sequences are what the model writes
        ids = model.generate(rows.rows[i]["input_ids"][None], max_length=9)[0]
        rows.rows[i]["labels"] = torch.tensor(
            [t for t in ids.tolist() if t not in special_ids(model)] + [model.config.eos_token_id]
        )
    confidence, correct = reference_confidences(model, rows, temperature, max_length=9)
    assert correct.sum() == 3
    for batch_size in (1, 4, 6):
        trainer = trainer_of(tmp_path, model, rows, per_device_eval_batch_size=batch_size)
        assert trainer.sequence_calibration is None
        trainer.temperature = temperature
        metrics = trainer.evaluate()
        assert metrics["eval_exact_match"] == 0.5
        assert metrics["eval_sequence_ece"] == pytest.approx(ece(confidence, correct), abs=1e-9)
        found = trainer.sequence_calibration.compute()
        assert found["brier"] == pytest.approx(((confidence - correct) ** 2).mean(), abs=1e-9)
        assert found["nll"] == pytest.approx(metrics["eval_nll"] * len(trainer.token_calibration) / 6, abs=1e-9)


def test_sequences_without_labels_are_generated_but_not_judged(tmp_path):
    model = sharp("bart", torch.float32)
    rows = rows_with_ends(model)
    rows.rows[1]["labels"][:] = -100
    trainer = trainer_of(tmp_path, model, rows, per_device_eval_batch_size=2)
    output = trainer.predict(rows)
    assert len(output.predictions) == len(LENGTHS)
    assert len(trainer.sequence_calibration) == trainer.token_calibration.sequences == len(LENGTHS) - 1


def test_unlabelled_sources_are_generated_only(tmp_path):
    model = sharp("t5", torch.float32)
    rows = rows_with_ends(model)
    for row in rows.rows:
        del row["labels"]
    output = trainer_of(tmp_path, model, rows).predict(rows)
    assert len(output.predictions) == len(LENGTHS)
    assert not any("nll" in name or "match" in name for name in output.metrics)


def test_own_exact_match_is_kept(tmp_path):
    model = sharp("bart", torch.float32)
    metrics = trainer_of(tmp_path, model, rows_with_ends(model), compute_metrics=lambda p: {"exact_match": 2.0}).evaluate()
    assert metrics["eval_exact_match"] == 2.0


@pytest.mark.parametrize("kwargs", [dict(predict_with_generate=False), dict(prediction_loss_only=True)], ids=str)
def test_without_generation_the_token_metrics_are_the_same(tmp_path, kwargs):
    model = sharp("bart")
    rows = rows_with_ends(model)
    generating = trainer_of(tmp_path, model, rows, per_device_eval_batch_size=2).evaluate()
    trainer = trainer_of(tmp_path, model, rows, compute_metrics=lambda p: {}, per_device_eval_batch_size=3, **kwargs)
    metrics = trainer.evaluate()
    assert trainer.sequence_calibration is None
    for name in ("nll", "brier", "ece", "accuracy", "signed_gap", "eos_nll", "eos_ece", "perplexity"):
        assert metrics[f"eval_{name}"] == pytest.approx(generating[f"eval_{name}"], abs=1e-9)


def test_a_temperature_is_fitted_without_generating(tmp_path, monkeypatch):
    model = sharp("bart")
    rows = rows_with_ends(model, (4,) * 6)
    for row in rows.rows[:4]:  # some of the labels are what the model says
        row["labels"] = model.generate(row["input_ids"][None], max_length=8)[0, 1:]
    trainer = trainer_of(tmp_path, model, rows)
    monkeypatch.setattr(model, "generate", None)
    temperature = trainer.fit_temperature(rows)
    monkeypatch.undo()
    batch = collate(rows.rows)
    with torch.no_grad():
        logits, labels = model(**batch).logits.flatten(0, 1), batch["labels"].flatten()
    kept = labels != -100
    assert temperature == pytest.approx(fit_temperature(logits[kept].numpy(), labels[kept].numpy()), rel=1e-3)
    trainer.temperature = temperature
    assert trainer.evaluate()["eval_nll"] == pytest.approx(F.cross_entropy(logits / temperature, labels).item(), abs=1e-9)


def test_training_evaluates_and_keeps_the_best_checkpoint_by_exact_match(tmp_path):
    rows = seq2seq_rows((2,) * 4)
    trainer = trainer_of(
        tmp_path, tiny_bart(), rows, label_smoothing_factor=0.1, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="exact_match", learning_rate=0.1, generation_max_length=4,
    )  # fmt: skip
    trainer.train()
    found = [r["eval_exact_match"] for r in trainer.state.log_history if "eval_exact_match" in r]
    assert len(found) == 2
    assert trainer.state.best_metric == max(found)
    assert trainer._head is not None


def test_decoders_alone_and_plain_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder-decoder model with predict_with_generate, got LlamaForCausalLM"):
        trainer_of(tmp_path, tiny_llama(), token_rows())
    with pytest.raises(TypeError, match="LabelSmoothingSeq2SeqArguments"):
        LabelSmoothingSeq2SeqTrainer(model=tiny_bart(), args=arguments(tmp_path, LabelSmoothingArguments))


def test_the_trainer_works_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(LabelSmoothingSeq2SeqTrainer(model=tiny_bart()).args, LabelSmoothingSeq2SeqArguments)
