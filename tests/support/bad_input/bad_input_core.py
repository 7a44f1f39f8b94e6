"""Rows of the bad-input matrix without files: arguments, labels, logits, tasks, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf
from bad_input import Call, Place, Row
from helpers import arguments, classification_rows, collate, tiny_bert, tiny_llama, token_rows
from torch import Tensor

from hf_ls import (
    LabelSmoothingArguments,
    LabelSmoothingTrainer,
    Objective,
    Schedule,
    SmoothedCrossEntropy,
    Smoothing,
    smoothed_cross_entropy,
)
from hf_ls.calibration.temperature import NoFiniteTemperature, fit_temperature
from hf_ls.metrics import ece, nll, summarise
from hf_ls.metrics.core import PredictionStatistics

NAN, INF = float("nan"), float("inf")
Z = [[2.0, 0.5, -1.0], [0.1, 1.8, 0.2]]


def _loss(labels: Any, logits: Any = None, smoothing: Any = 0.1, **kwargs: Any) -> Call:
    z = torch.tensor(Z if logits is None else logits)

    def call(place: Place) -> Tensor:
        return smoothed_cross_entropy(
            z.clone().requires_grad_(z.is_floating_point()), torch.as_tensor(labels), smoothing, **kwargs
        )

    return call


def _arguments(**kwargs: Any) -> Call:
    return lambda place: arguments(place.folder / "out", LabelSmoothingArguments, **kwargs)


def _trainer(model: Callable[[], Any] = tiny_bert, rows: Any = None, train: bool = True, **kwargs: Any) -> Call:
    """A trainer made, and trained for one step."""
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in LabelSmoothingArguments.__dataclass_fields__}

    def call(place: Place) -> None:
        args = arguments(place.folder / "out", LabelSmoothingArguments, **settings)
        data = classification_rows(4) if rows is None else rows
        made = LabelSmoothingTrainer(model=model(), args=args, train_dataset=data, data_collator=collate, **kwargs)
        if train:
            made.train()

    return call


def _labelled(*labels: Any) -> list[dict[str, Tensor]]:
    """Rows whose labels are these."""
    return [row | {"labels": torch.as_tensor(y)} for row, y in zip(classification_rows(len(labels)).rows, labels, strict=True)]


def _pair(first: Any, second: Any) -> Call:
    return lambda place: ece(first, second)


def _gpt2() -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2))


def _wav2vec2_ctc() -> Any:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    conv = dict(conv_dim=(16,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4)
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**sizes, **conv, num_conv_pos_embedding_groups=2))


SMOOTHING = [
    Row("epsilon is 1", lambda p: Smoothing(1.0), r"0 <= epsilon < 1, got 1\.0"),
    Row("epsilon is 2", lambda p: Smoothing(2), r"0 <= epsilon < 1, got 2"),
    Row("epsilon is negative", lambda p: Smoothing(-0.1), r"got -0\.1; pass allow_negative=True"),
    Row("epsilon is NaN", lambda p: Smoothing(NAN), r"0 <= epsilon < 1, got nan"),
    Row("epsilon is a string", lambda p: Smoothing("0.1"), r"epsilon as a number, got str", TypeError),  # type: ignore[arg-type]
    Row("epsilon is True", lambda p: Smoothing(True), r"epsilon as a number, got bool", TypeError),
    Row("convention has a typo", lambda p: Smoothing(0.1, "al"), r"convention 'all' or 'wrong', got 'al'"),  # type: ignore[arg-type]
    Row("schedule is a string", lambda p: Smoothing(0.1, schedule="linear"), r"hf_ls\.Schedule, got str", TypeError),  # type: ignore[arg-type]
    Row("schedule has a typo", lambda p: Schedule("lineer"), r"schedule kind in .* got 'lineer'"),  # type: ignore[arg-type]
    Row("schedule warms up for -1 steps", lambda p: Schedule("linear", warmup_steps=-1), r"warmup_steps >= 0, got -1"),
    Row("prior does not sum to 1", lambda p: Smoothing(0.1, prior=torch.ones(3)), r"summing to 1, got one with sum 3 and minimum 1; divide it by its sum"),
    Row("prior is negative", lambda p: Smoothing(0.1, prior=torch.tensor([1.5, -0.5])), r"non-negative prior summing to 1, got one with sum 1 and minimum -0\.5"),
    Row("prior is a list", lambda p: Smoothing(0.1, prior=[0.5, 0.5]), r"float tensor \[K\] or \[K, K\], got list", TypeError),  # type: ignore[arg-type]
    Row("prior is for other classes", _loss([0, 1], smoothing=Smoothing(0.1, prior=torch.tensor([0.5, 0.5]))), r"prior over 3 classes, got 2"),
    Row("system is not known", lambda p: Smoothing.from_system("megatrn", 0.1), r"a system among .* got 'megatrn'"),
    Row("one class only", lambda p: Smoothing(0.1).max_confidence(1), r"num_classes >= 2, got 1"),
]  # fmt: skip

LABELS = [
    Row("labels are floats", _loss([0.0, 1.0]), r"integer labels \(2,\) or soft targets \(2, 3\), got float labels \(2,\)"),
    Row("labels are booleans", _loss([False, True]), r"integer labels, got torch\.bool", TypeError),
    Row("label is K", _loss([0, 3]), r"labels in \[0, 3\) or -100 for ignored, got 3"),
    Row("label is -1", _loss([0, -1]), r"labels in \[0, 3\) or -100 for ignored, got -1"),
    Row("labels in a column", _loss([[0], [1]]), r"got \(2, 1\); one label per row of logits \(squeeze"),
    Row("labels are fewer than logits", _loss([0]), r"labels \(2,\) for logits \(2, 3\), got \(1,\)"),
    Row("labels are all ignored", _loss([-100, -100]), "", None),
    Row("labels are all ignored, logits NaN", _loss([-100, -100], [[NAN] * 3] * 2), "", None),
    Row("labels are missing", lambda p: SmoothedCrossEntropy(0.1)(torch.tensor(Z), None), r"expected labels, got None; the batch needs"),
    Row("labels are strings", lambda p: smoothed_cross_entropy(torch.tensor(Z), ["a", "b"], 0.1), r"labels as a tensor, got list", TypeError),  # type: ignore[arg-type]
    Row("soft targets are smoothed again", _loss([[0.5, 0.5, 0.0]] * 2), r"epsilon = 0 with soft targets, got 0\.1"),
    Row("soft targets do not sum to 1", _loss([[1.0, 1.0, 0.0]] * 2, smoothing=0.0), r"summing to 1 in each row, got a row with sum 2 and minimum 0"),
    Row("soft targets with class weights", _loss([[0.5, 0.5, 0.0]] * 2, smoothing=0.0, class_weight=torch.ones(3)), r"no class_weight with soft targets"),
    Row("labels of other classes in training", _trainer(rows=_labelled(0, 7)), r"labels in \[0, 5\) or -100 for ignored, got 7"),
    Row("labels of -1 in training", _trainer(rows=_labelled(0, -1)), r"labels in \[0, 5\) or -100 for ignored, got -1"),
    Row("labels of floats in training", _trainer(rows=_labelled(0.5, 1.0)), r"integer labels, got torch\.float32 \(2,\); .* for regression", TypeError),
    Row("labels missing in training", _trainer(rows=[{k: v for k, v in r.items() if k != "labels"} for r in classification_rows(4).rows]), r"`labels` in the batch, got \['attention_mask', 'input_ids'\]"),
]  # fmt: skip

LOGITS = [
    Row("logits are integers", _loss([0, 1], [[1, 2, 3], [1, 2, 3]]), r"floating-point logits, got torch\.int64", TypeError),
    Row("logits have one column", _loss([0, 0], [[1.0], [2.0]]), r"at least 2 classes, got 1; a single output is a regression"),
    Row("logits are NaN", _loss([0, 1], [[NAN, 0, 0], [0, 0, 0.0]]), r"finite logits wherever the target has mass, got NaN or -inf"),
    Row("logits are -inf on the label", _loss([0, 1], [[-INF, 0, 0], [0, 0, 0.0]]), r"never label an example with a masked class"),
    Row("logits are -inf elsewhere", _loss([1, 1], [[-INF, 0, 0], [0, 0, 0.0]]), r"give masked classes no mass with Smoothing\(prior"),
    Row("logits are numpy", lambda p: smoothed_cross_entropy(np.array(Z), torch.tensor([0, 1]), 0.1), r"logits as a tensor, got ndarray", TypeError),  # type: ignore[arg-type]
    Row("logits of sequences, shift not said", lambda p: SmoothedCrossEntropy(0.1)(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)), r"`shift` to be said for logits \(1, 2, 3\)"),
    Row("outputs without logits", lambda p: SmoothedCrossEntropy(0.1)({"start_logits": torch.zeros(1, 2)}, torch.tensor([0])), r"`logits` in the model's outputs, got \['start_logits'\]"),
    Row("probabilities as logits", lambda p: SmoothedCrossEntropy(0.1)(torch.tensor(Z * 2).softmax(-1), torch.tensor([0, 1, 0, 1])), r"which are probabilities: the loss has its own softmax"),
    Row("probabilities as logits in training", _trainer(lambda: _Softmaxed(), label_names=["labels"]), r"return the 5 scores before the softmax"),
    Row("outputs are a string", lambda p: SmoothedCrossEntropy(0.1)("logits", torch.tensor([0])), r"outputs with logits, got str", TypeError),
    Row("reduction has a typo", _loss([0, 1], reduction="avg"), r"reduction in .* got 'avg'"),
    Row("class weights of wrong K", _loss([0, 1], class_weight=torch.ones(2)), r"class_weight \[3\] >= 0, got \(2,\)"),
    Row("class weights are negative", _loss([0, 1], class_weight=-torch.ones(3)), r"class_weight \[3\] >= 0, got -1\.0"),
    Row("a count with another reduction", _loss([0, 1], reduction="sum", num_items_in_batch=2), r"reduction='mean' with num_items_in_batch, got 'sum'"),
    Row("objective is not known", lambda p: Objective("focl"), r"an objective in .*, got 'focl'"),
    Row("objective has an unknown parameter", lambda p: Objective("focal", gama=2), r"got .*gama", ),
]  # fmt: skip

ARGUMENTS = [
    Row("arguments: factor above 1", _arguments(label_smoothing_factor=1.5), r"0 <= epsilon < 1, got 1\.5"),
    Row("arguments: convention", _arguments(label_smoothing_convention="both"), r"convention 'all' or 'wrong', got 'both'"),
    Row("arguments: schedule", _arguments(label_smoothing_factor=0.1, label_smoothing_schedule="step"), r"schedule kind in .* got 'step'"),
    Row("arguments: objective", _arguments(label_smoothing_objective="crossentropy"), r"an objective in .*, got 'crossentropy'"),
    Row("arguments: parameters are no JSON", _arguments(label_smoothing_objective="focal", label_smoothing_objective_params="gamma=3"), r"JSON"),
    Row("arguments: logits-free mode", _arguments(label_smoothing_logits_free="yes"), r"label_smoothing_logits_free in .* got 'yes'"),
    Row("arguments: greatest error is best", _arguments(metric_for_best_model="ece", greater_is_better=True), r"greater_is_better=False for metric_for_best_model='ece', got True"),
    Row("arguments: smoothing and mixup", _arguments(label_smoothing_factor=0.1, mixup_alpha=0.2), r"one technique beside the plain cross entropy, got label smoothing .* and embedding mixup"),
    Row("arguments: smoothing and distillation", _arguments(label_smoothing_factor=0.1, distillation_teacher="t"), r"one technique beside the plain cross entropy, got label smoothing .* and distillation"),
    Row("arguments: mixup below 0", _arguments(mixup_alpha=-1.0), r"mixup_alpha > 0, got -1\.0"),
    Row("arguments: distillation above 1", _arguments(distillation_alpha=1.5), r"0 < distillation_alpha <= 1, got 1\.5"),
    Row("trainer: two epsilons", _trainer(label_smoothing_factor=0.1, smoothing=Smoothing(0.2)), r"one epsilon, got label_smoothing_factor=0\.1 and smoothing=.*0\.2"),
    Row("trainer: compute_loss_func", _trainer(compute_loss_func=SmoothedCrossEntropy(0.1)), r"no compute_loss_func, got one"),
    Row("trainer: named teacher not given", _trainer(distillation_teacher="teacher"), r"teacher=model with distillation_teacher='teacher', got none"),
    Row("trainer: class weights of wrong K", _trainer(class_weight=torch.ones(2)), r"class_weight \[5\].*got \(2,\)"),
    Row("trainer: teacher of other classes", _trainer(teacher=tiny_bert(3)), r"a teacher with the student's labels .* got \['LABEL_0', 'LABEL_1', 'LABEL_2'\]"),
    Row("trainer: mixup of tokens", _trainer(tiny_llama, token_rows((4, 5)), mixup_alpha=0.2), r"a classifier of whole texts with mixup, got LlamaForCausalLM"),
    Row("trainer: logits-free teacher", _trainer(tiny_llama, token_rows((4, 5)), label_smoothing_logits_free="on", teacher=tiny_llama()), r"'auto' or 'off' with a teacher, got 'on'"),
    Row("trainer: smoothing is a number", _trainer(smoothing=0.1), r"smoothing as a hf_ls\.Smoothing, got float", TypeError),
    Row("trainer: labels without a name", _trainer(lambda: _Softmaxed()), r"a label input, got none which the Trainer knows of _Softmaxed; set TrainingArguments\(label_names=\['labels'\]\)"),
    Row("trainer: temperature is 0", lambda p: _evaluated(p, temperature=0.0), r"temperature > 0, got 0\.0"),
]  # fmt: skip

TASKS = [
    Row("task: multi-label", _trainer(lambda: tiny_bert(problem_type="multi_label_classification")), r"got problem_type='multi_label_classification'"),
    Row("task: regression", _trainer(lambda: tiny_bert(problem_type="regression")), r"got problem_type='regression'"),
    Row("task: one output", _trainer(lambda: tiny_bert(1)), r"num_labels >= 2, got 1 in BertForSequenceClassification, which is a regression head"),
    Row("task: CTC", _trainer(_wav2vec2_ctc, [{"input_values": torch.randn(100), "labels": torch.tensor([1, 2])}] * 2), r"got "),
    Row("task: a loss of its own", _trainer(lambda: _OwnLoss()), r"to be the cross entropy of its logits, got .* use transformers\.Trainer"),
]  # fmt: skip

METRICS = [
    Row("metrics: logits as probabilities", lambda p: PredictionStatistics.from_probabilities(Z, [0, 1]), r"which look like logits; apply hf_ls\.metrics\.softmax"),
    Row("metrics: rows do not sum to 1", lambda p: PredictionStatistics.from_probabilities([[0.5, 0.1]], [0]), r"sum to 1 within 0\.001, got 0\.6"),
    Row("metrics: labels of -100", lambda p: nll(Z, [0, -100]), r"got 1 labels −100 \(ignore_index\)"),
    Row("metrics: labels are strings", lambda p: nll(Z, ["a", "b"]), r"integer labels, got dtype <U1", TypeError),
    Row("metrics: labels are floats", lambda p: nll(Z, [0.0, 1.0]), r"integer labels, got dtype float64", TypeError),
    Row("metrics: nothing", lambda p: nll(np.zeros((0, 3)), []), r"at least one row of logits, got none"),
    Row("metrics: ragged rows", lambda p: nll([[1.0, 2.0], [1.0]], [0, 1]), r"logits of shape \[n, K\], got ragged rows"),
    Row("metrics: NaN", lambda p: nll([[NAN, 1.0]], [0]), r"logits without NaN, got NaN in 1 rows, first 0"),
    Row("metrics: +inf", lambda p: nll([[INF, 1.0]], [0]), r"finite largest logit in every row, got inf in row 0"),
    Row("metrics: logits are strings", lambda p: nll([["a", "b"]], [0]), r"numeric logits of shape \[n, K\], got dtype", TypeError),
    Row("metrics: predicted classes instead", lambda p: nll([0, 1], [0, 1]), r"got shape \[2\]; give scores for every class"),
    Row("metrics: labels of other length", lambda p: nll(Z, [0]), r"got 2 predictions and 1 labels"),
    Row("metrics: soft labels", lambda p: nll(Z, Z), r"labels of shape \[n\], got shape \[2, 3\]"),
    Row("metrics: labels beyond K", lambda p: nll(Z, [0, 3]), r"labels in \[0, 3\), got 3 in row 1"),
    Row("metrics: logits as confidence", _pair([2.0, 0.5], [True, False]), r"confidence from 0 to 1, got 2\.0"),
    Row("metrics: labels as outcomes", _pair([0.2, 0.5], [2, 0]), r"only True and False, got 2"),
    Row("metrics: no bins", lambda p: ece([0.2, 0.5], [True, False], n_bins=0), r"n_bins of at least 1, got 0"),
    Row("metrics: half a bin", lambda p: ece([0.2, 0.5], [True, False], n_bins=7.5), r"an integer n_bins, got 7\.5", TypeError),  # type: ignore[arg-type]
    Row("metrics: probabilities as logits", lambda p: summarise([[0.9, 0.1], [0.2, 0.8]] * 50, [0, 1] * 50, repetitions=2), r"got 100 rows of probabilities"),
    Row("temperature: one class only", lambda p: fit_temperature([[5.0, 1.0]] * 4, [0] * 4), r"at least one misclassified row, got 4 rows", NoFiniteTemperature),
]  # fmt: skip


class _Softmaxed(tf.BertForSequenceClassification):
    """A classifier with a softmax of its own."""

    def __init__(self) -> None:
        super().__init__(tiny_bert().config)

    def forward(self, **kwargs: Any) -> Any:
        outputs = super().forward(**kwargs)
        outputs.logits = outputs.logits.softmax(-1)
        return outputs


class _OwnLoss(tf.BertForSequenceClassification):
    """A classifier whose loss is no cross entropy."""

    def __init__(self) -> None:
        super().__init__(tiny_bert().config)

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(**kwargs)
        return outputs if labels is None else type(outputs)(loss=outputs.logits.square().mean(), logits=outputs.logits)


def _evaluated(place: Place, **attributes: Any) -> None:
    args = arguments(place.folder / "out", LabelSmoothingArguments)
    trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, eval_dataset=classification_rows(4), data_collator=collate)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.evaluate()


ROWS = [*SMOOTHING, *LABELS, *LOGITS, *ARGUMENTS, *TASKS, *METRICS]
