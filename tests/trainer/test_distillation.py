"""Distillation: parity with torch's KL divergence, exact accumulation, who may teach whom, smoothed teachers."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    arguments,
    classification_rows,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_distilbert,
    tiny_fsmt,
    tiny_llama,
    tiny_t5,
    token_rows,
    weights,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Smoothing
from hf_ls.losses.cross_entropy import SmoothedTerms, smoothed_terms
from hf_ls.trainer.distillation import Distillation, Teacher, divergence, load_teacher, smoothing_evidence


def logits_and_labels(n=9, classes=6):
    g = torch.Generator().manual_seed(0)
    z, z_teacher = (3 * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, classes, (n,), generator=g)
    labels[[2, 5]] = -100
    return z, z_teacher, labels


def trainer_with(teacher):
    """The Trainer class with this teacher in its constructor, for `one_step`."""
    return lambda **kwargs: LabelSmoothingTrainer(teacher=teacher, **kwargs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_torchs_kl_div_in_float64_and_ignored_rows_are_exactly_0(temperature):
    z, z_teacher, labels = logits_and_labels()
    found = divergence(z, z_teacher, labels, temperature)
    log_p, log_q = (z / temperature).log_softmax(-1), (z_teacher / temperature).log_softmax(-1)
    expected = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    kept = labels != -100
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-12, atol=1e-14)
    assert found[~kept].tolist() == [0, 0]
    assert found[kept].min() > 0
    assert divergence(z, z, labels, temperature).abs().max() < 1e-14


def test_gradients_are_right_and_none_reaches_the_teacher():
    z, z_teacher, labels = logits_and_labels()
    z, z_teacher = z.requires_grad_(), z_teacher.requires_grad_()
    settings = Distillation(alpha=0.7, temperature=3.0)

    def loss(logits):
        return settings.terms(smoothed_terms(logits, labels, Smoothing(0.1)), logits, z_teacher, labels).loss

    assert torch.autograd.gradcheck(loss, (z,))
    grad, none = torch.autograd.grad(loss(z).sum(), (z, z_teacher), allow_unused=True)
    assert none is None
    assert grad[labels == -100].abs().max() == 0
    # In closed form: (1−α)·(p − t) + α·T·(p_T − q_T).
    kept = labels != -100
    target = Smoothing(0.1).target(labels[kept], z.shape[1]).double()
    soft = (z / 3).softmax(-1) - (z_teacher / 3).softmax(-1)
    expected = 0.3 * (z.softmax(-1)[kept] - target) + 0.7 * 3 * soft[kept]
    torch.testing.assert_close(grad[kept], expected.detach(), rtol=1e-6, atol=1e-8)


def test_masked_classes_add_nothing_and_nan_is_refused():
    z, z_teacher, labels = logits_and_labels()
    masked, teacher = z.clone(), z_teacher.clone()
    masked[:, 4] = teacher[:, 4] = -torch.inf
    masked.requires_grad_()
    found = divergence(masked, teacher, labels, 2.0)
    without = [c for c in range(6) if c != 4]
    torch.testing.assert_close(found, divergence(z[:, without], z_teacher[:, without], labels, 2.0))
    assert torch.isfinite(torch.autograd.grad(found.sum(), masked)[0]).all()
    with pytest.raises(ValueError, match="teacher has mass"):
        divergence(masked, z_teacher, labels)
    with pytest.raises(ValueError, match="same classes or vocabulary"):
        divergence(z, z_teacher[:, :5], labels)


def test_the_parts_add_up_to_hintons_loss():
    z, z_teacher, labels = logits_and_labels()
    terms = smoothed_terms(z, labels, Smoothing(0.1))
    found = Distillation(0.3, 2.5).terms(terms, z, z_teacher, labels)
    torch.testing.assert_close(found.loss, 0.7 * terms.loss + 0.3 * 2.5**2 * divergence(z, z_teacher, labels, 2.5))
    torch.testing.assert_close(found.nll, terms.nll)
    torch.testing.assert_close(found.smoothing_term, 0.7 * terms.smoothing_term)


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"alpha": 1.1}, {"temperature": 0}, {"temperature": float("inf")}])
def test_settings_out_of_range_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=r"expected .*distillation_"):
        Distillation(**settings)
    with pytest.raises(ValueError, match=r"expected .*distillation_"):
        LabelSmoothingArguments(str(tmp_path), **{f"distillation_{name}": value for name, value in settings.items()})


CASES = [
    (tiny_bert, lambda: tiny_bert(seed=1), classification_rows),
    (tiny_llama, lambda: tiny_llama(seed=1, sharpness=5), token_rows),
    (tiny_t5, tiny_t5, seq2seq_rows),
]


@pytest.mark.parametrize(("make", "make_teacher", "rows"), CASES, ids=lambda f: f.__name__)
def test_accumulation_changes_neither_loss_nor_gradient(tmp_path, make, make_teacher, rows):
    """Against the formula on all rows at once, by torch's own functions."""
    model, teacher, batch = make(), make_teacher(), collate(rows().rows)
    if make is tiny_t5:  # otherwise the same weights, and nothing to learn
        torch.manual_seed(3)
        torch.nn.init.normal_(teacher.shared.weight, std=3)
    with torch.no_grad():
        z_teacher = teacher.eval()(**batch).logits
    z, y = model.train()(**batch).logits, batch["labels"]
    if make is tiny_llama:
        z, z_teacher, y = z[:, :-1], z_teacher[:, :-1], y[:, 1:]
    kept = y != -100
    hard = F.cross_entropy(z[kept], y[kept])
    soft = F.kl_div((z[kept] / 2).log_softmax(-1), (z_teacher[kept] / 2).softmax(-1), reduction="batchmean")
    expected = 0.4 * hard + 0.6 * 4 * soft
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    before = weights(teacher)
    for size, steps in ((8, 1), (2, 4)):
        record, step = one_step(
            trainer_with(teacher), make(), rows(), tmp_path, LabelSmoothingArguments,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, distillation_alpha=0.6,
        )  # fmt: skip
        assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert record["nll"] == pytest.approx(hard.item(), rel=1e-5)
        assert record["distillation_term"] == pytest.approx(0.6 * (4 * soft.item() - hard.item()), rel=1e-4, abs=1e-6)
        total = record["nll"] + record["smoothing_term"] + record["distillation_term"]
        assert record["loss"] == pytest.approx(total, rel=1e-6)
        assert float((step - gradient).norm() / gradient.norm()) < 1e-5
    assert torch.equal(before, weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_teacher_nothing_of_it_is_logged(tmp_path):
    record, _ = one_step(LabelSmoothingTrainer, tiny_bert(), classification_rows(), tmp_path, LabelSmoothingArguments)
    assert "distillation_term" not in record


def test_class_weights_weight_the_teacher_too(tmp_path):
    weight, batch = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), collate(classification_rows().rows)
    teacher, model = tiny_bert(seed=1).eval(), tiny_bert()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
        z, z_teacher = model(**batch).logits, teacher(**batch).logits
    w = weight[batch["labels"]]
    losses = F.kl_div(z.log_softmax(-1), z_teacher.softmax(-1), reduction="none").sum(-1)
    settings = dict(distillation_alpha=1.0, distillation_temperature=1.0, per_device_train_batch_size=4)
    record, _ = one_step(
        lambda **kwargs: LabelSmoothingTrainer(teacher=teacher, class_weight=weight, **kwargs),
        model, classification_rows(), tmp_path, LabelSmoothingArguments, gradient_accumulation_steps=2, **settings,
    )  # fmt: skip
    assert record["loss"] == pytest.approx(((losses * w).sum() / w.sum()).item(), rel=1e-5)


def test_evaluation_is_the_plain_nll_and_the_teacher_stays_in_evaluation_mode(tmp_path):
    teacher = tiny_bert(seed=1, hidden_dropout_prob=0.5).train()
    args = arguments(tmp_path, LabelSmoothingArguments)
    trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, data_collator=collate, teacher=teacher)
    plain = LabelSmoothingTrainer(model=tiny_bert(), args=args, data_collator=collate)
    rows = classification_rows(9)
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    assert not teacher.training
    batch = {k: v for k, v in collate(rows.rows).items() if k != "labels"}
    assert torch.equal(Teacher(teacher, tiny_bert()).logits(batch), teacher(**batch).logits)


def test_a_language_model_with_a_teacher_takes_its_logits_and_says_why(tmp_path, caplog):
    def make(**kwargs):
        args = arguments(tmp_path, LabelSmoothingArguments, **kwargs)
        rows = token_rows()
        return LabelSmoothingTrainer(
            model=tiny_llama(),
            args=args,
            teacher=tiny_llama(seed=1),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
        )

    with caplog.at_level(logging.WARNING):
        trainer = make()
    assert any("distillation compares whole distributions" in message for message in caplog.messages)
    trainer.train()
    assert trainer._head is None
    loss = trainer.compute_loss(trainer.model.eval(), collate(token_rows().rows))
    assert trainer._head is not None  # evaluations need no teacher
    assert loss.item() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="logits_free"):
        make(label_smoothing_logits_free="on")


def test_a_teacher_may_take_fewer_inputs_than_the_student(tmp_path):
    teacher = tiny_distilbert().eval()
    batch = collate(classification_rows().rows)
    batch = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **{k: v for k, v in batch.items() if k != "labels"}}
    found = Teacher(teacher, tiny_bert()).logits(batch)
    assert torch.equal(found, teacher(batch["input_ids"], batch["attention_mask"]).logits)


@pytest.mark.parametrize("make", [tiny_fsmt, tiny_t5, tiny_bart, tiny_llama])
def test_a_teacher_does_not_see_the_words_to_come(make):
    teacher, student = make(), make()
    ids = collate(seq2seq_rows((6, 6)).rows)["labels"]
    other = torch.cat([ids[:, :-1], 5 + (ids[:, -1:] - 4) % 20], 1)
    source = {} if make is tiny_llama else {"input_ids": ids}
    name = "input_ids" if make is tiny_llama else "decoder_input_ids"
    one, two = (Teacher(teacher, student).logits({**source, name: words}) for words in (ids, other))
    assert one.shape[:2] == (2, 6), "all positions, not the last one alone"
    torch.testing.assert_close(one[:, :-1], two[:, :-1], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, -1], two[:, -1])


def test_another_label_space_is_refused(caplog):
    names = dict(enumerate("abcde"))
    Teacher(tiny_bert(seed=1, id2label=names), tiny_bert(id2label=names))
    Teacher(tiny_bert(seed=1), tiny_bert(id2label=names))  # default names say nothing
    swapped = names | {0: "b", 1: "a"}
    with pytest.raises(ValueError, match="same order"):
        Teacher(tiny_bert(seed=1, id2label=swapped), tiny_bert(id2label=names))
    with pytest.raises(ValueError, match="student's labels"):
        Teacher(tiny_bert(num_labels=4), tiny_bert())
    larger = tiny_llama()
    larger.resize_token_embeddings(101)
    with pytest.raises(ValueError, match="97 tokens"):
        Teacher(larger, tiny_llama())
    with pytest.raises(ValueError, match="same kind of model"):
        Teacher(tiny_bert(), tiny_llama())
    with pytest.raises(ValueError, match="same kind of model"):
        Teacher(tiny_bart(), tiny_llama())
    model = tiny_bert()
    with pytest.raises(ValueError, match="apart from the student"):
        Teacher(model, model)
    larger = tiny_bert()
    larger.resize_token_embeddings(101)
    with caplog.at_level(logging.WARNING):
        Teacher(larger, tiny_bert())
    assert "same token ids" in caplog.text


def test_a_teacher_named_in_the_arguments_must_be_given(tmp_path):
    args = arguments(tmp_path, LabelSmoothingArguments, distillation_teacher="some/model")
    with pytest.raises(ValueError, match="load_teacher"):
        LabelSmoothingTrainer(model=tiny_bert(), args=args)


REPORT = {"published": "smoothed", "smoothing": {"epsilon": 0.1}}
EVIDENCE = [
    ("calibration.json", json.dumps(REPORT | {"rows": [{"run": "smoothed", "epsilon": 0.1}]}), "epsilon = 0.1"),
    ("calibration.json", json.dumps(REPORT | {"rows": [{"run": "smoothed", "epsilon": 0.0}]}), None),
    ("calibration.json", json.dumps(REPORT | {"published": None, "rows": [{"epsilon": 0.0}, {"epsilon": 0.1}]}), "epsilon = 0.1"),
    ("settings.json", '{"label_smoothing_factor": 0.2}', "epsilon = 0.2"),
    ("settings.json", '{"label_smoothing_factor": 0.0}', None),
    ("config.json", '{"label_smoothing": 0.1}', "epsilon = 0.1"),
    ("calibration.json", "no json", None),
]


@pytest.mark.parametrize(("file", "text", "expected"), EVIDENCE)
def test_smoothed_teachers_are_recognised_by_their_files(tmp_path, file, text, expected):
    (tmp_path / file).write_text(text)
    found = smoothing_evidence(tmp_path)
    assert found == (None if expected is None else f"{expected} in {file}")


def test_the_first_file_which_states_an_epsilon_decides(tmp_path):
    (tmp_path / "settings.json").write_text('{"label_smoothing_factor": 0.0}')
    (tmp_path / "config.json").write_text('{"label_smoothing": 0.1}')
    assert smoothing_evidence(tmp_path) is None
    assert smoothing_evidence("nobody/no-such-model") is None
    assert smoothing_evidence("not a name", local_files_only=True) is None


def test_a_smoothed_teacher_is_warned_of(tmp_path, caplog):
    tiny_bert(seed=1).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), tf.AutoModelForSequenceClassification)
    with caplog.at_level(logging.WARNING):
        Teacher(teacher, tiny_bert())
        assert not caplog.messages
        (tmp_path / "settings.json").write_text('{"label_smoothing_factor": 0.1}')
        Teacher(teacher, tiny_bert())
    assert "epsilon = 0.1 in settings.json" in caplog.text
    assert "Müller" in caplog.text


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    def tokenizer(words):
        vocabulary = {word: i for i, word in enumerate(words)}
        return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")))

    tiny_bert().save_pretrained(tmp_path)
    tokenizer("abc").save_pretrained(tmp_path)
    load_teacher(str(tmp_path), tf.AutoModelForSequenceClassification, tokenizer("abc"))
    with pytest.raises(ValueError, match="student's vocabulary"):
        load_teacher(str(tmp_path), tf.AutoModelForSequenceClassification, tokenizer("acb"))


def test_the_student_learns_what_the_teacher_knows(tmp_path):
    """With α = 1 the labels do not count: the student ends at the teacher's probabilities, wrong labels or not."""
    teacher, rows = tiny_bert(seed=1).eval(), classification_rows()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
        q = teacher(**collate(rows.rows)).logits.softmax(-1)
    args = arguments(
        tmp_path, LabelSmoothingArguments, distillation_alpha=1.0, max_steps=60, learning_rate=3e-3, optim="adamw_torch",
        per_device_train_batch_size=8, logging_steps=60,
    )  # fmt: skip
    model = tiny_bert()
    LabelSmoothingTrainer(model=model, args=args, train_dataset=rows, data_collator=collate, teacher=teacher).train()
    with torch.no_grad():
        p = model.eval()(**collate(rows.rows)).logits.softmax(-1)
    assert float((p - q).abs().max()) < 0.05


def test_terms_keep_their_type():
    z, z_teacher, labels = logits_and_labels()
    terms = SmoothedTerms(*(part.float() for part in smoothed_terms(z, labels, Smoothing(0.0))))
    assert {part.dtype for part in Distillation().terms(terms, z.bfloat16(), z_teacher.bfloat16(), labels)} == {torch.float32}
