"""`Smoothing.from_system`: each system's published formula, written out here from its source, has our value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_ls import Smoothing, smoothed_cross_entropy

K, PAD = 7, 1


def torch_loss(z, y, e):
    return F.cross_entropy(z, y, label_smoothing=e, reduction="none")


def transformers_loss(z, y, e):
    """transformers.trainer_pt_utils.LabelSmoother."""
    log_p = -z.log_softmax(-1)
    return (1 - e) * log_p.gather(1, y[:, None])[:, 0] + e * log_p.mean(1)


def keras_loss(z, y, e):
    """keras.losses.CategoricalCrossentropy and optax.smooth_labels: y(1−e) + e/K."""
    target = F.one_hot(y, K) * (1 - e) + e / K
    return -(target * z.log_softmax(-1)).sum(1)


def fairseq_loss(z, y, e):
    """fairseq.criterions.label_smoothed_cross_entropy."""
    log_p, each = z.log_softmax(-1), e / (K - 1)
    return (1 - e - each) * -log_p.gather(1, y[:, None])[:, 0] + each * -log_p.sum(1)


def megatron_loss(z, y, e):
    """megatron.core.tensor_parallel.cross_entropy on one rank, and NeMo's SmoothedCrossEntropyLoss."""
    smoothing, log_p = e * K / (K - 1), z.log_softmax(-1)
    return (1 - smoothing) * -log_p.gather(1, y[:, None])[:, 0] - smoothing * log_p.mean(1)


def espnet_loss(z, y, e):
    """espnet's LabelSmoothingLoss: the divergence from the target, whose entropy has no gradient."""
    target = torch.full_like(z, e / (K - 1)).scatter(1, y[:, None], 1 - e)
    return F.kl_div(z.log_softmax(-1), target, reduction="none").sum(1) + entropy(e, K - 1)


def t5x_loss(z, y, e):
    """t5x.losses.compute_weighted_cross_entropy and tensor2tensor: less a normalizing constant."""
    low = e / (K - 1)
    target = F.one_hot(y, K) * (1 - e - low) + low
    normalizing = -((1 - e) * math.log(1 - e) + (K - 1) * low * math.log(low + 1e-20))
    return -(target * z.log_softmax(-1)).sum(1) - normalizing + entropy(e, K - 1)


def opennmt_loss(z, y, e):
    """onmt.utils.loss.LabelSmoothingLoss of OpenNMT-py 1 and 2."""
    target = torch.full_like(z, e / (K - 2)).scatter(1, y[:, None], 1 - e)
    target[:, PAD] = 0
    return F.kl_div(z.log_softmax(-1), target, reduction="none").sum(1) + entropy(e, K - 2)


def entropy(e, others):
    return -(1 - e) * math.log(1 - e) - e * math.log(e / others)


@pytest.mark.parametrize(
    ("system", "theirs"),
    [
        ("torch", torch_loss), ("liger", torch_loss), ("timm", transformers_loss), ("transformers", transformers_loss),
        ("keras", keras_loss), ("optax", keras_loss), ("fairseq", fairseq_loss), ("megatron", megatron_loss),
        ("nemo", megatron_loss), ("espnet", espnet_loss), ("t5x", t5x_loss), ("tensor2tensor", t5x_loss), ("opennmt", opennmt_loss),
    ],
)  # fmt: skip
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_the_loss_and_gradient_are_those_of_the_published_formula(system, theirs, epsilon):
    torch.manual_seed(0)
    z = torch.randn(50, K, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, *range(2, K)])[torch.randint(K - 1, (50,))]  # never padding
    extra = dict(num_classes=K, pad_token_id=PAD) if system == "opennmt" else {}
    smoothing = Smoothing.from_system(system, epsilon, **extra)
    ours = smoothed_cross_entropy(z, y, smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs(z, y, epsilon), rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, theirs(z, y, epsilon))]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_the_conventions_are_not_the_same():
    """What importing a number without its convention would change: ε = 0.1 of Megatron is 0.15 of PyTorch at K = 3."""
    assert Smoothing.from_system("megatron", 0.1).translate("all", 3).epsilon == pytest.approx(0.15)
    assert Smoothing.from_system("torch", 0.1).translate("wrong", 3).epsilon == pytest.approx(0.2 / 3)


@pytest.mark.parametrize(
    ("system", "extra", "sentence"),
    [
        ("marian", {}, "expected a system among"),
        ("opennmt", {}, "expected num_classes and pad_token_id with opennmt"),
        ("opennmt", dict(num_classes=7), "expected num_classes and pad_token_id with opennmt"),
        ("opennmt", dict(num_classes=7, pad_token_id=7), "expected 0 <= pad_token_id < num_classes"),
        ("torch", dict(num_classes=7, pad_token_id=1), "expected no num_classes or pad_token_id with torch"),
        ("torch", dict(pad_token_id=1), "expected no num_classes or pad_token_id with torch"),
    ],
)
def test_unknown_systems_and_wrong_arguments_are_refused(system, extra, sentence):
    with pytest.raises(ValueError, match=sentence):
        Smoothing.from_system(system, 0.1, **extra)
