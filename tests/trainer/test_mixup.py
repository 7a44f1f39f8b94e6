"""Embedding mixup: the mixed forward against the model's own inputs_embeds, the loss of two labels, resuming, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    CLASSES,
    VOCAB,
    Rows,
    arguments,
    classification_rows,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_distilbert,
    tiny_llama,
    tiny_modernbert,
    token_rows,
    weights,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.trainer.mixup import MixedBatch, Mixup, check_mixable


def tiny_roberta():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=CLASSES)
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(vocab_size=VOCAB, pad_token_id=0, **sizes))


def tiny_llama_classifier():
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**(tiny_llama(num_labels=CLASSES).config.to_dict())))


def inputs_of(rows):
    return {name: value for name, value in collate(rows.rows).items() if name != "labels"}


def fixed(share, partner):
    return MixedBatch(torch.tensor(share), torch.tensor(partner))


CLASSIFIERS = [tiny_bert, tiny_distilbert, tiny_modernbert, tiny_roberta, tiny_llama_classifier]


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_a_share_of_1_is_the_example_and_a_share_of_0_its_partner(make):
    """Texts of different lengths, padded: attention, positions and the last token are those of the text that counts."""
    model, batch = make().eval(), inputs_of(classification_rows(6))
    with torch.no_grad():
        own = model(**batch).logits
        mixed = fixed([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], [5, 4, 3, 2, 1, 0]).forward(model, batch).logits
        again = model(**batch).logits
    torch.testing.assert_close(mixed, own[[0, 4, 2, 2, 4, 0]], rtol=1e-5, atol=1e-6)
    assert torch.equal(own, again)  # the model is as before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_embeddings_are_mixed_as_by_hand_through_inputs_embeds():
    model, batch = tiny_bert().double().eval(), inputs_of(classification_rows(4))
    share, partner = torch.tensor([0.9, 0.3, 0.5, 0.6]).double(), [3, 2, 1, 0]
    embedded = model.get_input_embeddings()(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)
    embedded = share[:, None, None] * embedded + (1 - share)[:, None, None] * embedded[partner]
    attention = torch.maximum(batch["attention_mask"], batch["attention_mask"][partner])
    expected = model(inputs_embeds=embedded, attention_mask=attention).logits
    found = MixedBatch(share, torch.tensor(partner)).forward(model, batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(z.square().sum(), model.get_input_embeddings().weight)[0] for z in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_inputs_hold_what_either_text_has():
    batch = {
        "input_ids": torch.tensor([[11, 12, 0, 0], [21, 22, 23, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        "token_type_ids": torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]]),
    }
    found = fixed([0.8, 0.4], [1, 0]).inputs(batch)
    assert found["input_ids"].tolist() == [[11, 12, 23, 0], [21, 22, 23, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert found["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]  # the second is mostly the first text
    assert batch["input_ids"][0].tolist() == [11, 12, 0, 0]


def test_draws_follow_the_beta_distribution_and_the_seed():
    labels = torch.arange(8)
    settings = Mixup(0.4, "example")
    torch.manual_seed(0)
    drawn = [settings.draw(labels) for _ in range(500)]
    shares = torch.stack([mixed.share for mixed in drawn]).flatten()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)  # of Beta(α, α)
    assert all(sorted(mixed.partner.tolist()) == list(range(8)) for mixed in drawn)
    assert len({tuple(mixed.partner.tolist()) for mixed in drawn}) > 400
    torch.manual_seed(0)
    assert torch.equal(settings.draw(labels).share, drawn[0].share)
    assert len(Mixup(0.4).draw(labels).share.unique()) == 1


def test_an_ignored_label_stays_alone():
    labels = torch.tensor([0, -100, 2, 3, -100])
    for _ in range(20):
        partner = Mixup(1.0).draw(labels).partner
        assert partner[[1, 4]].tolist() == [1, 4]
        assert sorted(partner[[0, 2, 3]].tolist()) == [0, 2, 3]


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])])
def test_the_loss_is_that_of_both_labels_and_accumulation_changes_nothing(tmp_path, monkeypatch, weight):
    """With the same pairs in every division of the batch: neighbours, at a share of 0.3."""

    def neighbours(self, labels):
        return MixedBatch(torch.full((len(labels),), 0.3), torch.arange(len(labels)) ^ 1)

    monkeypatch.setattr(Mixup, "draw", neighbours)
    rows, model = classification_rows(), tiny_bert().train()
    partner = torch.arange(8) ^ 1
    y = collate(rows.rows)["labels"]
    logits = fixed([0.3] * 8, partner.tolist()).forward(model, inputs_of(rows)).logits
    w = torch.ones(8) if weight is None else weight[y]
    losses = [F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none") for labels in (y, y[partner])]
    expected = (0.3 * w * losses[0] + 0.7 * w[partner] * losses[1]).sum() / w.sum()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for size, steps in ((8, 1), (2, 4)):
        record, step = one_step(
            lambda **kwargs: LabelSmoothingTrainer(class_weight=weight, **kwargs),
            tiny_bert(), rows, tmp_path, LabelSmoothingArguments,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, mixup_alpha=0.2, label_smoothing_factor=0.1,
            allow_combined_softening=True,
        )  # fmt: skip
        assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert record["loss"] == pytest.approx(record["nll"] + record["smoothing_term"], rel=1e-6)
        assert float((step - gradient).norm() / gradient.norm()) < 1e-5


def test_a_teacher_teaches_both_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(Mixup, "draw", lambda self, labels: fixed([0.3] * 8, [7, 6, 5, 4, 3, 2, 1, 0]))
    rows, model, teacher = classification_rows(), tiny_bert().train(), tiny_bert(seed=1).eval()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
        q = teacher(**inputs_of(rows)).logits.softmax(-1)
        log_p = fixed([0.3] * 8, [7, 6, 5, 4, 3, 2, 1, 0]).forward(model, inputs_of(rows)).logits.log_softmax(-1)
    each = [F.kl_div(log_p, target, reduction="batchmean").item() for target in (q, q.flip(0))]
    record, _ = one_step(
        lambda **kwargs: LabelSmoothingTrainer(teacher=teacher, **kwargs), tiny_bert(), rows, tmp_path, LabelSmoothingArguments,
        mixup_alpha=0.2, distillation_alpha=1.0, distillation_temperature=1.0, allow_combined_softening=True,
    )  # fmt: skip
    assert record["loss"] == pytest.approx(0.3 * each[0] + 0.7 * each[1], rel=1e-5)


def test_evaluation_is_not_mixed(tmp_path):
    rows = classification_rows(9)
    results = []
    for alpha in (0.0, 0.5):
        args = arguments(tmp_path, LabelSmoothingArguments, mixup_alpha=alpha)
        results.append(LabelSmoothingTrainer(model=tiny_bert(), args=args, data_collator=collate).evaluate(rows)["eval_nll"])
    assert results[0] == results[1]


def test_a_resumed_run_draws_what_an_unbroken_one_draws(tmp_path):
    def train(folder, resume=None, **kwargs):
        settings = dict(mixup_alpha=0.5, mixup_per="example", max_steps=4, learning_rate=0.1, per_device_train_batch_size=4)
        args = arguments(folder, LabelSmoothingArguments, **(settings | dict(save_strategy="steps", save_steps=2) | kwargs))
        trainer = LabelSmoothingTrainer(
            model=tiny_bert(), args=args, train_dataset=classification_rows(16), data_collator=collate
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model), [r["loss"] for r in trainer.state.log_history if "loss" in r]

    whole, losses = train(tmp_path)
    torch.manual_seed(123)
    resumed, again = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(whole, resumed)
    assert losses == again
    other, _ = train(tmp_path / "other", seed=2)
    assert not torch.equal(whole, other)


@pytest.mark.parametrize(("make", "rows"), [(tiny_llama, token_rows), (tiny_bart, seq2seq_rows)], ids=lambda f: f.__name__)
def test_language_models_are_refused(tmp_path, make, rows):
    args = arguments(tmp_path, LabelSmoothingArguments, mixup_alpha=0.2)
    with pytest.raises(ValueError, match="classifier of whole texts"):
        LabelSmoothingTrainer(model=make(), args=args, train_dataset=rows(), data_collator=collate)


def test_token_classifiers_are_refused(tmp_path):
    config = tiny_bert().config
    with pytest.raises(ValueError, match="BertForTokenClassification"):
        check_mixable(tf.BertForTokenClassification(config))

    class Tagger(tf.BertForTokenClassification):  # whose name says nothing
        pass

    rows = Rows([row | {"labels": row["input_ids"] % CLASSES} for row in classification_rows().rows])
    args = arguments(tmp_path, LabelSmoothingArguments, mixup_alpha=0.2)
    with pytest.raises(ValueError, match="no common label"):
        LabelSmoothingTrainer(model=Tagger(config), args=args, train_dataset=rows, data_collator=collate).train()


def test_what_cannot_be_mixed_is_refused():
    mixed, batch = fixed([0.5, 0.5], [1, 0]), inputs_of(classification_rows(2))
    with pytest.raises(ValueError, match="position_ids"):
        mixed.forward(tiny_bert(), batch | {"position_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="expected input_ids"):
        mixed.forward(tiny_bert(), {"inputs_embeds": torch.zeros(2, 4, 32)})
    with pytest.raises(ValueError, match="attention_mask"):
        mixed.forward(tiny_bert(), batch | {"attention_mask": torch.ones(2, 1, 5, 5)})
    with pytest.raises(ValueError, match="get_input_embeddings"):
        check_mixable(torch.nn.Linear(2, 2))

    class Twice(tf.BertForSequenceClassification):
        def forward(self, input_ids, **kwargs):
            self.get_input_embeddings()(input_ids)
            return super().forward(input_ids=input_ids, **kwargs)

    with pytest.raises(ValueError, match="one call of the input embedding"):
        mixed.forward(Twice(tiny_bert().config), batch)


@pytest.mark.parametrize("settings", [{"mixup_alpha": -0.1}, {"mixup_per": "token"}, {"mixup_alpha": 0.2, "mixup_per": "token"}])
def test_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="expected mixup_"):
        LabelSmoothingArguments(str(tmp_path), **settings)
