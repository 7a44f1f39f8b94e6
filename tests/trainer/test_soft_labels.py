"""Distributions as targets: loss and gradient in float64 by hand, in the dense path, without logits, and through the Trainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_model
from transformers import default_data_collator

from hf_ls.losses.cross_entropy import smoothed_cross_entropy, soft_target_terms
from hf_ls.losses.linear import linear_soft_target_cross_entropy
from hf_ls.losses.priors import soft_targets
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.arguments import LabelSmoothingArguments, without_smoothing
from hf_ls.trainer.mixin import LabelSmoothingTrainer


def drawn(n=7, k=5, d=4, seed=0):
    torch.manual_seed(seed)
    q = torch.distributions.Dirichlet(torch.ones(k, dtype=torch.float64)).sample((n,))
    q[0] = torch.eye(k, dtype=torch.float64)[2]  # one rater
    return (
        torch.randn(n, k, dtype=torch.float64),
        q,
        torch.randn(n, d, dtype=torch.float64),
        torch.randn(k, d, dtype=torch.float64),
    )


PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)


def by_hand(logits, q, epsilon, prior=None):
    u = torch.full_like(q, 1 / q.shape[-1]) if prior is None else prior.expand_as(q)
    return -(((1 - epsilon) * q + epsilon * u) * logits.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_loss_and_gradient_of_the_dense_path(epsilon, prior):
    logits, q, *_ = drawn()
    labels = q.argmax(-1)
    labels[3] = -100
    kept = labels != -100
    z = logits.clone().requires_grad_()
    terms = soft_target_terms(z, labels, q, Smoothing(epsilon, prior=prior))
    terms.loss.sum().backward()
    torch.testing.assert_close(terms.loss[kept], by_hand(logits, q, epsilon, prior)[kept], rtol=1e-12, atol=1e-12)
    u = torch.full_like(q, 0.2) if prior is None else prior.expand_as(q)
    gradient = (logits.softmax(-1) - (1 - epsilon) * q - epsilon * u) * kept[:, None]
    torch.testing.assert_close(z.grad, gradient, rtol=1e-12, atol=1e-12)
    assert terms.loss[3] == 0
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(terms.nll, hard)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "counted"])
@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_without_logits(epsilon, prior, reduction, weighted):
    _, q, hidden, weight = drawn()
    bias, given = torch.randn(5, dtype=torch.float64), (torch.rand(7, dtype=torch.float64) if weighted else None)
    options = {"reduction": "mean", "num_items_in_batch": 3.0} if reduction == "counted" else {"reduction": reduction}
    smoothing = Smoothing(epsilon, prior=prior)

    def run(loss):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        value = loss(*leaves)
        return value.detach(), torch.autograd.grad(value.sin().sum() if reduction == "none" else 2 * value, leaves)

    def dense(h, w, b):
        losses = smoothed_cross_entropy(1.5 * (h @ w.T + b), q, smoothing, reduction="none", smooth_soft_targets=True)
        losses = losses if given is None else losses * given
        if reduction in ("sum", "none"):
            return losses if reduction == "none" else losses.sum()
        return losses.sum() / (3.0 if reduction == "counted" else 7 if given is None else given.sum())

    ours = run(lambda h, w, b: linear_soft_target_cross_entropy(h, w, q, smoothing, bias=b, logit_scale=1.5, token_weight=given, chunk_rows=3, **options))  # fmt: skip
    theirs = run(dense)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_what_is_no_distribution_is_refused():
    logits, q, hidden, weight = drawn()
    for wrong in (2 * q, q - 0.1):
        with pytest.raises(ValueError, match="summing to 1"):
            soft_target_terms(logits, q.argmax(-1), wrong, Smoothing(0.0))
        with pytest.raises(ValueError, match="summing to 1"):
            linear_soft_target_cross_entropy(hidden, weight, wrong)
    with pytest.raises(ValueError, match="convention='all'"):
        soft_target_terms(logits, q.argmax(-1), q, Smoothing(0.1, "wrong"))
    with pytest.raises(ValueError, match="one distribution per hidden state"):
        linear_soft_target_cross_entropy(hidden, weight, q[:, :3])


def rated(n=24):
    torch.manual_seed(1)
    counts = torch.randint(0, 9, (n, 3)) + torch.eye(3, dtype=torch.int64)[torch.arange(n) % 3]
    q = soft_targets(counts)
    ids = torch.randint(5, 30, (n, 6))
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": q.argmax(-1).tolist(), "soft_labels": q.tolist()}), q  # fmt: skip


def trainer_for(folder, rows, **settings):
    settings = {
        "label_smoothing_soft_labels": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    } | settings
    args = LabelSmoothingArguments(str(folder), report_to="none", use_cpu=True, max_steps=1, **settings)
    return LabelSmoothingTrainer(tiny_model("bert", "BertForSequenceClassification", num_labels=3), args, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_trainer_minimises_the_cross_entropy_against_the_distributions(tmp_path, epsilon):
    rows, q = rated()
    trainer = trainer_for(tmp_path, rows, label_smoothing_factor=epsilon, allow_combined_softening=epsilon > 0)
    batch = {name: torch.tensor(rows[name][:8]) for name in ("input_ids", "attention_mask", "labels", "soft_labels")}
    trainer.model.train()
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, by_hand(logits, q[:8], epsilon).mean())
    trainer.train()
    logged = trainer.state.log_history[-1]
    assert logged["train_loss"] > 0


def test_evaluation_is_against_the_labels_and_against_the_distributions(tmp_path):
    rows, q = rated()
    for soft in (True, False):
        found = trainer_for(tmp_path, rows, label_smoothing_soft_labels=soft, per_device_eval_batch_size=5)
        metrics = found.evaluate()
        logits = torch.tensor(found.predict(rows).predictions).double()
        assert metrics["eval_soft_nll"] == pytest.approx(float(by_hand(logits, q.double(), 0).mean()), abs=1e-6)
        assert metrics["eval_soft_brier"] == pytest.approx(float((logits.softmax(-1) - q).square().sum(-1).mean()), abs=1e-6)
        hard = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["labels"][:]))
        assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(float(hard), abs=1e-6)


def test_a_batch_without_distributions_and_a_second_technique_are_refused(tmp_path):
    rows, _ = rated()
    with pytest.raises(ValueError, match="expected `soft_labels` in the batch"):
        trainer_for(tmp_path, rows.remove_columns("soft_labels")).train()
    with pytest.raises(ValueError, match=r"label smoothing .* and soft labels"):
        trainer_for(tmp_path, rows, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="'smoothed_ce' with soft labels, got 'focal'"):
        trainer_for(tmp_path, rows, label_smoothing_objective="focal", allow_combined_softening=True)
    with pytest.raises(TypeError, match="name soft targets `soft_labels`"):
        floats = rows.remove_columns("labels").rename_column("soft_labels", "labels")
        trainer_for(tmp_path, floats, label_smoothing_soft_labels=False).train()
    assert not without_smoothing(trainer_for(tmp_path, rows).args).label_smoothing_soft_labels
