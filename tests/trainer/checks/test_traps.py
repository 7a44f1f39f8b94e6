"""Every trap of the stock code has tests with its number in their names, one of them of the stock behaviour.

Here are the stock halves which stand beside no test of ours elsewhere, and the index. Stock halves are marked `stock` and left
out of the ordinary suite (`-m stock` runs them); one is skipped, with a reason, once a newer version has mended it.

 1 gradient accumulation       9 labels and numbers out of range
 2 several processes          10 which metric is better greater
 3 evaluate() before train()  11 labels without decoder inputs
 4 eval_loss                  12 the model card
 5 predict_with_generate      13 YAML and the command line
 6 the label shift            14 compute_loss_func
 7 the router loss            15 the gathering of all logits
 8 other tasks                 16 the order of predictions
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers as tf
import yaml
from helpers import arguments, classification_rows, collate, seq2seq_rows, tiny_bart, tiny_bert, tiny_llama, tiny_t5, token_rows
from places import TESTS
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LabelSmoother

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.losses.cross_entropy import smoothed_cross_entropy

MENDED = "this version of transformers has mended it: "


def names(number):
    """The test functions with this number, as pytest collects them."""
    functions = [
        name
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    return [name for name in functions if f"trap_{number:02d}_" in name]


@pytest.mark.parametrize("number", range(1, 17))
def test_every_trap_is_tested_by_number_in_the_stock_code_and_in_ours(number):
    stock = [name for name in names(number) if "stock" in name]
    assert stock, f"no test shows the stock behaviour of trap {number}"
    assert set(names(number)) - set(stock), f"no test shows ours to be free of trap {number}"


def stock(folder, model, rows=None, **kwargs):
    other = {name: kwargs.pop(name) for name in ("compute_loss_func",) if name in kwargs}
    trainer = tf.Trainer(
        model=model, args=arguments(folder, **kwargs), train_dataset=rows, eval_dataset=rows, data_collator=collate, **other
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.stock
def test_trap_07_stock_smoothing_drops_the_router_loss(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    router = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=1.0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **router, num_key_value_heads=4))
    batch = collate(token_rows((9, 9, 9, 9)).rows)
    own = model(**batch).loss.item()
    loss = stock(tmp_path, model, label_smoothing_factor=1e-9).compute_loss(model, {**batch}).item()
    if loss == pytest.approx(own, rel=1e-3):
        pytest.skip(MENDED + "the router loss is kept")
    assert own - loss > 1  # the router loss: 1 or more for each layer


@pytest.mark.stock
def test_trap_08_stock_question_answering_ignores_epsilon_in_silence(tmp_path):
    torch.manual_seed(0)
    model = tf.BertForQuestionAnswering(tiny_bert(num_labels=2).config)
    ids = torch.randint(5, 97, (4, 8))
    batch = dict(input_ids=ids, start_positions=torch.tensor([1, 2, 3, 4]), end_positions=torch.tensor([2, 3, 4, 5]))
    plain, smoothed = (stock(tmp_path, model, label_smoothing_factor=e).compute_loss(model, {**batch}).item() for e in (0.0, 0.5))
    if plain != smoothed:
        pytest.skip(MENDED + "start and end positions are smoothed")
    assert plain > 0  # ours: `test_question_answering`


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible with multi-label")
@pytest.mark.stock
def test_trap_08_stock_multi_label_trains_without_epsilon(tmp_path):
    """It warns, once; card and arguments still say 0.5."""
    model, batch = tiny_bert(problem_type="multi_label_classification"), collate(classification_rows(4).rows)
    batch["labels"] = torch.eye(5)[:4]
    try:
        plain, smoothed = (
            stock(tmp_path, model, label_smoothing_factor=e).compute_loss(model, {**batch}).item() for e in (0.0, 0.5)
        )
    except (ValueError, TypeError, RuntimeError):
        pytest.skip(MENDED + "smoothing of several labels is refused")
    if plain != smoothed:
        pytest.skip(MENDED + "several labels are smoothed")
    assert plain > 0


def test_trap_08_multi_label_is_refused_at_construction(tmp_path):
    model = tiny_bert(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="separate yes/no decisions"):
        LabelSmoothingTrainer(model=model, args=arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.5))


@pytest.mark.parametrize("kind", [torch.float32, torch.long])
def test_trap_08_multi_hot_labels_are_refused_where_the_config_does_not_say(tmp_path, kind):
    """The stock model decides by the dtype of its first labels, and writes that into its config."""
    model, batch = tiny_bert(), collate(classification_rows(4).rows) | {"labels": torch.eye(5)[:4].to(kind)}
    trainer = LabelSmoothingTrainer(model=model, args=arguments(tmp_path, LabelSmoothingArguments))
    with pytest.raises((TypeError, ValueError), match=r"argmax\(-1\) if each .* has exactly one class"):
        trainer.compute_loss(model, batch)


class OwnName(tf.Wav2Vec2ForCTC):
    """A subclass, as research code has it."""


def speech(model_class, **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=12, pad_token_id=0)
    convolution = dict(conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, apply_spec_augment=False)
    positions = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return model_class(model_class.config_class(**sizes, **convolution, **positions, **kwargs))


@pytest.mark.parametrize("length", [5, 19])
@pytest.mark.stock
def test_trap_08_stock_smoothing_of_ctc_takes_frames_for_labels_or_fails(tmp_path, length):
    """19 frames: with as many labels it trains on them frame by frame, in silence."""
    model = speech(tf.Wav2Vec2ForCTC).eval()
    batch = dict(input_values=torch.randn(2, 100), labels=torch.randint(1, 12, (2, length)))
    logits = model(input_values=batch["input_values"]).logits
    frames = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) if length == 19 else None
    try:
        loss = stock(tmp_path, model, label_smoothing_factor=1e-9).compute_loss(model, {**batch})
    except RuntimeError as error:
        assert "must match the size" in str(error) and "CTC" not in str(error)
        return
    except ValueError:
        pytest.skip(MENDED + "smoothing of CTC is refused")
    if frames is None or loss.item() != pytest.approx(frames.item(), rel=1e-4):
        pytest.skip(MENDED + "CTC keeps its own loss")


@pytest.mark.parametrize("model_class", [tf.Wav2Vec2ForCTC, tf.HubertForCTC, OwnName])
def test_trap_08_ctc_is_refused_before_any_batch(tmp_path, model_class):
    sentence = f"got {model_class.__name__}, whose loss sums over alignments .*; use transformers.Trainer"
    with pytest.raises(ValueError, match=sentence):
        LabelSmoothingTrainer(model=speech(model_class), args=arguments(tmp_path, LabelSmoothingArguments))


def token_classifier_with_one_output():
    return tf.BertForTokenClassification(tiny_bert(num_labels=1).config)


def audio_classifier_with_one_output():
    return speech(tf.Wav2Vec2ForSequenceClassification, num_labels=1)


@pytest.mark.parametrize("make", [token_classifier_with_one_output, audio_classifier_with_one_output])
def test_trap_08_one_output_is_refused_in_every_kind_of_classifier(tmp_path, make):
    with pytest.raises(ValueError, match=r"expected num_labels >= 2, got 1 in .*; use transformers\.Trainer"):
        LabelSmoothingTrainer(model=make(), args=arguments(tmp_path, LabelSmoothingArguments))


@pytest.mark.stock
def test_trap_08_stock_regression_loss_is_zero(tmp_path):
    """One class: its log-probability is 0 whatever the target, 0, 2 or 3."""
    batch = collate(classification_rows(4).rows) | {"labels": torch.zeros(4, dtype=torch.long)}
    model = tiny_bert(num_labels=1)
    try:
        loss = stock(tmp_path, model, label_smoothing_factor=0.1).compute_loss(model, batch).item()
    except (ValueError, TypeError, RuntimeError):
        pytest.skip(MENDED + "smoothing of a regression is refused")
    if loss != 0:
        pytest.skip(MENDED + "a regression keeps its own loss")


def test_trap_08_a_regression_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match="num_labels >= 2"):
        LabelSmoothingTrainer(model=tiny_bert(num_labels=1), args=arguments(tmp_path, LabelSmoothingArguments))


@pytest.mark.parametrize("epsilon", [-0.1, 2.0])
@pytest.mark.stock
def test_trap_09_stock_takes_any_epsilon(tmp_path, epsilon):
    try:
        args = tf.TrainingArguments(str(tmp_path), label_smoothing_factor=epsilon, report_to=[])
    except ValueError:
        pytest.skip(MENDED + "epsilon is checked")
    assert args.label_smoothing_factor == epsilon


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, 2.0])
def test_trap_09_an_epsilon_out_of_range_is_refused(tmp_path, epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        LabelSmoothingArguments(str(tmp_path), label_smoothing_factor=epsilon, report_to=[])


def logits_for(case):
    torch.manual_seed(0)
    if case == "all ignored":
        return torch.randn(1, 3, 7), torch.full((1, 3), -100)
    if case == "column of minus infinity":
        return torch.randn(1, 3, 7).index_fill(2, torch.tensor([6]), float("-inf")), torch.tensor([[1, 2, 3]])
    return torch.randn(1, 8192, 512).mul(8).half(), torch.randint(0, 512, (1, 8192))


@pytest.mark.parametrize("case", ["all ignored", "column of minus infinity", "half precision sum"])
@pytest.mark.stock
def test_trap_09_stock_loss_is_not_finite(case):
    logits, labels = logits_for(case)
    if torch.isfinite(LabelSmoother(0.1)({"logits": logits}, labels)):
        pytest.skip(MENDED + case)


@pytest.mark.parametrize("case", ["all ignored", "column of minus infinity", "half precision sum"])
def test_trap_09_our_loss_is_finite_or_says_what_helps(case):
    logits, labels = logits_for(case)
    if case == "column of minus infinity":
        with pytest.raises(ValueError, match="give masked classes no mass"):  # `test_losses` shows that it helps
            smoothed_cross_entropy(logits, labels, 0.1)
    else:
        assert torch.isfinite(smoothed_cross_entropy(logits, labels, 0.1))


@pytest.mark.parametrize("name", ["ece", "nll", "brier"])
@pytest.mark.stock
def test_trap_10_stock_takes_a_calibration_error_as_greater_is_better(tmp_path, name):
    if arguments(tmp_path, metric_for_best_model=name).greater_is_better is not True:
        pytest.skip(MENDED + f"{name} is lower-is-better")


@pytest.mark.stock
def test_trap_11_stock_bart_is_fed_its_source_in_silence(tmp_path):
    """Where source and labels happen to be of one length; else the shapes do not fit."""
    model, batch = tiny_bart(), collate(seq2seq_rows((7,) * 4).rows)
    own = model(**batch).loss.item()
    loss = stock(tmp_path, model, label_smoothing_factor=1e-9).compute_loss(model, {**batch}).item()
    if loss == pytest.approx(own, rel=1e-5):
        pytest.skip(MENDED + "decoder inputs are made from the labels")
    assert abs(loss - own) > 1e-3


@pytest.mark.stock
def test_trap_11_stock_t5_asks_for_something_else(tmp_path):
    model, batch = tiny_t5(), collate(seq2seq_rows((7,) * 4).rows)
    try:
        stock(tmp_path, model, label_smoothing_factor=0.1).compute_loss(model, batch)
    except ValueError as error:
        assert "input_ids" in str(error) and "decoder" not in str(error)  # misleading: the batch has input_ids
    else:
        pytest.skip(MENDED + "decoder inputs are made from the labels")


@pytest.mark.stock
def test_trap_13_stock_yaml_and_parser_take_other_values(tmp_path):
    assert yaml.safe_load("learning_rate: 2e-5\nsave_strategy: no") == {"learning_rate": "2e-5", "save_strategy": False}
    parser = tf.HfArgumentParser(tf.TrainingArguments)
    argv = ["--output_dir", str(tmp_path), "--label_smoothing", "0.1", "--resume_from_checkpoint", "True", "--report_to", "none"]
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except (SystemExit, ValueError):
        pytest.skip(MENDED + "no abbreviations")
    assert (args.label_smoothing_factor, args.resume_from_checkpoint) == (0.1, "True")


@pytest.mark.stock
def test_trap_14_stock_loss_function_beats_epsilon_in_silence(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * 0 + 7.0

    model, batch = tiny_bert(), collate(classification_rows(4).rows)
    trainer = stock(tmp_path, model, label_smoothing_factor=0.1, compute_loss_func=loss_function)
    if trainer.compute_loss(model, batch).item() != 7.0:
        pytest.skip(MENDED + "epsilon is not forgotten beside compute_loss_func")


@pytest.mark.stock
def test_trap_15_stock_evaluation_gathers_all_logits(tmp_path, monkeypatch):
    """Ours: `test_statistics`. The stock Trainer drops them again where nobody asked for metrics, so somebody asks."""
    trainer = stock(tmp_path, tiny_llama(), token_rows(), per_device_eval_batch_size=8)
    trainer.compute_metrics = lambda prediction: {}
    shapes, gather = [], trainer.gather_function
    monkeypatch.setattr(trainer, "gather_function", lambda items: shapes.append(tuple(items.shape)) or gather(items))
    trainer.evaluate()
    if (8, 40, 97) not in shapes:
        pytest.skip(MENDED + "logits are reduced first")


def order_of_predictions(trainer, rows):
    """The first input id of each row in the order in which its labels come back."""
    first = {tuple(row["labels"]): i for i, row in enumerate(rows)}
    return [first[tuple(label for label in labels.tolist() if label != -100)] for labels in trainer.predict(rows).label_ids]


def rows_of_lengths(*lengths):
    torch.manual_seed(3)
    rows = token_rows(lengths).rows
    return [{**row, "labels": [int(y) for y in row["input_ids"]]} for row in rows]


@pytest.mark.stock
def test_trap_16_stock_predictions_come_in_another_order_than_the_dataset_when_training_groups_by_length(tmp_path):
    rows = rows_of_lengths(4, 9, 5, 8, 3, 7, 6, 2)
    found = order_of_predictions(stock(tmp_path, tiny_llama(), rows, train_sampling_strategy="group_by_length"), rows)
    if found == list(range(8)):
        pytest.skip(MENDED + "evaluation is in the order of the dataset")
    assert sorted(found) == list(range(8))


def test_trap_16_predictions_are_in_the_order_of_the_dataset(tmp_path):
    rows = rows_of_lengths(4, 9, 5, 8, 3, 7, 6, 2)
    args = LabelSmoothingArguments(str(tmp_path), train_sampling_strategy="group_by_length", report_to=[], use_cpu=True)
    trainer = LabelSmoothingTrainer(model=tiny_llama(), args=args, train_dataset=rows, data_collator=collate)
    assert order_of_predictions(trainer, rows) == list(range(8))
    assert trainer.args.train_sampling_strategy == "group_by_length"
