"""Question answering through `start_positions` and `end_positions`: the model's own loss at ε = 0, no mass on padding.

Every forward is in float64, so that parity is parity, but Splinter's, which makes NaN of its padding there.
"""

from __future__ import annotations

import copy

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import VOCAB, Rows, arguments, collate, one_step, span_rows
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Smoothing
from hf_ls.common.models import IGNORE_INDEX
from hf_ls.trainer.batch import Batch
from hf_ls.trainer.spans import POSITIONS, span_loss_gap, span_terms

BERT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
BART = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=2, **IDS,
)  # fmt: skip
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    **IDS,
)
MODELS = {
    "bert": (tf.BertForQuestionAnswering, lambda: tf.BertConfig(**BERT)),
    "roberta": (tf.RobertaForQuestionAnswering, lambda: tf.RobertaConfig(**BERT, bos_token_id=1, eos_token_id=2)),
    "electra": (tf.ElectraForQuestionAnswering, lambda: tf.ElectraConfig(**BERT, embedding_size=32)),
    "distilbert": (
        tf.DistilBertForQuestionAnswering,
        lambda: tf.DistilBertConfig(
            vocab_size=VOCAB, dim=32, n_layers=1, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0, qa_dropout=0.0
        ),
    ),
    "modernbert": (
        tf.ModernBertForQuestionAnswering,
        lambda: tf.ModernBertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **IDS,
            cls_token_id=1, sep_token_id=2,
        ),
    ),
    "splinter": (tf.SplinterForQuestionAnswering, lambda: tf.SplinterConfig(**BERT, question_token_id=4)),
    "big bird": (
        tf.BigBirdForQuestionAnswering,
        lambda: tf.BigBirdConfig(**BERT, bos_token_id=1, eos_token_id=2, sep_token_id=3, attention_type="original_full"),
    ),
    "bart": (tf.BartForQuestionAnswering, lambda: tf.BartConfig(**BART)),
    "llama": (tf.LlamaForQuestionAnswering, lambda: tf.LlamaConfig(**LLAMA)),
}  # fmt: skip
# Features: one answer cut off at both ends, one at its end only, one marked ignored by -100 in both.
LENGTHS = (9, 12, 5, 12, 7, 10, 12, 8)
STARTS = (3, 4, 4, 99, 5, 7, 0, IGNORE_INDEX)
ENDS = (5, 40, 4, 99, 6, 9, 0, IGNORE_INDEX)


def make(name="bert", seed=0, sharpness=20.0):
    torch.manual_seed(seed)
    cls, config = MODELS[name]
    model = cls(config()).to(torch.float32 if name == "splinter" else torch.float64)
    heads = [module for key, module in model.named_modules() if key.endswith(("qa_outputs", "qa_classifier.qa_outputs"))]
    with torch.no_grad():
        for head in heads:
            head.weight.mul_(sharpness)
    return model


def rows(starts=STARTS, ends=ENDS, lengths=LENGTHS, width=None):
    return span_rows(starts, ends, lengths, width)


def ours(folder, model, data=None, trainer_class=LabelSmoothingTrainer, trainer_args=None, **kwargs):
    args_class = tf.TrainingArguments if trainer_class is tf.Trainer else LabelSmoothingArguments
    data = rows() if data is None else data
    trainer = trainer_class(
        model=model, args=arguments(folder, args_class, **kwargs), train_dataset=data, eval_dataset=data, data_collator=collate,
        **(trainer_args or {}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def for_the_model(batch):
    """A batch with -100 as the model's own loss ignores it: as a position beyond the text."""
    return {name: torch.where(value == IGNORE_INDEX, 10**6, value) for name, value in batch.items()}


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# --- the loss


@pytest.mark.parametrize("name", MODELS)
def test_trap_08_epsilon_zero_is_the_models_own_loss(tmp_path, name):
    """Value and gradient, with answers which are cut off at one end or both, in the order of `find_labels`' keys."""
    model, batch = make(name).train(), collate(rows().rows)
    trainer = ours(tmp_path, model)
    assert trainer.label_names == ["start_positions", "end_positions"]
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    before = {key: value.clone() for key, value in batch.items()}
    own = model(**for_the_model(batch)).loss
    found = trainer.compute_loss(model, batch, num_items_in_batch=count)
    assert trainer._shift is False  # the check was made
    exact = own.dtype == torch.float64
    assert found.item() == pytest.approx(own.item(), rel=1e-12 if exact else 1e-6)
    expected = gradient(model, own)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(gradient(model, found), expected, rtol=1e-9, atol=1e-14 if exact else 1e-6)
    assert all(torch.equal(before[key], batch[key]) for key in before)


@pytest.mark.parametrize("convention", ["all", "wrong"])
def test_trap_08_the_target_is_spread_over_the_attended_tokens(tmp_path, convention):
    """−Σ t·log p with t written out row by row."""
    epsilon, model, batch = 0.3, make(), collate(rows().rows)
    trainer = ours(tmp_path, model, label_smoothing_factor=epsilon, label_smoothing_convention=convention)
    loss = trainer.compute_loss(model.train(), batch)
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    means = []
    for logits, labels in ((outputs.start_logits, STARTS), (outputs.end_logits, ENDS)):
        losses = []
        for row, label, length in zip(logits, labels, LENGTHS, strict=True):
            if not 0 <= label < logits.shape[1]:
                continue
            target = torch.zeros(logits.shape[1], dtype=torch.float64)
            target[:length] = epsilon / length if convention == "all" else epsilon / (length - 1)
            target[label] = 1 - epsilon + (epsilon / length if convention == "all" else 0)
            assert target.sum() == pytest.approx(1)
            losses.append(-(target * row.log_softmax(-1)).sum())
        means.append(sum(losses) / len(losses))
    assert loss.item() == pytest.approx((sum(means) / 2).item(), rel=1e-12)


def test_padding_gets_no_mass_and_does_not_change_the_smoothing_term():
    torch.manual_seed(0)
    labels, mask = torch.tensor([[1, 3], [0, 2]]), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    logits = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    short = span_terms(logits, labels, Smoothing(0.2), {"attention_mask": mask})
    wide = torch.cat([logits.detach(), torch.randn(2, 2, 7).double()], -1)
    long = span_terms(wide, labels, Smoothing(0.2), {"attention_mask": F.pad(mask, (0, 7))})
    assert torch.equal(short.smoothing_term, long.smoothing_term)
    (grad,) = torch.autograd.grad(short.loss.sum(), logits)
    target = (logits.softmax(-1) - grad).detach()
    assert torch.allclose(target.masked_fill(mask[:, None].bool(), 0), torch.zeros_like(target), atol=1e-15)
    assert torch.allclose(target.sum(-1), torch.ones(2, 2).double())


def test_without_an_attention_mask_every_token_counts_as_the_model_takes_it():
    logits, labels = torch.randn(2, 2, 5), torch.tensor([[1, 3], [0, 2]])
    found = span_terms(logits, labels, Smoothing(0.2), {})
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2, reduction="none").view(2, 2)
    assert torch.allclose(found.loss, expected, atol=1e-6)


@pytest.mark.parametrize("masked", [-1e6, torch.finfo(torch.float32).min, -torch.inf])
def test_positions_which_the_model_rules_out_get_no_mass(masked):
    """BigBird takes 1e6 from the logits of the question, Splinter the greatest float from those of the padding."""
    logits, labels = torch.randn(1, 2, 6), torch.tensor([[3, 5]])
    logits[..., 1:3] = masked
    rest = span_terms(logits[..., [0, 3, 4, 5]], torch.tensor([[1, 3]]), Smoothing(0.2), {})
    assert torch.allclose(span_terms(logits, labels, Smoothing(0.2), {}).loss, rest.loss)


def test_logits_after_those_of_the_text_get_no_mass():
    """As the image patches of LayoutLMv3."""
    logits, labels, mask = torch.randn(1, 2, 9), torch.tensor([[3, 5]]), torch.ones(1, 6)
    whole = span_terms(logits, labels, Smoothing(0.2), {"attention_mask": mask})
    text = span_terms(logits[..., :6], labels, Smoothing(0.2), {"attention_mask": mask})
    assert torch.allclose(whole.smoothing_term, text.smoothing_term)


@pytest.mark.parametrize("name", MODELS)
def test_the_smoothing_term_is_of_the_size_of_the_logits(tmp_path, name):
    """Not of the 1e6 or 1e38 by which a model rules positions out."""
    model, batch = make(name).train(), collate(rows().rows)
    loss = ours(tmp_path, model, label_smoothing_factor=0.5).compute_loss(model, batch)
    assert 0 < loss.item() < 200
    assert bool(torch.isfinite(gradient(model, loss)).all())


# --- the training


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_accumulated_batches_are_the_whole_batch(tmp_path, epsilon, batch):
    """Though their rows have labels at both ends, at one or none. Padded to one width: the NLL depends on padding."""
    data = rows(width=12)
    runs = [
        one_step(
            LabelSmoothingTrainer, make(), data, tmp_path, LabelSmoothingArguments, label_smoothing_factor=epsilon,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )
        for size in (8, batch)
    ]  # fmt: skip
    (whole, expected), (record, found) = runs
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    for name in ("loss", "nll", "smoothing_term"):
        assert record[name] == pytest.approx(whole[name], rel=1e-6, abs=1e-12)
    assert record["loss"] == pytest.approx(record["nll"] + record["smoothing_term"])


def test_trap_08_a_whole_batch_at_epsilon_zero_trains_as_the_stock_trainer_does(tmp_path):
    data = Rows(rows(width=12).rows[:7])  # without -100, on which a stock Trainer learns position 0
    kwargs = dict(per_device_train_batch_size=7)
    record, expected = one_step(tf.Trainer, make(), data, tmp_path, **kwargs)
    mine, found = one_step(LabelSmoothingTrainer, make(), data, tmp_path, LabelSmoothingArguments, **kwargs)
    assert mine["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_trap_08_epsilon_changes_the_gradient_as_it_should(tmp_path):
    plain, smoothed, both = (
        one_step(LabelSmoothingTrainer, make(), rows(), tmp_path, LabelSmoothingArguments, label_smoothing_factor=epsilon)[1]
        for epsilon in (0.0, 0.2, 0.4)
    )
    assert (smoothed - plain).abs().max() > 1e-4
    assert torch.allclose(both - plain, 2 * (smoothed - plain), rtol=1e-7, atol=1e-12)  # the loss is linear in epsilon


def test_a_batch_without_any_answer_has_loss_zero_and_the_check_waits_for_the_next(tmp_path):
    model = make().train()
    trainer = ours(tmp_path, model, label_smoothing_factor=0.1)
    batch = collate(rows(starts=(99,) * 8, ends=(99,) * 8).rows)
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == 0 and trainer._shift is None
    assert gradient(model, loss).abs().max() == 0
    trainer.compute_loss(model, collate(rows().rows))
    assert trainer._shift is False


def test_a_model_with_another_loss_is_refused_on_the_first_batch(tmp_path):
    class Weighted(tf.BertForQuestionAnswering):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs["loss"] = 2 * outputs.loss
            return outputs

    model = Weighted(tf.BertConfig(**BERT))
    args = arguments(tmp_path, LabelSmoothingArguments, label_names=["start_positions", "end_positions"])
    trainer = LabelSmoothingTrainer(model=model, args=args, train_dataset=rows(), data_collator=collate)
    with pytest.raises(ValueError, match="expected the loss of Weighted to be the cross entropy of its logits"):
        trainer.train()


def test_a_process_without_answers_takes_part_in_the_check_and_is_not_listened_to(tmp_path, monkeypatch):
    """A forward of a sharded model waits for all processes; the gap of the other decides."""
    model, forwards, said = make(), [], []
    theirs = span_loss_gap(model, Batch.read(collate(rows().rows), POSITIONS))
    trainer = ours(tmp_path, model, rows())
    model.register_forward_hook(lambda *_: forwards.append(1))

    def gather(items):
        said.extend(items)
        return [*items, True if items == [False] else theirs]

    monkeypatch.setattr("hf_ls.trainer.mixin.gather_object", gather)
    trainer._check_against_model([collate(rows(starts=(99,) * 8, ends=(99,) * 8).rows)])
    assert trainer._shift is False
    assert said == [False, None] and len(forwards) == 2


def test_the_check_draws_no_random_numbers_and_keeps_batch_and_mode():
    model, batch = make("splinter").train(), collate(rows().rows)  # Splinter clamps what it is given in place
    before, state = {key: value.clone() for key, value in batch.items()}, torch.get_rng_state()
    gap = span_loss_gap(model, Batch.read(batch, POSITIONS))
    assert gap.agrees(gap.unshifted) and gap.own > 0
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], batch[key]) for key in before)


def test_features_of_a_dataset_need_no_settings(tmp_path):
    """As tokenised by the usual scripts: other columns go, the default collator stays, nothing is said of labels."""
    columns = [{name: value.tolist() for name, value in row.items()} for row in rows(width=12).rows]
    data = datasets.Dataset.from_list([row | {"example_id": str(i), "offset_mapping": [[0, 1]]} for i, row in enumerate(columns)])
    args = LabelSmoothingArguments(str(tmp_path), label_smoothing_factor=0.1, max_steps=2, report_to=[], use_cpu=True)
    trainer = LabelSmoothingTrainer(model=make(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(trainer.predict(data.remove_columns(["start_positions", "end_positions"])).predictions) == 2
    assert trainer.evaluate()["eval_nll"] > 0


def test_lora_is_trained(tmp_path):
    config = peft.LoraConfig(task_type="QUESTION_ANS", r=2, target_modules=["query"])
    model = peft.get_peft_model(make(), config)
    trainer = ours(tmp_path, model, label_smoothing_factor=0.1, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.label_names == ["start_positions", "end_positions"]
    assert trainer.evaluate()["eval_nll"] > 0


def test_a_teacher_equal_to_the_student_takes_the_labels_share_and_adds_nothing(tmp_path):
    kwargs = dict(per_device_train_batch_size=8, distillation_alpha=0.25)
    model = make()
    trainer = ours(tmp_path, model, trainer_args={"teacher": copy.deepcopy(model)}, **kwargs)
    trainer.train()
    record = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert record["distillation_term"] == pytest.approx(-0.25 * record["nll"], rel=1e-6)
