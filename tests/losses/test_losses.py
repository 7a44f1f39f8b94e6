"""The dense loss against torch in float64, by properties, and the stock traps by number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from hf_ls import (
    Objective,
    OnlineLabelSmoothing,
    Schedule,
    SmoothedCrossEntropy,
    Smoothing,
    linear_smoothed_cross_entropy,
    smoothed_cross_entropy,
)
from hf_ls.losses.adaptive import adaptive_smoothed_terms
from hf_ls.losses.cross_entropy import smoothed_terms
from hf_ls.losses.objectives import masked_objective
from hf_ls.losses.priors import support_prior

EXAMPLE = torch.tensor([[2, 0.5, -1], [0.1, 1.8, 0.2], [1.2, 0.7, 0.3], [0, -0.2, 2.4]])
EXAMPLE_LABELS = torch.tensor([0, 1, 0, 2])


def random_case(n=64, classes=7, seed=0, dtype=torch.float64, ignored=0.2):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, classes, generator=g, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return logits, labels


def value_and_grad(loss, logits):
    return loss.item(), torch.autograd.grad(loss, logits)[0]


def test_seed_example_loss():
    assert smoothed_cross_entropy(EXAMPLE, EXAMPLE_LABELS, 0.1).item() == pytest.approx(0.47310787, abs=1e-7)


def test_seed_example_gradient():
    p = torch.tensor([[0.05, 0.80, 0.05, 0.06, 0.04]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    _, gradient = value_and_grad(smoothed_cross_entropy(logits, torch.tensor([1]), 0.1), logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.03, -0.12, 0.03, 0.04, 0.02]], dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parity_with_torch_in_float64(epsilon, reduction):
    logits, labels = random_case()
    ours = smoothed_cross_entropy(logits, labels, epsilon, reduction=reduction)
    theirs = F.cross_entropy(logits, labels, label_smoothing=epsilon, reduction=reduction)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    g1, g2 = (torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs))
    torch.testing.assert_close(g1, g2, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("convention", ["all", "wrong"])
@pytest.mark.parametrize("kind", ["uniform", "vector", "matrix"])
def test_loss_is_the_cross_entropy_against_the_target(convention, kind):
    logits, labels = random_case(ignored=0)
    g = torch.Generator().manual_seed(1)
    shape = {"uniform": None, "vector": (7,), "matrix": (7, 7)}[kind]
    prior = None if shape is None else torch.rand(shape, generator=g, dtype=torch.float64).softmax(-1)
    smoothing = Smoothing(0.3, convention, prior=prior)
    by_hand = torch.stack([
        -(sum(smoothing.target(y[None], 7)[0, k].double() * z.log_softmax(-1)[k] for k in range(7)))
        for z, y in zip(logits, labels, strict=True)
    ]).mean()  # fmt: skip
    assert smoothed_cross_entropy(logits, labels, smoothing).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("convention", ["all", "wrong"])
def test_gradcheck(convention):
    logits, labels = random_case(n=5, classes=4)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    smoothing = Smoothing(0.2, convention, prior=prior)
    assert torch.autograd.gradcheck(lambda z: smoothed_cross_entropy(z, labels, smoothing), (logits,))
    assert torch.autograd.gradgradcheck(lambda z: smoothed_cross_entropy(z, labels, smoothing), (logits,))


def test_terms_are_the_hard_nll_and_the_rest():
    logits, labels = random_case()
    terms = smoothed_terms(logits, labels, Smoothing(0.1))
    nll = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(terms.nll, nll)
    torch.testing.assert_close(terms.loss, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none"))
    zero = smoothed_terms(logits, labels, Smoothing(0.0))
    assert torch.equal(zero.nll, terms.nll)
    assert not zero.smoothing_term.any()


def test_masking_equals_slicing():
    logits, labels = random_case()
    kept = labels != -100
    masked, sliced = (smoothed_cross_entropy(logits[i], labels[i], 0.1) for i in (slice(None), kept))
    assert masked.item() == sliced.item()
    gradient = torch.autograd.grad(masked, logits)[0]
    assert not gradient[~kept].any()


def test_split_batch_equals_whole_batch():
    logits, labels = random_case()
    count = (labels != -100).sum()
    whole = smoothed_cross_entropy(logits, labels, 0.1)
    parts = [smoothed_cross_entropy(logits[i : i + 9], labels[i : i + 9], 0.1, num_items_in_batch=count) for i in range(0, 64, 9)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(sum(parts), logits, retain_graph=True)[0], torch.autograd.grad(whole, logits)[0]
    )


def test_permuting_classes_and_rows_changes_nothing():
    logits, labels = random_case()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    position = order.argsort()
    renamed = torch.where(labels == -100, labels, position[labels.clamp_min(0)])
    whole = smoothed_cross_entropy(logits, labels, 0.1)
    assert smoothed_cross_entropy(logits[:, order], renamed, 0.1).item() == pytest.approx(whole.item(), rel=1e-12)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    assert smoothed_cross_entropy(logits[rows], labels[rows], 0.1).item() == pytest.approx(whole.item(), rel=1e-12)


def test_shift_of_all_logits_changes_nothing():
    logits, labels = random_case()
    assert smoothed_cross_entropy(logits + 5, labels, 0.1).item() == pytest.approx(
        smoothed_cross_entropy(logits, labels, 0.1).item()
    )


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2)])
def test_shapes(shape):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(*shape, 5, generator=g), torch.randint(0, 5, shape, generator=g)
    expected = F.cross_entropy(logits.reshape(-1, 5), labels.reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.1), expected)
    assert smoothed_cross_entropy(logits, labels, 0.1, reduction="none").shape == shape


INTEGERS = [
    getattr(torch, name)
    for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
]
WIDTH = 3
LOSSES = {
    "smoothed_cross_entropy": lambda z, y: smoothed_cross_entropy(z, y, 0.1, reduction="none"),
    "class weights": lambda z, y: smoothed_cross_entropy(z, y, 0.1, class_weight=torch.arange(1.0, z.shape[-1] + 1)),
    "smoothed_terms": lambda z, y: smoothed_terms(z, y, Smoothing(0.1, "wrong")).loss,
    "module": lambda z, y: SmoothedCrossEntropy(0.1)(z, y),
    "module, shifted": lambda z, y: SmoothedCrossEntropy(0.1, shift=True)(z.unsqueeze(0), y.unsqueeze(0)),
    "linear": lambda z, y: linear_smoothed_cross_entropy(z[:, :WIDTH], z[:, :WIDTH].new_ones(z.shape[1], WIDTH), y, 0.1),
    "objective": lambda z, y: masked_objective(Objective("maxsup"), z, y, Smoothing(0.0)),
    "objective per row": lambda z, y: Objective("graduated")(
        z[y.long() >= 0], y.long()[y.long() >= 0].to(y.dtype), Smoothing(0.0)
    ),
    "adaptive": lambda z, y: adaptive_smoothed_terms(z, y, Smoothing()).loss,
    "online": lambda z, y: OnlineLabelSmoothing(z.shape[-1])(z, y),
    "target": lambda z, y: Smoothing(0.1).target(y[y.long() >= 0].clone(), z.shape[-1]),
    "support": lambda z, y: support_prior(y[y.long() >= 0].clone(), z.shape[-1]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("classes", [5, 200, 300])
def test_every_integer_type_of_labels_gives_the_numbers_of_int64(name, dtype, classes):
    """In 8 bits 156 is −100 and a comparison with K = 300 wraps around."""
    largest = min(classes - 1, torch.iinfo(dtype).max)
    labels = torch.tensor([largest, 0, min(156, largest), 2])
    if torch.iinfo(dtype).min < 0:
        labels[1] = -100
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LOSSES[name](logits, labels.to(dtype)), LOSSES[name](logits, labels))


@pytest.mark.skipif(not hasattr(torch, "uint64"), reason="this torch has no uint64")
def test_a_label_which_int64_cannot_hold_is_refused():
    labels = torch.tensor([2**64 - 100, 1], dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"labels below 2\^63, got 18446744073709551516"):
        smoothed_cross_entropy(torch.zeros(2, 3), labels, 0.1)


def test_trap_09_half_precision_is_computed_in_float32():
    logits, labels = random_case(n=512, classes=2000, dtype=torch.bfloat16, ignored=0)
    exact = F.cross_entropy(logits.double(), labels, label_smoothing=0.1)
    ours = smoothed_cross_entropy(logits, labels, 0.1)
    stock = LabelSmoother(0.1)({"logits": logits}, labels)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact.item()) < 1e-5 < 1e-4 < abs(stock.item() - exact.item())


def test_trap_09_fp16_sums_do_not_overflow():
    g = torch.Generator().manual_seed(0)
    logits, labels = (torch.randn(8192, 64, generator=g) * 8).half(), torch.randint(0, 64, (8192,), generator=g)
    assert torch.isinf(LabelSmoother(0.1)({"logits": logits}, labels))
    exact = F.cross_entropy(logits.double(), labels, label_smoothing=0.1).item()
    assert smoothed_cross_entropy(logits, labels, 0.1).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_trap_09_all_ignored_is_a_differentiable_zero(epsilon):
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.full((3,), -100)
    assert torch.isnan(F.cross_entropy(logits, labels, label_smoothing=epsilon))
    for count in (None, 0, torch.tensor(0), 7):
        loss, gradient = value_and_grad(smoothed_cross_entropy(logits, labels, epsilon, num_items_in_batch=count), logits)
        assert loss == 0.0
        assert not gradient.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nothing_of_an_ignored_row_reaches_the_gradient(bad):
    logits, labels = random_case()
    clean, clean_gradient = value_and_grad(smoothed_cross_entropy(logits, labels, 0.1), logits)
    spoilt = logits.detach().masked_fill((labels == -100).unsqueeze(-1), bad).requires_grad_()
    loss, gradient = value_and_grad(smoothed_cross_entropy(spoilt, labels, 0.1), spoilt)
    assert loss == clean
    assert torch.equal(gradient, clean_gradient)


def test_empty_batch_is_a_differentiable_zero():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss, gradient = value_and_grad(smoothed_cross_entropy(logits, torch.zeros(0, dtype=torch.long), 0.1), logits)
    assert (loss, gradient.shape) == (0.0, (0, 4))


def test_trap_09_minus_infinity_outside_the_support_is_exactly_the_smaller_problem():
    logits, labels = random_case(ignored=0)
    labels = labels.clamp_max(4)
    support = torch.tensor([0.2] * 5 + [0.0, 0.0], dtype=torch.float64)
    hidden = torch.zeros(7, dtype=torch.bool).index_fill(0, torch.tensor([5, 6]), True)
    loss, gradient = value_and_grad(
        smoothed_cross_entropy(logits.masked_fill(hidden, float("-inf")), labels, Smoothing(0.1, prior=support)), logits
    )
    small, small_gradient = value_and_grad(smoothed_cross_entropy(logits[:, :5], labels, 0.1), logits)
    assert loss == pytest.approx(small, rel=1e-12)
    torch.testing.assert_close(gradient, small_gradient)


def test_trap_09_minus_infinity_inside_the_support_names_the_remedy():
    logits, labels = random_case(ignored=0)
    labels = labels.clamp_max(4)
    hidden = torch.zeros(7, dtype=torch.bool).index_fill(0, torch.tensor([6]), True)
    masked = logits.masked_fill(hidden, float("-inf"))
    assert torch.isinf(LabelSmoother(0.1)({"logits": masked}, labels))
    with pytest.raises(ValueError, match="prior"):
        smoothed_cross_entropy(masked, labels, 0.1)
    assert torch.isfinite(smoothed_cross_entropy(masked, labels, 0.0))


@pytest.mark.parametrize("bad", [-1, 7, -99, 100])
def test_trap_09_labels_out_of_range_raise(bad):
    logits, labels = random_case()
    labels[3] = bad
    with pytest.raises(ValueError, match=rf"labels in \[0, 7\) or -100 .* got {bad}"):
        smoothed_cross_entropy(logits, labels, 0.1)


@pytest.mark.stock
def test_trap_09_the_stock_smoother_trains_class_0_on_minus_one():
    logits, _ = random_case(ignored=0)
    stock = LabelSmoother(0.1)
    minus, zero = (stock({"logits": logits}, torch.full((64,), y)) for y in (-1, 0))
    assert minus.item() == zero.item()


def test_another_ignore_index():
    logits, labels = random_case()
    other = labels.masked_fill(labels == -100, 6)
    torch.testing.assert_close(
        smoothed_cross_entropy(logits, other, 0.1, ignore_index=6),
        F.cross_entropy(logits, other, label_smoothing=0.1, ignore_index=6),
    )


def test_class_weights_count_examples_and_leave_the_target_alone():
    logits, labels = random_case()
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6, 7], dtype=torch.float64)
    losses = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    w = torch.where(labels == -100, 0, weight[labels.clamp_min(0)])
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.1, class_weight=weight), (losses * w).sum() / w.sum())


def test_class_weights_leave_the_optimum_where_it_is_and_torchs_do_not():
    rare = torch.tensor([1.0, 99.0], dtype=torch.float64)

    def optimum(loss):
        z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

        def closure():
            optimizer.zero_grad()
            value = loss(z, torch.tensor([0]))
            value.backward()
            return value

        optimizer.step(closure)
        return z.softmax(-1)[0, 0].item()

    def torchs(z, y):
        return F.cross_entropy(z, y, weight=rare, label_smoothing=0.1, reduction="sum")

    ours = optimum(lambda z, y: smoothed_cross_entropy(z, y, 0.1, class_weight=rare, reduction="sum"))
    assert ours == pytest.approx(0.95, abs=1e-5)
    assert optimum(torchs) == pytest.approx(0.161, abs=1e-3)


def test_soft_targets_need_epsilon_zero_or_the_switch():
    logits, _ = random_case(ignored=0)
    soft = torch.rand(64, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, soft, 0.0), F.cross_entropy(logits, soft))
    with pytest.raises(ValueError, match="smooth_soft_targets=True"):
        smoothed_cross_entropy(logits, soft, 0.1)
    twice = smoothed_cross_entropy(logits, soft, 0.1, smooth_soft_targets=True)
    torch.testing.assert_close(twice, F.cross_entropy(logits, soft, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("labels", "kwargs", "error", "match"),
    [
        (torch.zeros(4), {}, ValueError, "integer labels"),
        (torch.ones(4, 3), {}, ValueError, "summing to 1"),
        (torch.zeros(4, dtype=torch.bool), {}, TypeError, "integer labels"),
        (torch.zeros(4, 1, dtype=torch.long), {}, ValueError, "one label per row"),
        (torch.zeros(3, dtype=torch.long), {}, ValueError, "one label per row"),
        (torch.zeros(4, dtype=torch.long), dict(reduction="avg"), ValueError, "reduction"),
        (torch.zeros(4, dtype=torch.long), dict(class_weight=torch.ones(2)), ValueError, r"class_weight \[3\]"),
        (torch.zeros(4, dtype=torch.long), dict(class_weight=torch.tensor([1.0, -1, 1])), ValueError, ">= 0"),
        (torch.zeros(4, dtype=torch.long), dict(reduction="sum", num_items_in_batch=4), ValueError, "reduction='mean'"),
    ],
)
def test_wrong_input_is_refused(labels, kwargs, error, match):
    with pytest.raises(error, match=match):
        smoothed_cross_entropy(torch.zeros(4, 3), labels, 0.0, **kwargs)


def test_unusable_logits_are_refused():
    y = torch.tensor([0])
    with pytest.raises(ValueError, match="NaN"):
        smoothed_cross_entropy(torch.tensor([[float("nan"), 0.0]]), y, 0.1)
    with pytest.raises(TypeError, match="floating-point"):
        smoothed_cross_entropy(torch.tensor([[1, 2]]), y, 0.1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        smoothed_cross_entropy(torch.zeros(1, 1), y, 0.1)


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: (z,), lambda z: SequenceClassifierOutput(logits=z)]
)
def test_module_takes_every_kind_of_output(wrap):
    logits, labels = random_case()
    torch.testing.assert_close(
        SmoothedCrossEntropy(0.1)(wrap(logits), labels), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )


def test_module_in_eval_mode_reports_the_plain_nll():
    logits, labels = random_case()
    torch.testing.assert_close(SmoothedCrossEntropy(0.1).eval()(logits, labels), F.cross_entropy(logits, labels))


def test_trap_06_the_module_asks_for_the_shift_of_sequences():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=g), torch.randint(0, 7, (2, 5), generator=g)
    with pytest.raises(ValueError, match="shift=True"):
        SmoothedCrossEntropy(0.1)(logits, labels)
    shifted = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(SmoothedCrossEntropy(0.1, shift=True)(logits, labels), shifted)
    straight = F.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(SmoothedCrossEntropy(0.1, shift=False)(logits, labels), straight)


def test_module_refuses_what_it_cannot_know():
    with pytest.raises(ValueError, match="labels"):
        SmoothedCrossEntropy(0.1)(torch.zeros(1, 2), None)
    with pytest.raises(ValueError, match="training step"):
        SmoothedCrossEntropy(Smoothing(0.1, schedule=Schedule("linear")))
    with pytest.raises(ValueError, match="`logits`"):
        SmoothedCrossEntropy(0.1)({"start_logits": torch.zeros(1, 2)}, torch.tensor([0]))
    with pytest.raises(TypeError, match="ModelOutput"):
        SmoothedCrossEntropy(0.1)(3, torch.tensor([0]))


def test_module_moves_and_prints_its_weights():
    loss = SmoothedCrossEntropy(0.1, class_weight=torch.tensor([1.0, 2.0])).double()
    assert loss.class_weight.dtype == torch.float64
    assert "epsilon=0.1" in repr(loss)
    assert not loss.state_dict()
