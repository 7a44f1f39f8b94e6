"""Objectives and adaptive smoothing through the Trainer: the same numbers by every path, and a state which survives."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    arguments,
    classification_rows,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_llama,
    token_rows,
    weights,
)
from safetensors.torch import load_file

from hf_ls import (
    LabelSmoothingArguments,
    LabelSmoothingSeq2SeqArguments,
    LabelSmoothingSeq2SeqTrainer,
    LabelSmoothingTrainer,
    Smoothing,
)
from hf_ls.losses.adaptive import OnlineLabelSmoothing, adaptive_smoothed_terms
from hf_ls.losses.objectives import COMBINES_WITH_EPSILON, NAMES, OBJECTIVES, Objective, masked_objective
from hf_ls.run.checkpoint import CheckpointMark
from hf_ls.trainer.criterion import Criterion, parse_params


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_a_classifier_exactly_under_accumulation(tmp_path, name):
    epsilon = 0.1 if name in COMBINES_WITH_EPSILON else 0.0
    kwargs = dict(allow_combined_softening=True, label_smoothing_objective=name, label_smoothing_factor=epsilon)
    (whole, g1), (parts, g4) = (
        one_step(
            LabelSmoothingTrainer, tiny_bert(), classification_rows(), tmp_path, LabelSmoothingArguments,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, **kwargs,
        )
        for size, steps in ((8, 1), (2, 4))
    )  # fmt: skip
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert float((g4 - g1).norm() / g1.norm()) < 1e-5
    assert whole["loss"] == pytest.approx(whole["nll"] + whole["smoothing_term"], rel=1e-5)


LANGUAGE_MODELS = {
    "llama": (LabelSmoothingTrainer, LabelSmoothingArguments, lambda: tiny_llama(sharpness=10), token_rows),
    "bart": (
        LabelSmoothingSeq2SeqTrainer,
        LabelSmoothingSeq2SeqArguments,
        tiny_bart,
        lambda: seq2seq_rows((7, 3, 5, 2, 6, 4, 8, 1)),
    ),
}


@pytest.mark.parametrize(
    ("name", "model"), [*((name, "llama") for name in OBJECTIVES), *((name, "bart") for name in ("dft", "eaft", "brier"))]
)
def test_logits_free_and_dense_objectives_are_the_same(tmp_path, name, model):
    trainer_class, arguments_class, make, rows = LANGUAGE_MODELS[model]
    kwargs = dict(
        allow_combined_softening=True,
        label_smoothing_objective=name,
        label_smoothing_factor=0.1 if name in COMBINES_WITH_EPSILON else 0.0,
    )
    (free, g1), (dense, g2) = (
        one_step(
            trainer_class, make(), rows(), tmp_path, arguments_class, per_device_train_batch_size=4, gradient_accumulation_steps=2, label_smoothing_logits_free=mode, **kwargs,
        )
        for mode in ("on", "off")
    )  # fmt: skip
    assert free["loss"] == pytest.approx(dense["loss"], rel=1e-5)
    assert free["nll"] == pytest.approx(dense["nll"], rel=1e-5)
    assert float((g1 - g2).norm() / g2.norm()) < 1e-5


def test_terms_are_those_of_the_functions():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 5, generator=g), torch.randint(0, 5, (9,), generator=g)
    labels[3] = -100
    zero = Smoothing(0.0)
    focal = Criterion(zero, Objective("focal", gamma=3.0)).terms(logits, labels, zero)
    torch.testing.assert_close(focal.loss, masked_objective(Objective("focal", gamma=3.0), logits, labels, zero))
    graduated = Criterion(zero, "graduated").terms(logits, labels, zero)
    torch.testing.assert_close(graduated.loss, adaptive_smoothed_terms(logits, labels, zero).loss)
    named = Criterion(zero, "focal", {"gamma": 3.0}).terms(logits, labels, zero)
    assert torch.equal(named.loss, focal.loss)


@pytest.mark.parametrize(
    ("epsilon", "objective", "params", "match"),
    [
        (0.0, "focl", {}, "expected an objective"),
        (0.1, "focal", {}, "epsilon = 0"),
        (0.1, "graduated", {}, "epsilon = 0"),
        (0.1, "online", {}, "epsilon = 0"),
        (0.0, "focal", {"gama": 2}, "gamma"),
        (0.0, "graduated", {"values": (0.0, 2.0)}, "0 <= epsilon < 1"),
    ],
)
def test_wrong_choices_are_refused(epsilon, objective, params, match):
    with pytest.raises(ValueError, match=match):
        Criterion(Smoothing(epsilon), objective, params)


def test_arguments_refuse_what_the_criterion_refuses(tmp_path):
    with pytest.raises(ValueError, match="epsilon = 0"):
        LabelSmoothingArguments(str(tmp_path), label_smoothing_factor=0.1, label_smoothing_objective="maxsup")
    for text in ("{", "[1]"):
        with pytest.raises(ValueError, match="objective parameters"):
            parse_params(text)
    assert parse_params('{"gamma": 3}') == {"gamma": 3}


def online_trainer(folder, classes=5, **kwargs):
    settings = dict(
        max_steps=8, num_train_epochs=2, save_strategy="steps", save_steps=3, per_device_train_batch_size=2, learning_rate=0.1
    )
    args = arguments(folder, LabelSmoothingArguments, label_smoothing_objective="online", **(settings | kwargs))
    return LabelSmoothingTrainer(
        model=tiny_bert(classes), args=args, train_dataset=classification_rows(classes=5), eval_dataset=classification_rows(5),
        data_collator=collate, callbacks=[CheckpointMark(Smoothing(0.0))],
    )  # fmt: skip


def test_online_smoothing_changes_its_targets_after_an_epoch(tmp_path):
    trainer = online_trainer(tmp_path, learning_rate=0.3)
    trainer.train()
    assert not torch.equal(trainer.criterion.online.matrix, OnlineLabelSmoothing(5).matrix)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_nll"]


def test_online_smoothing_resumes_in_mid_epoch_to_the_same_bits(tmp_path):
    whole = online_trainer(tmp_path / "whole")
    whole.train()
    resumed = online_trainer(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert load_file(checkpoint / "online_label_smoothing.safetensors")["count"].sum() > 0
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(whole.criterion.online.matrix, resumed.criterion.online.matrix)


def test_resuming_online_smoothing_needs_its_state(tmp_path):
    online_trainer(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "online_label_smoothing.safetensors").unlink()
    with pytest.raises(ValueError, match="online_label_smoothing"):
        online_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_online_smoothing_is_refused_for_a_vocabulary(tmp_path):
    trainer = online_trainer(tmp_path, classes=4097)
    with pytest.raises(ValueError, match="4096"):
        trainer.train()
