"""The Trainer in one process: exact accumulation, honest evaluation, refusals; the stock traps by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    Rows,
    arguments,
    classification_rows,
    collate,
    one_step,
    ours,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_distilbert,
    tiny_llama,
    tiny_modernbert,
    tiny_t5,
    token_rows,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingMixin, LabelSmoothingTrainer, SmoothedCrossEntropy, Smoothing

CLASSIFIERS = [tiny_bert, tiny_distilbert, tiny_modernbert]
GENERATORS = [(tiny_llama, token_rows), (tiny_t5, seq2seq_rows), (tiny_bart, seq2seq_rows)]
ALL = [(model, classification_rows) for model in CLASSIFIERS] + GENERATORS


def full_batch(model, rows, epsilon):
    """The model's own loss of all rows at once, or torch's smoothed one on its logits, and the gradient."""
    batch = collate(rows.rows)
    model.train()
    model.zero_grad()
    out = model(**batch)
    loss = out.loss
    if epsilon:
        causal = isinstance(model, tf.LlamaForCausalLM)
        logits, labels = (out.logits[:, :-1], batch["labels"][:, 1:]) if causal else (out.logits, batch["labels"])
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), label_smoothing=epsilon)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("make", "rows"), ALL, ids=lambda f: f.__name__)
def test_full_batch_is_the_models_own_loss_and_accumulation_changes_nothing(tmp_path, make, rows, epsilon):
    loss, gradient = full_batch(make(), rows(), epsilon)
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        record, step = one_step(
            LabelSmoothingTrainer, make(), rows(), tmp_path, LabelSmoothingArguments,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, label_smoothing_factor=epsilon,
        )  # fmt: skip
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert float((step - gradient).norm() / gradient.norm()) < 1e-5
        assert record["loss"] == pytest.approx(record["nll"] + record["smoothing_term"], rel=1e-6)
        assert (record["smoothing_term"] == 0) == (epsilon == 0)


@pytest.mark.parametrize("make", [tiny_bert, tiny_t5], ids=lambda f: f.__name__)
@pytest.mark.stock
def test_trap_01_stock_loss_and_gradient_grow_with_accumulation(tmp_path, make):
    rows = classification_rows() if make is tiny_bert else seq2seq_rows()
    once, g1 = one_step(tf.Trainer, make(), rows, tmp_path, per_device_train_batch_size=8)
    four, g4 = one_step(tf.Trainer, make(), rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    if four["loss"] == pytest.approx(once["loss"], rel=0.05):
        pytest.skip("this version of transformers has mended the loss at epsilon = 0 under gradient accumulation")
    assert four["loss"] / once["loss"] > 3.5
    assert float(g4.norm() / g1.norm()) > 3.5


def test_epsilon_zero_and_a_tiny_epsilon_agree(tmp_path):
    kwargs = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    (zero, g0), (tiny, g1) = (
        one_step(LabelSmoothingTrainer, tiny_bert(), classification_rows(), tmp_path, label_smoothing_factor=e, **kwargs)
        for e in (0.0, 1e-9)
    )
    assert zero["loss"] == pytest.approx(tiny["loss"], rel=1e-7)
    assert float((g0 - g1).norm() / g0.norm()) < 1e-6


def test_partial_last_accumulation_is_exact(tmp_path):
    """10 rows in micro-batches of 2 with 4 accumulation steps: the second step has one micro-batch only."""
    rows = classification_rows(10)
    trainer = ours(
        tmp_path, tiny_bert(), rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, learning_rate=0.0
    )
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    model = tiny_bert()
    for part, loss in zip((rows.rows[:8], rows.rows[8:]), losses, strict=True):
        assert model(**collate(part)).loss.item() == pytest.approx(loss, rel=1e-5)


def test_class_weights_are_exact_under_accumulation(tmp_path):
    weight, rows = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), classification_rows()
    batch = collate(rows.rows)
    losses = F.cross_entropy(tiny_bert()(**batch).logits, batch["labels"], label_smoothing=0.1, reduction="none")
    w = weight[batch["labels"]]
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path,
            LabelSmoothingArguments,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            label_smoothing_factor=0.1,
        )
        trainer = LabelSmoothingTrainer(
            model=tiny_bert(), args=args, train_dataset=rows, data_collator=collate, class_weight=weight
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(((losses * w).sum() / w.sum()).item(), rel=1e-5)


def test_trap_09_an_all_ignored_batch_trains_on_nothing(tmp_path):
    rows = token_rows((5, 6, 7, 8))
    rows.rows[0]["labels"][:] = -100
    trainer = ours(
        tmp_path,
        tiny_llama(),
        rows,
        per_device_train_batch_size=1,
        max_steps=2,
        label_smoothing_factor=0.1,
        logging_nan_inf_filter=False,
    )
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert math.isnan(losses[0])  # nothing was measured
    assert losses[1] > 4
    assert torch.isfinite(trainer.model.lm_head.weight).all()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_tokens_are_counted_right_when_the_first_micro_batch_has_no_label(tmp_path):
    rows = token_rows((5, 6, 7, 8))
    rows.rows[0]["labels"][:] = -100
    kwargs = dict(label_smoothing_factor=0.1, learning_rate=0.0)
    whole, _ = one_step(LabelSmoothingTrainer, tiny_llama(), rows, tmp_path, per_device_train_batch_size=4, **kwargs)
    parts, _ = one_step(
        LabelSmoothingTrainer,
        tiny_llama(),
        rows,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **kwargs,
    )
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_trap_14_compute_loss_func_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        LabelSmoothingTrainer(model=tiny_bert(), args=arguments(tmp_path), compute_loss_func=SmoothedCrossEntropy(0.1))


def test_stock_trainer_with_our_module_is_exact_under_accumulation(tmp_path):
    loss, gradient = full_batch(tiny_bert(), classification_rows(), 0.1)
    trainer = tf.Trainer(
        model=tiny_bert(), args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        train_dataset=classification_rows(), data_collator=collate, compute_loss_func=SmoothedCrossEntropy(0.1),
    )  # fmt: skip
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    step = before - torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert float((step - gradient).norm() / gradient.norm()) < 1e-5


def test_one_epsilon_only(tmp_path):
    args = arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="set only one"):
        LabelSmoothingTrainer(model=tiny_bert(), args=args, smoothing=Smoothing(0.2))
    args = arguments(tmp_path, LabelSmoothingArguments)
    trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, smoothing=Smoothing(0.2, "wrong"))
    assert (trainer.args.label_smoothing_factor, trainer.smoothing.convention, trainer.label_smoother) == (0.2, "wrong", None)


def test_convention_of_the_arguments_reaches_the_loss(tmp_path):
    kwargs = dict(per_device_train_batch_size=8, label_smoothing_convention="wrong")
    wrong, _ = one_step(
        LabelSmoothingTrainer,
        tiny_bert(),
        classification_rows(),
        tmp_path,
        LabelSmoothingArguments,
        label_smoothing_factor=0.1,
        **kwargs,
    )
    expected, _ = full_batch(tiny_bert(), classification_rows(), 0.125)
    assert wrong["loss"] == pytest.approx(expected, rel=1e-5)


def test_schedule_moves_epsilon_with_the_step(tmp_path):
    trainer = ours(
        tmp_path, tiny_bert(), classification_rows(), per_device_train_batch_size=8, max_steps=3, learning_rate=0.0,
        label_smoothing_factor=0.4, label_smoothing_schedule="linear",
    )  # fmt: skip
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["epsilon"] for r in records] == pytest.approx([0.4, 0.2, 0.0])
    terms = [r["smoothing_term"] for r in records]
    assert terms == pytest.approx([terms[0], terms[0] / 2, 0.0], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: tiny_bert(problem_type="multi_label_classification"), "multi_label"),
        (lambda: tiny_bert(problem_type="regression"), "regression"),
        (lambda: tiny_bert(num_labels=1), "num_labels"),
    ],
)
def test_trap_08_tasks_without_one_class_are_refused(tmp_path, model, match):
    for epsilon in (0.0, 0.1):
        with pytest.raises(ValueError, match=match):
            ours(tmp_path, model(), label_smoothing_factor=epsilon)


def test_trap_08_float_labels_are_refused(tmp_path):
    rows = classification_rows()
    for row in rows.rows:
        row["labels"] = row["labels"].float()
    with pytest.raises(TypeError, match="integer labels"):
        ours(tmp_path, tiny_bert(problem_type="single_label_classification"), rows).train()


@pytest.mark.parametrize("position", [0, 3])
def test_labels_out_of_range_stop_training(tmp_path, position):
    rows = classification_rows()
    rows.rows[position]["labels"] = torch.tensor(-1)
    with pytest.raises(ValueError, match=r"labels in \[0, 5\) or -100 for ignored, got -1"):
        ours(tmp_path, tiny_bert(), rows, per_device_train_batch_size=2, label_smoothing_factor=0.1, max_steps=4).train()


def test_missing_labels_name_the_column(tmp_path):
    rows = Rows([{("y" if k == "labels" else k): v for k, v in row.items()} for row in classification_rows().rows])
    with pytest.raises(ValueError, match="`labels` in the batch"):
        ours(tmp_path, tiny_bert(), rows).train()


class Net(torch.nn.Module):
    """A plain module without a config, whose loss is a cross entropy, or is not."""

    def __init__(self, factor: float = 1.0, gives_loss: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(97, 16), torch.nn.Linear(16, 5)
        self.factor, self.gives_loss = factor, gives_loss

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).mean(1))
        out = {"logits": logits}
        if labels is not None and self.gives_loss:
            out = {"loss": self.factor * F.cross_entropy(logits, labels), **out}
        return out


@pytest.mark.parametrize("gives_loss", [True, False])
def test_plain_modules_without_config_work(tmp_path, gives_loss):
    trainer = ours(
        tmp_path, Net(gives_loss=gives_loss), classification_rows(), label_smoothing_factor=0.1, per_device_train_batch_size=8
    )
    trainer.train()
    assert "smoothing_term" in trainer.state.log_history[0]
    assert "eval_ece" in trainer.evaluate()


def test_a_model_with_another_loss_is_refused_unless_the_user_says_so(tmp_path):
    with pytest.raises(ValueError, match="cross entropy of its logits"):
        ours(tmp_path, Net(factor=2.0), classification_rows()).train()
    args = arguments(tmp_path, LabelSmoothingArguments)
    LabelSmoothingTrainer(
        model=Net(factor=2.0), args=args, train_dataset=classification_rows(), data_collator=collate, shift_labels=False
    ).train()


def test_trap_06_the_shift_is_asked_of_the_model_not_of_its_name(tmp_path):
    class Renamed(tf.LlamaForCausalLM):
        pass

    renamed = Renamed(tiny_llama().config)
    renamed.load_state_dict(tiny_llama(sharpness=30).state_dict())
    loss, _ = full_batch(tiny_llama(sharpness=30), token_rows(), 0.1)
    kwargs = dict(per_device_train_batch_size=8, label_smoothing_factor=0.1, learning_rate=0.0)
    stock, _ = one_step(tf.Trainer, renamed, token_rows(), tmp_path, **kwargs)
    record, _ = one_step(LabelSmoothingTrainer, renamed, token_rows(), tmp_path, **kwargs)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    if stock["loss"] == pytest.approx(loss, rel=1e-3):
        pytest.skip("this version of transformers shifts the labels of subclasses")


def test_trap_07_router_loss_is_kept(tmp_path):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    config = tf.MixtralConfig(
        **sizes, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=1.0
    )
    model = tf.MixtralForCausalLM(config)
    own = model(**collate(token_rows((9, 9, 9, 9)).rows)).loss.item()
    record, _ = one_step(
        LabelSmoothingTrainer, model, token_rows((9, 9, 9, 9)), tmp_path, per_device_train_batch_size=4, learning_rate=0.0
    )
    assert record["loss"] == pytest.approx(own, rel=1e-5)
    assert record["loss"] - record["nll"] > 1


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart], ids=lambda f: f.__name__)
def test_trap_11_labels_alone_are_enough_for_encoder_decoders(tmp_path, make):
    rows = seq2seq_rows((7,) * 8)
    own = make().eval()(**collate(rows.rows)).loss.item()
    record, _ = one_step(
        LabelSmoothingTrainer,
        make(),
        rows,
        tmp_path,
        per_device_train_batch_size=8,
        label_smoothing_factor=1e-9,
        learning_rate=0.0,
    )
    assert record["loss"] == pytest.approx(own, rel=1e-5)


def test_mixin_works_in_a_users_own_trainer(tmp_path):
    class Mine(LabelSmoothingMixin, tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.seen = outputs.logits.shape
            return (loss, outputs) if return_outputs else loss

    expected, _ = full_batch(tiny_bert(), classification_rows(), 0.1)
    trainer = Mine(
        model=tiny_bert(), args=arguments(tmp_path, label_smoothing_factor=0.1, per_device_train_batch_size=8),
        train_dataset=classification_rows(), eval_dataset=classification_rows(3), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.seen == (8, 5)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_nll"]


def test_the_trainer_works_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert LabelSmoothingTrainer(model=tiny_bert()).smoothing.epsilon == 0


def test_arguments_survive_a_round_trip(tmp_path):
    args = LabelSmoothingArguments(str(tmp_path), label_smoothing_factor=0.1, label_smoothing_convention="wrong", report_to=[])
    again = LabelSmoothingArguments(
        **{k: v for k, v in args.to_dict().items() if k in ("output_dir", *(n for n in args.to_dict() if "smoothing" in n))}
    )
    assert (again.label_smoothing_factor, again.label_smoothing_convention) == (0.1, "wrong")
    for bad in (dict(label_smoothing_factor=1.0), dict(label_smoothing_convention="half"), dict(label_smoothing_schedule="step")):
        with pytest.raises(ValueError, match="expected"):
            LabelSmoothingArguments(str(tmp_path), **bad)
