"""Every objective against an independent float64 formula; identities; rows and classes that must not leak."""

import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls.losses import objectives as ob
from hf_ls.losses.adaptive import OnlineLabelSmoothing
from hf_ls.losses.cross_entropy import smoothed_cross_entropy
from hf_ls.losses.objectives import COMBINES_WITH_EPSILON, OBJECTIVES, Objective, masked_objective
from hf_ls.losses.priors import confusion_prior, restrict_prior
from hf_ls.losses.smoothing import Schedule, Smoothing
from hf_ls.metrics.core import brier

K = 5
PLAIN = Smoothing(0.0)
UNIGRAM = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
MATRIX = confusion_prior(torch.arange(K * K).view(K, K) % 7)

# name, own parameters, smoothing; between them every objective, every convention and every kind of prior.
CASES = [
    ("smoothed_ce", {}, PLAIN),
    ("smoothed_ce", {}, Smoothing(0.1)),
    ("smoothed_ce", {}, Smoothing(0.2, "wrong")),
    ("smoothed_ce", {}, Smoothing(0.2, "wrong", prior=UNIGRAM)),
    ("smoothed_ce", {}, Smoothing(0.3, prior=MATRIX)),
    ("confidence_penalty", {}, PLAIN),
    ("confidence_penalty", {"beta": 2.0}, Smoothing(0.1, prior=UNIGRAM)),
    ("maxsup", {}, PLAIN),
    ("maxsup", {"alpha": 0.4}, Smoothing(0.0, prior=UNIGRAM)),
    ("maxsup", {"alpha": 0.4}, Smoothing(0.0, prior=MATRIX)),
    ("label_relaxation", {}, PLAIN),
    ("label_relaxation", {"alpha": 0.4}, PLAIN),
    ("margin_smoothing", {"margin": 1.0}, PLAIN),
    ("margin_smoothing", {"margin": 0.3, "alpha": 0.7}, Smoothing(0.0, prior=UNIGRAM)),
    ("focal", {}, PLAIN),
    ("focal", {"gamma": 0.5}, PLAIN),
    ("flsd", {}, PLAIN),
    ("flsd", {"gamma_low": 1.0, "gamma_high": 4.0, "threshold": 0.4}, PLAIN),
    ("generalised_smoothing", {}, Smoothing(-0.4, allow_negative=True)),
    ("generalised_smoothing", {}, Smoothing(-0.3, "wrong", prior=UNIGRAM, allow_negative=True)),
    ("generalised_smoothing", {"floor": 0.2}, Smoothing(-0.4, allow_negative=True)),
    ("generalised_smoothing", {}, Smoothing(0.2)),
    ("graduated", {}, PLAIN),
    ("graduated", {"thresholds": (0.2, 0.4, 0.9), "values": (0.0, 0.3, 0.1, 0.2)}, Smoothing(0.0, "wrong", prior=UNIGRAM)),
    ("instance", {}, PLAIN),
    ("instance", {"maximum": 0.6}, Smoothing(0.0, prior=MATRIX)),
    ("dft", {}, PLAIN),
    ("eaft", {}, PLAIN),
    ("eaft", {"alpha": 2.5, "top_k": 3}, PLAIN),
    ("brier", {}, PLAIN),
    ("brier", {}, Smoothing(0.2, "wrong", prior=UNIGRAM)),
    ("brier", {}, Smoothing(0.3, prior=MATRIX)),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
all_cases = pytest.mark.parametrize(("name", "params", "smoothing"), CASES, ids=IDS)


def _batch(n: int = 24, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, K, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(0, K, (n,), generator=generator)


def _reference(name: str, params: dict, smoothing: Smoothing, z: Tensor, y: Tensor) -> Tensor:
    """Textbook formulas with explicit targets and probabilities, reading only the fields of `Smoothing`."""
    num_classes = z.shape[-1]
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    hot = F.one_hot(y, num_classes).double()
    u = torch.full_like(z, 1 / num_classes)
    if smoothing.prior is not None:
        u = (smoothing.prior if smoothing.prior.dim() == 1 else smoothing.prior[y]).double().expand_as(z)
    if smoothing.convention == "wrong":
        wrong = u * (1 - hot)
        target = (1 - smoothing.epsilon) * hot + smoothing.epsilon * wrong / wrong.sum(-1, keepdim=True)
    else:
        target = (1 - smoothing.epsilon) * hot + smoothing.epsilon * u
    p_y = (p * hot).sum(-1)
    hard = -p_y.log()
    soft = -(target * p.log()).sum(-1)
    if name in ("graduated", "instance"):
        confidence = 1 + (p * p.log()).sum(-1) / math.log(num_classes) if name == "instance" else p_y
        if name == "instance":
            epsilon = params.get("maximum", 0.2) * confidence.detach()
        else:
            edges = torch.tensor(params.get("thresholds", (0.3, 0.7)), dtype=torch.float64)
            epsilon = torch.tensor(params.get("values", (0.0, 0.1, 0.3)), dtype=torch.float64)
            epsilon = epsilon[(confidence.detach().unsqueeze(-1) >= edges).sum(-1)]
        spread = u
        if smoothing.convention == "wrong":
            spread = u * (1 - hot) / (u * (1 - hot)).sum(-1, keepdim=True)
        target = (1 - epsilon).unsqueeze(-1) * hot + epsilon.unsqueeze(-1) * spread
        return -(target * p.log()).sum(-1)
    if name == "smoothed_ce":
        return soft
    if name == "brier":
        return ((p - target) ** 2).sum(-1)
    if name == "dft":
        return -p_y.detach() * p_y.log()
    if name == "eaft":
        share = p.detach().sort(-1, descending=True).values[:, : params.get("top_k", 20)]
        share = share / share.sum(-1, keepdim=True)
        gate = -(share * share.log()).sum(-1) / math.log(share.shape[-1])
        return -(gate ** params.get("alpha", 1)) * p_y.log()
    if name == "confidence_penalty":
        return soft + params.get("beta", 0.1) * (p * p.log()).sum(-1)
    if name == "maxsup":
        return hard + params.get("alpha", 0.1) * (u * (z.max(-1, keepdim=True).values - z)).sum(-1)
    if name == "label_relaxation":
        alpha = params.get("alpha", 0.1)
        share = (p * (1 - hot)).detach()
        nearest = (1 - alpha) * hot + alpha * share / share.sum(-1, keepdim=True)
        divergence = (nearest * (nearest.log() - p.log())).sum(-1)
        return torch.where(p_y >= 1 - alpha, 0 * p_y, divergence)
    if name == "margin_smoothing":
        excess = (z.max(-1, keepdim=True).values - z - params["margin"]).clamp_min(0)
        return hard + params.get("alpha", 0.1) * (u * excess).sum(-1)
    if name == "focal":
        return -((1 - p_y) ** params.get("gamma", 2)) * p_y.log()
    if name == "flsd":
        low, high = params.get("gamma_low", 5.0), params.get("gamma_high", 3.0)
        unlikely = p_y < params.get("threshold", 0.2)
        return -torch.where(unlikely, (1 - p_y) ** low, (1 - p_y) ** high) * p_y.log()
    return hard + (soft - hard).clamp_min(-params.get("floor", math.inf))


@all_cases
def test_values_and_gradients_are_those_of_the_formula(name, params, smoothing):
    logits, labels = _batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = Objective(name, **params)(ours, labels, smoothing)
    expected = _reference(name, params, smoothing, theirs, labels)
    # A float32 prior sums to 1 within 1e-7 only.
    exact = {"rtol": 1e-10, "atol": 1e-12} if smoothing.prior is None else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(losses, expected, **exact)
    weights = torch.randn(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((losses * weights).sum(), ours)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), theirs)
    torch.testing.assert_close(gradient, expected_gradient, **exact)


# The ε of "instance" and these weights move with the logits but are constants to the gradient, which a finite difference cannot
# know.
CONSTANTS = ("instance", "dft", "eaft")


@pytest.mark.parametrize(("name", "params", "smoothing"), [case for case in CASES if case[0] not in CONSTANTS])
def test_gradcheck(name, params, smoothing):
    logits, labels = _batch(6, seed=3)
    objective = Objective(name, **params)
    assert torch.autograd.gradcheck(lambda z: objective(z, labels, smoothing), logits.requires_grad_())


def test_the_table_has_every_objective():
    assert {name for name, _, _ in CASES} == set(OBJECTIVES)


MASKED_SHAPES = [(8,), (2, 4), (2, 2, 2), (1,), (0,), (3, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@all_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKED_SHAPES, ids=str)
def test_ignored_rows_and_minus_inf_classes_never_leak(name, params, smoothing, dtype, shape):
    """The masked problem over K+2 classes equals the sliced one; the masked part has gradient exactly 0."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(*shape, K, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, K, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.4
    # Two impossible classes around the real ones, so that every label and every prior entry moves.
    wide = F.pad(logits, (1, 1), value=-torch.inf)
    wide[ignored] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, torch.nan, 0.0, torch.inf], dtype=dtype)
    wide_labels = (labels + 1).masked_fill(ignored, -100)
    wide_smoothing = replace(smoothing, prior=_padded(smoothing.prior))
    wide.requires_grad_()
    objective = Objective(name, z_loss=0.01, **params)
    losses = masked_objective(objective, wide, wide_labels, wide_smoothing)
    assert losses.shape == shape
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    sliced = logits[~ignored].to(losses.dtype).clone().requires_grad_()
    expected = objective(sliced, labels[~ignored], smoothing)
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 and smoothing.prior is None else {}
    torch.testing.assert_close(losses[~ignored], expected, **tight)
    assert torch.equal(losses[ignored], torch.zeros_like(losses[ignored]))

    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), sliced)
    assert torch.isfinite(gradient).all()
    assert not gradient[ignored].any() and not gradient[..., [0, -1]].any()
    loose = {"rtol": 1e-2, "atol": 1e-3} if dtype in (torch.bfloat16, torch.float16) else {}
    real = gradient[~ignored][:, 1:-1].to(expected_gradient.dtype)
    torch.testing.assert_close(real, expected_gradient, **loose)


def _padded(prior: Tensor | None) -> Tensor:
    if prior is None:
        return F.pad(torch.full((K,), 1 / K, dtype=torch.float64), (1, 1))
    if prior.dim() == 1:
        return F.pad(prior, (1, 1))
    return restrict_prior(F.pad(prior, (1, 1, 1, 1)), range(1, K + 1))


@all_cases
def test_a_permutation_of_the_classes_permutes_the_gradient(name, params, smoothing):
    logits, labels = _batch(seed=7)
    order = torch.tensor([3, 0, 4, 1, 2])
    prior = smoothing.prior
    if prior is not None:
        prior = prior[order] if prior.dim() == 1 else prior[order][:, order]
    permuted = replace(smoothing, prior=prior)
    objective = Objective(name, **params)
    first, second = logits.clone().requires_grad_(), logits[:, order].clone().requires_grad_()
    losses = objective(first, labels, smoothing)
    permuted_losses = objective(second, order.argsort()[labels], permuted)
    torch.testing.assert_close(losses, permuted_losses)
    (gradient,) = torch.autograd.grad(losses.sum(), first)
    torch.testing.assert_close(gradient[:, order], torch.autograd.grad(permuted_losses.sum(), second)[0])


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_computed_in_float32(name, params, smoothing, dtype):
    logits, labels = _batch(dtype=dtype, scale=8.0)
    half, single = logits.clone().requires_grad_(), logits.float().requires_grad_()
    for objective in (Objective(name, z_loss=0.01, **params), partial(OBJECTIVES[name], **params)):
        losses, expected = objective(half, labels, smoothing), objective(single, labels, smoothing)
        assert losses.dtype == torch.float32 and torch.equal(losses, expected)
        # Rounded once: a second cast inside would round its share of the gradient on its own.
        (gradient,) = torch.autograd.grad(losses.sum(), half)
        assert torch.equal(gradient, torch.autograd.grad(expected.sum(), single)[0].to(dtype))


@all_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_and_tied_logits_have_finite_gradients(name, params, smoothing, dtype):
    logits = F.pad(200 * torch.eye(2, K, dtype=dtype), (0, 0, 0, 1)).requires_grad_()
    losses = Objective(name, **params)(logits, torch.tensor([0, 0, 2]), smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, dtype=dtype), atol=1e-4, rtol=0)


def _cross_entropy(logits, labels, epsilon=0.0):
    return F.cross_entropy(logits, labels, label_smoothing=epsilon, reduction="none")


IDENTITIES = {
    "confidence_penalty, beta 0": lambda z, y: ob.confidence_penalty(z, y, PLAIN, beta=0.0),
    "focal, gamma 0": lambda z, y: ob.focal(z, y, PLAIN, gamma=0.0),
    "flsd, both gammas 0": lambda z, y: ob.flsd(z, y, PLAIN, gamma_low=0.0, gamma_high=0.0),
    "label_relaxation, alpha 0": lambda z, y: ob.label_relaxation(z, y, PLAIN, alpha=0.0),
    "margin_smoothing, huge margin": lambda z, y: ob.margin_smoothing(z, y, PLAIN, margin=1e9),
    "margin_smoothing, infinite margin": lambda z, y: ob.margin_smoothing(z, y, PLAIN, margin=math.inf),
    "maxsup, alpha 0": lambda z, y: ob.maxsup(z, y, PLAIN, alpha=0.0),
    "eaft, alpha 0": lambda z, y: ob.eaft(z, y, PLAIN, alpha=0.0),
    "generalised_smoothing, epsilon 0": lambda z, y: ob.generalised_smoothing(z, y, PLAIN),
    "smoothed_ce, epsilon 0": lambda z, y: ob.smoothed_ce(z, y, PLAIN),
}


@pytest.mark.parametrize("identity", list(IDENTITIES))
def test_limits_are_the_cross_entropy(identity):
    logits, labels = _batch()
    logits.requires_grad_()
    losses, expected = IDENTITIES[identity](logits, labels), _cross_entropy(logits, labels)
    torch.testing.assert_close(losses, expected)
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
def test_smoothed_ce_is_torch_label_smoothing(epsilon):
    logits, labels = _batch()
    expected = _cross_entropy(logits, labels, epsilon)
    torch.testing.assert_close(ob.smoothed_ce(logits, labels, Smoothing(epsilon)), expected)
    torch.testing.assert_close(ob.generalised_smoothing(logits, labels, Smoothing(epsilon)), expected)


def test_maxsup_is_label_smoothing_where_the_label_has_the_top_logit():
    logits, _ = _batch()
    expected = _cross_entropy(logits, logits.argmax(-1), 0.3)
    torch.testing.assert_close(ob.maxsup(logits, logits.argmax(-1), PLAIN, alpha=0.3), expected)


def test_margin_smoothing_without_a_margin_is_maxsup():
    logits, labels = _batch()
    losses = ob.margin_smoothing(logits, labels, PLAIN, margin=0.0, alpha=0.3)
    torch.testing.assert_close(losses, ob.maxsup(logits, labels, PLAIN, alpha=0.3))


def test_label_relaxation_is_zero_with_zero_gradient_inside_the_credal_set():
    logits = torch.tensor([[5.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    losses = ob.label_relaxation(logits, torch.tensor([0, 0]), PLAIN, alpha=0.1)
    assert losses[0] == 0 and losses[1] > 0
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert not gradient[0].any() and gradient[1].abs().sum() > 0


def test_flsd_is_focal_on_each_side_of_its_threshold():
    logits, labels = _batch()
    p_y = logits.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    low = p_y < 0.2
    assert low.any() and (~low).any()
    losses = ob.flsd(logits, labels, PLAIN)
    torch.testing.assert_close(losses[low], ob.focal(logits, labels, PLAIN, gamma=5.0)[low])
    torch.testing.assert_close(losses[~low], ob.focal(logits, labels, PLAIN, gamma=3.0)[~low])


def test_dft_has_the_gradient_of_the_probability_of_the_label():
    logits, labels = _batch()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(ob.dft(logits, labels, PLAIN).sum(), logits)
    p_y = logits.softmax(-1).gather(1, labels.unsqueeze(1))
    torch.testing.assert_close(gradient, torch.autograd.grad(-p_y.sum(), logits)[0])


def test_eaft_is_within_its_bounds_and_that_of_its_authors():
    """Their code on 50 classes (LLaMA-Factory, 2026), where 3.0 stands for log 20."""
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    logits[0], logits[1] = 0, 80 * torch.eye(50)[7]
    labels = torch.arange(40)
    losses, nll = ob.eaft(logits, labels, PLAIN, alpha=0.5), _cross_entropy(logits, labels)
    log_p = torch.topk(logits, 20).values.log_softmax(-1)
    theirs = nll * (-(log_p.exp() * log_p).sum(-1) / 3.0) ** 0.5
    torch.testing.assert_close(losses * (math.log(20) / 3.0) ** 0.5, theirs)
    assert losses[0] == pytest.approx(math.log(50)) and losses[1] < 1e-12 < nll[1]
    assert torch.equal(ob.eaft(logits, labels, PLAIN, top_k=math.inf), ob.eaft(logits, labels, PLAIN, top_k=50))


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_brier_is_the_reported_score_and_its_smoothing_that_of_the_expected_score(epsilon):
    logits, labels = _batch(dtype=torch.float64)
    reported = brier(logits.softmax(-1).numpy(), labels.numpy())
    assert ob.brier_loss(logits, labels, PLAIN).mean().item() == pytest.approx(reported, rel=1e-12)
    each = torch.stack([ob.brier_loss(logits, torch.full_like(labels, k), PLAIN) for k in range(K)], 1)
    target = Smoothing(epsilon).target(labels, K, torch.float64)
    expected = (target * each).sum(1) - (1 - target.square().sum(1))
    torch.testing.assert_close(ob.brier_loss(logits, labels, Smoothing(epsilon)), expected)
    worst = ob.brier_loss(torch.tensor([[200.0, 0]]), torch.tensor([1]), PLAIN)
    assert worst.item() == 2


def test_z_loss_is_the_squared_normaliser_with_its_gradient():
    logits, _ = _batch()
    logits.requires_grad_()
    lse = logits.exp().sum(-1).log()
    torch.testing.assert_close(ob.z_loss(logits), lse**2)
    (gradient,) = torch.autograd.grad(ob.z_loss(logits).sum(), logits)
    torch.testing.assert_close(gradient, (2 * lse.unsqueeze(-1) * logits.softmax(-1)).detach())
    assert torch.autograd.gradcheck(ob.z_loss, logits)
    assert ob.z_loss(logits.bfloat16()).dtype == torch.float32


def test_generalised_smoothing_falls_without_bound_unless_it_has_a_floor():
    logits = torch.tensor([[1000.0, 0, 0, 0, 0]], requires_grad=True)
    negative = Smoothing(-0.4, allow_negative=True)
    unbounded = ob.generalised_smoothing(logits, torch.tensor([0]), negative)
    assert unbounded.item() == pytest.approx(-0.4 * 800)
    bounded = ob.generalised_smoothing(logits, torch.tensor([0]), negative, floor=3.0)
    assert bounded.item() == -3.0
    assert not torch.autograd.grad(bounded.sum(), logits)[0].any(), "beyond the floor only the nll pulls"


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - COMBINES_WITH_EPSILON))
def test_alternatives_to_smoothing_refuse_epsilon_and_name_the_remedy(name):
    logits, labels = _batch()
    with pytest.raises(ValueError, match=r"epsilon = 0 with \w+, got 0.1.*Smoothing\(0.0\)"):
        OBJECTIVES[name](logits, labels, Smoothing(0.1))
    with pytest.raises(ValueError, match=r"got 0.2"):
        ob.check_smoothing(name, Smoothing(0.0, schedule=Schedule("linear", final_epsilon=0.2)))


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"generalised_smoothing"}))
def test_only_generalised_smoothing_takes_a_negative_epsilon(name):
    logits, labels = _batch()
    with pytest.raises(ValueError, match="generalised_smoothing"):
        OBJECTIVES[name](logits, labels, Smoothing(-0.1, allow_negative=True))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_bad_rows_are_refused(name):
    objective = OBJECTIVES[name]
    with pytest.raises(ValueError, match="masked_objective"):
        objective(torch.zeros(2, K), torch.tensor([0, -100]), PLAIN)
    with pytest.raises(ValueError, match=r"labels in \[0, 5\)"):
        objective(torch.zeros(2, K), torch.tensor([0, K]), PLAIN)
    with pytest.raises(ValueError, match="masked_objective"):
        objective(torch.zeros(2, 3, K), torch.zeros(2, 3, dtype=torch.long), PLAIN)
    with pytest.raises(ValueError, match="finite logits"):
        objective(torch.full((1, K), torch.nan), torch.tensor([0]), PLAIN)
    if name in ("maxsup", "margin_smoothing"):
        with pytest.raises(ValueError, match="support_prior"):
            objective(torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([0]), PLAIN)
    with pytest.raises(ValueError, match="one label per row"):
        masked_objective(objective, torch.zeros(2, K), torch.zeros(3, dtype=torch.long), PLAIN)
    with pytest.raises(ValueError, match="got -1"):
        masked_objective(objective, torch.zeros(2, K), torch.tensor([-1, -100]), PLAIN)


def test_masked_objective_with_smoothed_ce_is_smoothed_cross_entropy():
    logits, labels = _batch()
    smoothing = Smoothing(0.2, "wrong", prior=UNIGRAM)
    losses = masked_objective(ob.smoothed_ce, logits, labels.int(), smoothing, ignore_index=3)
    expected = smoothed_cross_entropy(logits, labels, smoothing, ignore_index=3, reduction="none")
    torch.testing.assert_close(losses, expected)


def test_masked_objective_with_everything_ignored_is_a_differentiable_zero():
    logits = torch.full((2, 3, K), torch.nan, requires_grad=True)
    loss = masked_objective(Objective("focal"), logits, torch.full((2, 3), -100), PLAIN).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not gradient.any()


def test_objective_has_the_papers_defaults():
    assert {name: dict(Objective(name).params) for name in OBJECTIVES} == {
        "smoothed_ce": {},
        "confidence_penalty": {"beta": 0.1},
        "maxsup": {"alpha": 0.1},
        "label_relaxation": {"alpha": 0.1},
        "margin_smoothing": {"margin": 10.0, "alpha": 0.1},
        "focal": {"gamma": 2.0},
        "flsd": {"gamma_low": 5.0, "gamma_high": 3.0, "threshold": 0.2},
        "generalised_smoothing": {"floor": math.inf},
        "graduated": {"thresholds": (0.3, 0.7), "values": (0.0, 0.1, 0.3)},
        "instance": {"maximum": 0.2},
        "dft": {},
        "eaft": {"alpha": 1.0, "top_k": 20},
        "brier": {},
    }


@all_cases
def test_objective_survives_pickle_and_prints_as_its_call(name, params, smoothing):
    objective = Objective(name, z_loss=1e-4, **params)
    copy = pickle.loads(pickle.dumps(objective))
    assert copy == objective and hash(copy) == hash(objective)
    assert eval(repr(objective), {"Objective": Objective, "inf": math.inf}) == objective
    logits, labels = _batch()
    assert torch.equal(copy(logits, labels, smoothing), objective(logits, labels, smoothing))


def test_objective_is_frozen_and_compares_by_value():
    assert Objective("focal") == Objective("focal", gamma=2.0) != Objective("focal", gamma=3.0)
    with pytest.raises(AttributeError):
        Objective("focal").name = "flsd"


# name -> a misspelt parameter with the nearest name, a value out of range with the message, a value of a wrong type
WRONG = {
    "smoothed_ce": ({"zloss": 1.0}, "z_loss", {"z_loss": -1.0}, r"z_loss in \[0, inf\), got -1.0", {"z_loss": None}),
    "confidence_penalty": ({"betta": 1.0}, "beta", {"beta": -0.1}, r"beta in \[0, inf\), got -0.1", {"beta": "0.1"}),
    "maxsup": ({"alpah": 0.3}, "alpha", {"alpha": math.inf}, r"alpha in \[0, inf\), got inf", {"alpha": True}),
    "label_relaxation": ({"alfa": 0.3}, "alpha", {"alpha": 1.0}, r"alpha in \[0, 1\), got 1.0", {"alpha": [0.1]}),
    "margin_smoothing": ({"margins": 1.0}, "margin", {"margin": -1.0}, r"margin in .*, got -1.0", {"margin": "10"}),
    "focal": ({"gama": 1.0}, "gamma", {"gamma": math.nan}, r"gamma in \[0, inf\), got nan", {"gamma": "2"}),
    "flsd": ({"treshold": 1.0}, "threshold", {"threshold": 1.1}, r"threshold in \[0, 1\], got 1.1", {"gamma_low": {}}),
    "generalised_smoothing": ({"flor": 1.0}, "floor", {"floor": 0.0}, r"floor > 0, got 0.0", {"floor": "inf"}),
    "graduated": ({"value": (0.0,)}, "values", {"thresholds": (0.7, 0.3)}, r"increasing .*, got \(0.7, 0.3\)", {"thresholds": 0.5}),
    "instance": ({"maximun": 0.1}, "maximum", {"maximum": 1.5}, r"maximum in \[0, 1\], got 1.5", {"maximum": (0.2,)}),
    "dft": ({"zloss": 1.0}, "z_loss", {"z_loss": -1.0}, r"z_loss in \[0, inf\), got -1.0", {"z_loss": "0"}),
    "eaft": ({"topk": 5}, "top_k", {"top_k": 2.5}, r"top_k as a whole number, got 2.5", {"top_k": "20"}),
    "brier": ({"zloss": 1.0}, "z_loss", {"z_loss": -1.0}, r"z_loss in \[0, inf\), got -1.0", {"z_loss": None}),
    "online": ({"alpah": 0.3}, "alpha", {"alpha": 1.1}, r"alpha in \[0, 1\], got 1.1", {"alpha": "0.5"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ob.NAMES)
def test_every_objective_refuses_wrong_parameters_when_it_is_made(name):
    misspelt, nearest, outside, sentence, mistyped = WRONG[name]
    with pytest.raises(ValueError, match=f"got {next(iter(misspelt))!r}; did you mean {nearest!r}"):
        ob.settle(name, misspelt)
    with pytest.raises(ValueError, match=sentence):
        ob.settle(name, outside)
    with pytest.raises(TypeError, match=f"{next(iter(mistyped))} as a (number|list of numbers), got"):
        ob.settle(name, mistyped)


@pytest.mark.parametrize(
    ("objective", "params", "error", "text"),
    [
        ("focl", {}, ValueError, "did you mean 'focal'"),
        ("onlin", {}, ValueError, "did you mean 'online'"),
        ("label_smoothing", {}, ValueError, "expected an objective in"),
        (3, {}, TypeError, "name of an objective, got int 3"),
        (None, {}, TypeError, "name of an objective, got NoneType"),
        ("focal", ["gamma", 3], TypeError, "as a mapping, got list"),
        (Objective("focal"), {"gamma": 3.0}, ValueError, "no parameters beside Objective.*'gamma': 3.0"),
        (OnlineLabelSmoothing(3), {"alpha": 0.3}, ValueError, "no parameters beside OnlineLabelSmoothing"),
        ("graduated", {"values": (0.0, 0.1)}, ValueError, r"3 values .*, got \(0.0, 0.1\)"),
        ("graduated", {"values": ("a", 0.1, 0.2)}, TypeError, "list of numbers"),
    ],
)  # fmt: skip
def test_settle_refuses(objective, params, error, text):
    with pytest.raises(error, match=text):
        ob.settle(objective, params)


def test_settle_gives_what_was_asked_for():
    assert ob.settle("graduated", {"thresholds": [0.5], "values": [0, 0.2]}) == Objective(
        "graduated", thresholds=(0.5,), values=(0, 0.2)
    )
    made = Objective("focal", gamma=3.0)
    assert ob.settle(made) is made and ob.settle(made, {}) is made
    online = ob.settle("online", {"alpha": 0.25}).build(4)
    assert (online.num_classes, online.alpha) == (4, 0.25)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_terms_are_the_nll_and_the_rest_of_the_loss(name):
    logits, labels = _batch()
    labels[::5] = -100
    smoothing = Smoothing(0.2) if name in COMBINES_WITH_EPSILON else PLAIN
    objective = Objective(name, z_loss=0.01)
    terms = objective.terms(logits, labels, smoothing)
    torch.testing.assert_close(terms.nll, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(terms.loss, masked_objective(objective, logits, labels, smoothing))
