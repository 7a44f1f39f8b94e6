"""Smoothing against its closed forms and against an optimiser that knows none of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hf_ls import Schedule, Smoothing


@pytest.mark.parametrize(
    ("classes", "convention", "gap"),
    [(2, "all", 2.944), (2, "wrong", 2.197), (10, "all", 4.511), (10, "wrong", 4.394), (32000, "all", 12.571)],
)
def test_optimal_logit_gap_is_the_published_number(classes, convention, gap):
    assert Smoothing(0.1, convention).optimal_logit_gap(classes) == pytest.approx(gap, abs=5e-4)


@pytest.mark.parametrize("convention", ["all", "wrong"])
def test_gap_and_ceiling_are_where_an_optimiser_ends(convention):
    smoothing = Smoothing(0.2, convention)
    logits = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
    target = smoothing.target(torch.tensor([3]), 7).double()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = -(target * logits.log_softmax(-1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    z = logits.detach()[0]
    assert float(z[3] - z[0]) == pytest.approx(smoothing.optimal_logit_gap(7), abs=1e-5)
    assert float(z.softmax(-1)[3]) == pytest.approx(smoothing.max_confidence(7), abs=1e-6)


def test_target_of_each_convention():
    labels = torch.tensor([[0, 2], [1, 1]])
    everywhere, wrong = Smoothing(0.3).target(labels, 3), Smoothing(0.3, "wrong").target(labels, 3)
    assert everywhere.shape == (2, 2, 3)
    torch.testing.assert_close(everywhere[0, 1], torch.tensor([0.1, 0.1, 0.8]))
    torch.testing.assert_close(wrong[0, 1], torch.tensor([0.15, 0.15, 0.7]))
    torch.testing.assert_close(everywhere.sum(-1), torch.ones(2, 2))


def test_wrong_convention_with_a_prior_keeps_exactly_one_minus_epsilon_on_the_label():
    prior = torch.tensor([0.5, 0.3, 0.2])
    target = Smoothing(0.1, "wrong", prior=prior).target(torch.tensor([0, 1, 2]), 3)
    torch.testing.assert_close(target.diagonal(), torch.full((3,), 0.9))
    torch.testing.assert_close(target[0, 1:], 0.1 * prior[1:] / 0.5)


def test_class_dependent_prior_uses_the_row_of_the_label():
    rows = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.2, 0.8, 0.0]])
    target = Smoothing(0.1, prior=rows).target(torch.tensor([0, 1, 2]), 3)
    torch.testing.assert_close(target, 0.9 * torch.eye(3) + 0.1 * rows)


@pytest.mark.parametrize("classes", [2, 3, 150])
def test_translate_keeps_the_target_and_comes_back(classes):
    smoothing = Smoothing(0.1, "wrong", schedule=Schedule("linear", final_epsilon=0.05))
    other = smoothing.translate(to="all", num_classes=classes)
    labels = torch.arange(classes)
    torch.testing.assert_close(other.target(labels, classes), smoothing.target(labels, classes))
    assert other.epsilon == pytest.approx(0.1 * classes / (classes - 1))
    back = other.translate(to="wrong", num_classes=classes)
    assert (back.epsilon, back.schedule.final_epsilon) == pytest.approx((0.1, 0.05))
    assert smoothing.translate(to="wrong", num_classes=classes) is smoothing


def test_translate_refuses_an_epsilon_beyond_one():
    with pytest.raises(ValueError, match="0 <= epsilon < 1"):
        Smoothing(0.6, "wrong").translate(to="all", num_classes=2)


def test_epsilon_zero_has_no_finite_gap():
    assert Smoothing(0.0).optimal_logit_gap(3) == math.inf
    assert Smoothing(0.0).max_confidence(3) == 1.0


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, 1.5, 2, float("nan"), float("inf")])
def test_trap_09_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(ValueError, match="0 <= epsilon < 1"):
        Smoothing(epsilon)


def test_negative_epsilon_needs_the_switch():
    assert Smoothing(-0.1, allow_negative=True).target(torch.tensor([0]), 2).tolist()[0] == pytest.approx([1.05, -0.05])
    with pytest.raises(ValueError, match="allow_negative=True"):
        Smoothing(-0.1)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (dict(epsilon="0.1"), TypeError, "number"),
        (dict(epsilon=True), TypeError, "number"),
        (dict(convention="All"), ValueError, "'all' or 'wrong'"),
        (dict(prior=[0.5, 0.5]), TypeError, "float tensor"),
        (dict(prior=torch.tensor([1, 0])), TypeError, "float tensor"),
        (dict(prior=torch.tensor([0.5, 0.6])), ValueError, "summing to 1"),
        (dict(prior=torch.tensor([1.5, -0.5])), ValueError, "summing to 1"),
        (dict(prior=torch.full((2, 3), 1 / 3)), ValueError, r"\[K\] or \[K, K\]"),
        (dict(schedule="linear"), TypeError, "Schedule"),
        (dict(schedule=Schedule("linear", final_epsilon=1.0)), ValueError, "0 <= epsilon < 1"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        Smoothing(**kwargs)


def test_prior_for_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="prior over 4 classes, got 2"):
        Smoothing(0.1, prior=torch.tensor([0.5, 0.5])).target(torch.tensor([0]), 4)


def test_one_value_questions_refuse_a_prior():
    smoothing = Smoothing(0.1, prior=torch.tensor([0.5, 0.5]))
    for question in (smoothing.max_confidence, smoothing.optimal_logit_gap):
        with pytest.raises(ValueError, match="uniform prior"):
            question(2)


def test_prior_all_on_the_label_has_no_wrong_class():
    with pytest.raises(ValueError, match="convention='all'"):
        Smoothing(0.1, "wrong", prior=torch.tensor([1.0, 0.0])).target(torch.tensor([0]), 2)


def test_labels_out_of_range_have_no_target():
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        Smoothing(0.1).target(torch.tensor([-100, 1]), 3)


def test_schedule_endpoints_and_monotony():
    linear, cosine = Schedule("linear", 0.0), Schedule("cosine", 0.02, warmup_steps=10)
    assert [round(linear.epsilon_at(0.1, s, 11), 6) for s in (0, 5, 10)] == [0.1, 0.05, 0.0]
    values = [cosine.epsilon_at(0.1, s, 100) for s in range(100)]
    assert values[:10] == [0.0] * 10
    assert (values[10], values[-1]) == pytest.approx((0.1, 0.02))
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert Schedule("constant", warmup_steps=5).epsilon_at(0.1, 4, 10) == 0
    assert Schedule("constant", warmup_steps=5).epsilon_at(0.1, 5, 10) == 0.1


def test_schedule_beyond_its_last_step_stays_at_the_end():
    assert Schedule("linear", 0.0).epsilon_at(0.1, 500, 100) == 0.0
    assert Schedule("linear", 0.0).epsilon_at(0.1, 0, 1) == 0.1


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant"):
        Schedule("exponential")
    with pytest.raises(ValueError, match="warmup_steps >= 0"):
        Schedule("linear", warmup_steps=-1)
