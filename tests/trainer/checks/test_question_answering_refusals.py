"""Question answering: what is refused, in labels, settings and models, and in which words."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from helpers import VOCAB, Rows, arguments, collate, tiny_bert
from test_question_answering import BERT, make, ours, rows

from hf_ls import LabelSmoothingSeq2SeqTrainer, Smoothing
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments
from hf_ls.trainer.spans import positions_in, span_terms

# --- labels


def test_positions_beyond_the_text_are_ignored_and_columns_b_1_are_taken():
    batch = collate(rows().rows)
    wide = batch | {name: batch[name][:, None] for name in ("start_positions", "end_positions")}
    expected = [[3, 5], [4, -100], [4, 4], [-100, -100], [5, 6], [7, 9], [0, 0], [-100, -100]]
    assert positions_in(batch).tolist() == positions_in(wide).tolist() == expected
    embeds = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": torch.zeros(8, 12, 4)}
    assert positions_in(embeds).tolist() == expected


def changed(name, value):
    batch = collate(rows().rows)
    return batch | {name: value(batch[name])} if value else {key: value for key, value in batch.items() if key != name}


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("start_positions", None, ValueError, "got no `start_positions`; add that column"),
        ("end_positions", None, ValueError, "got no `end_positions`; add that column"),
        ("input_ids", lambda ids: None, None, None),  # the mask tells the length
        ("start_positions", lambda y: torch.where(y == 3, -1, y), ValueError, r"got -1; .* \[CLS\]"),
        ("end_positions", lambda y: y.float(), TypeError, "expected integer `end_positions`, got torch.float32"),
        ("end_positions", lambda y: y > 0, TypeError, "expected integer `end_positions`, got torch.bool"),
        ("start_positions", lambda y: y[:, None].repeat(1, 3), ValueError, r"`start_positions` \[B\], got \(8, 3\)"),
        ("start_positions", lambda y: y[:3], ValueError, "as many starts as ends, got 3 and 8"),
    ],
)  # fmt: skip
def test_wrong_positions_are_refused(name, value, error, match):
    batch = changed(name, value)
    if error is None:
        assert positions_in(batch).shape == (8, 2)
        return
    with pytest.raises(error, match=match):
        positions_in(batch)


def test_one_position_without_the_other_stops_training_and_evaluation(tmp_path):
    """A stock Trainer evaluates such data without a loss and without a word."""
    data = rows()
    for row in data.rows:
        del row["end_positions"]
    for work in ("train", "evaluate"):
        with pytest.raises(ValueError, match="got no `end_positions`"):
            getattr(ours(tmp_path, make(), data), work)()
    stock = ours(tmp_path, make(), data, tf.Trainer).evaluate()
    if "eval_loss" in stock:
        pytest.skip("this version of transformers does not leave out the loss in silence")


def test_without_positions_there_is_no_training(tmp_path):
    data = Rows([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows().rows])
    with pytest.raises(ValueError, match="expected `start_positions` and `end_positions` in the batch"):
        ours(tmp_path, make(), data).train()


@pytest.mark.parametrize(
    ("mask", "match"),
    [(torch.ones(2, 1, 5, 5), "expected attention_mask"), (torch.ones(2, 9), "expected attention_mask"), (torch.zeros(2, 5), "a token in")],
)  # fmt: skip
def test_an_attention_mask_which_does_not_say_where_the_text_is_is_refused(mask, match):
    with pytest.raises(ValueError, match=match):
        span_terms(torch.randn(2, 2, 5), torch.tensor([[1, 2], [3, 4]]), Smoothing(0.1), {"attention_mask": mask})


# --- settings and models


@pytest.mark.parametrize(
    ("trainer_args", "kwargs", "match"),
    [
        ({"smoothing": Smoothing(0.1, prior=torch.full((12,), 1 / 12))}, {}, "expected no prior for question answering"),
        ({"class_weight": torch.ones(2)}, {}, "expected no class_weight"),
        ({"shift_labels": True}, {}, "expected shift_labels None or False"),
        ({}, {"label_smoothing_objective": "online"}, "got 'online'; .*set label_smoothing_objective='smoothed_ce'"),
        ({}, {"label_smoothing_objective": "graduated"}, "got 'graduated'"),
        ({}, {"label_smoothing_objective": "maxsup"}, "got 'maxsup'"),
        ({}, {"label_smoothing_objective_params": '{"z_loss": 0.1}'}, "got a z_loss"),
        ({}, {"mixup_alpha": 0.2}, "expected no mixup"),
        ({}, {"label_smoothing_logits_free": "on"}, "set 'auto'"),
    ],
)
def test_settings_without_a_meaning_for_positions_are_refused(tmp_path, trainer_args, kwargs, match):
    with pytest.raises(ValueError, match=match):
        ours(tmp_path, make(), trainer_args=trainer_args, **kwargs)


def test_prompt_tuning_moves_the_positions_and_is_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"no virtual tokens .*use LoRA or prefix tuning"):
        ours(tmp_path, peft.get_peft_model(make(), config))


def test_generation_is_refused(tmp_path):
    args = arguments(tmp_path, LabelSmoothingSeq2SeqArguments, predict_with_generate=True)
    with pytest.raises(ValueError, match="expected predict_with_generate=False"):
        LabelSmoothingSeq2SeqTrainer(model=make("bart"), args=args)


def test_models_which_return_tuples_are_refused(tmp_path):
    model = make()
    model.config.return_dict = False
    with pytest.raises(ValueError, match=r"expected config\.return_dict=True"):
        ours(tmp_path, model)


def test_a_search_over_objectives_is_checked_again(tmp_path):
    trainer = ours(tmp_path, make())
    trainer.args.label_smoothing_objective = "maxsup"
    with pytest.raises(ValueError, match="got 'maxsup'"):
        trainer._hp_search_setup(None)


BEAMS = {
    "xlnet": (tf.XLNetForQuestionAnswering, tf.XLNetConfig, dict(d_model=32, n_layer=1, n_head=2, d_inner=32)),
    "xlm": (tf.XLMForQuestionAnswering, tf.XLMConfig, dict(emb_dim=32, n_layers=1, n_heads=2)),
    "flaubert": (tf.FlaubertForQuestionAnswering, tf.FlaubertConfig, dict(emb_dim=32, n_layers=1, n_heads=2)),
}


@pytest.mark.parametrize("name", BEAMS)
def test_trap_08_beam_search_models_are_refused(tmp_path, name):
    cls, config, sizes = BEAMS[name]
    model = cls(config(vocab_size=VOCAB, **sizes))
    with pytest.raises(ValueError, match=f"use {cls.__name__}Simple, or transformers.Trainer"):
        ours(tmp_path, model)


@pytest.mark.parametrize(
    "names", [["start_positions"], ["end_positions", "labels"], ["start_positions", "end_positions", "labels"]]
)
def test_half_of_the_label_names_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"expected the label names \['start_positions', 'end_positions'\]"):
        ours(tmp_path, make(), label_names=names)


def test_a_class_of_another_name_is_told_to_say_its_labels(tmp_path):
    """The Trainer finds positions by "QuestionAnswering" in the name."""

    class Reader(tf.BertForQuestionAnswering):
        pass

    model = Reader(tf.BertConfig(**BERT)).double()
    with pytest.raises(ValueError, match=r"label_names=\['start_positions', 'end_positions'\]"):
        ours(tmp_path, model)
    trainer = ours(tmp_path, model, label_names=["start_positions", "end_positions"])
    assert trainer.evaluate()["eval_nll"] > 0


def test_classification_heads_of_the_same_model_are_untouched(tmp_path):
    assert ours(tmp_path, tiny_bert(), Rows([]))._spans is False
