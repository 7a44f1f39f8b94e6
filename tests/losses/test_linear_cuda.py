"""The choice of a GPU engine, and delegated kernels completed by the prior part."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_reference import (
    assert_same,
    gradients,
    prior_of,
    problem,
)
from torch import Tensor

from hf_ls.losses import _cuda as linear_cuda
from hf_ls.losses.linear import linear_smoothed_cross_entropy, linear_smoothed_terms
from hf_ls.losses.smoothing import Smoothing


@pytest.mark.parametrize("backend, device, unsupported, liger, operator, engine", [
    ("auto", "cpu", None, True, True, "chunks"),
    ("torch", "cpu", None, True, True, "chunks"),
    ("auto", "mps", None, True, True, "chunks"),
    ("auto", "cuda", None, True, True, "liger"),
    ("auto", "cuda", None, False, True, "torch"),
    ("auto", "cuda", None, False, False, "chunks"),
    ("auto", "cuda", "a soft-cap", True, True, "chunks"),
    ("torch", "cuda", None, True, True, "torch"),
    ("torch", "cuda", None, True, False, "chunks"),
    ("torch", "cuda", "a z-loss", True, True, "chunks"),
    ("liger", "cuda", None, True, False, "liger"),
])  # fmt: skip
def test_choice_of_engine(backend: Any, device: str, unsupported: str | None, liger: bool, operator: bool, engine: str) -> None:
    chosen = linear_cuda.choose_engine(backend, device, unsupported=unsupported, has_liger=liger, has_torch_operator=operator)
    assert chosen == engine


def test_liger_by_name_says_why_it_cannot_serve() -> None:
    for options, match in (
        ({"unsupported": "a soft-cap", "has_liger": True}, "a soft-cap"),
        ({"unsupported": None, "has_liger": False}, "pip install"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cuda.choose_engine("liger", "cuda", **options, has_torch_operator=True)  # type: ignore[arg-type]


def liger_stand_in(monkeypatch: pytest.MonkeyPatch, calls: list[dict]) -> None:
    """A module with Liger's function name and arguments, computing the same nll densely."""

    def liger_fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        logits = F.linear(hidden, weight, options["bias"])
        return F.cross_entropy(logits, labels, reduction=options["reduction"])

    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("engine", ["torch", "liger"])
@pytest.mark.parametrize("prior", ["uniform", "vector", "support"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "logit_scale": 0.4}])
def test_delegated_kernel_with_the_prior_outside_it(
    monkeypatch: pytest.MonkeyPatch, engine: str, prior: str, options: dict
) -> None:
    """torch's operator runs on a CPU too, so the delegation is checked with the real one; Liger has a stand-in."""
    if engine == "torch" and not linear_cuda.has_torch_operator():
        pytest.skip("this torch has no linear_cross_entropy")
    calls: list[dict] = []
    liger_stand_in(monkeypatch, calls)
    monkeypatch.setattr(linear_cuda, "choose_engine", lambda *args, **kwargs: engine)
    for smoothing in (
        Smoothing(0.2, prior=prior_of(prior)),
        Smoothing(0.2, "wrong", prior_of(prior)),
        Smoothing(0.0),
    ):
        assert_same(problem(), smoothing, 1e-12, **options)
        assert_same(problem(torch.float32, bias=False), smoothing, 1e-5, **options)
    assert bool(calls) == (engine == "liger")
    per_item = linear_smoothed_terms(**problem(), smoothing=0.2)
    monkeypatch.undo()
    wanted = linear_smoothed_terms(**problem(), smoothing=0.2)
    for got, want in zip(per_item, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_delegated_frozen_weight_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    liger_stand_in(monkeypatch, [])
    inputs = problem()
    inputs["weight"].requires_grad_(False)
    want = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    monkeypatch.setattr(linear_cuda, "choose_engine", lambda *args, **kwargs: "liger")
    got = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    for name, gradient in gradients(got, inputs).items():
        torch.testing.assert_close(gradient, gradients(want, inputs, retain_graph=True)[name])
    with torch.no_grad():
        torch.testing.assert_close(linear_smoothed_cross_entropy(**inputs, smoothing=0.1), want.detach())
