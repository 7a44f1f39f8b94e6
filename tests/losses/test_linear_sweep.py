"""Random cases of the logits-free loss against dense float64: thousands in every run, more with `-m slow`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_reference import dense_loss, head_logits
from torch import Tensor

from hf_ls.losses.linear import linear_smoothed_cross_entropy
from hf_ls.losses.smoothing import Smoothing

# Largest error allowed relative to the largest entry; half precision rounds logits and gradients at 2^-9 or 2^-12.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@dataclass(frozen=True)
class Case:
    seed: int
    n: int
    width: int
    classes: int
    dtype: torch.dtype
    epsilon: float
    convention: str
    prior: str
    bias: bool
    logit_scale: float
    softcap: float | None
    z_loss: float
    weighted: bool
    reduction: str
    items: float | None
    chunk_rows: int | None
    ignored: float
    trained: frozenset[str]
    objective: bool


cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    n=st.integers(0, 14),
    width=st.integers(1, 7),
    classes=st.integers(2, 19),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    epsilon=st.sampled_from([0.0, 0.1, 0.1, 0.37, 0.9, -0.2]),
    convention=st.sampled_from(["all", "all", "wrong"]),
    prior=st.sampled_from(["uniform", "uniform", "vector", "sparse", "rows"]),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, None, None, 1.5, 30.0]),
    z_loss=st.sampled_from([0.0, 0.0, 1e-3, 0.1]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    items=st.sampled_from([None, None, 5, 7.5]),
    chunk_rows=st.sampled_from([None, 1, 2, 3, 8]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    trained=st.sampled_from([frozenset(s) for s in (("hidden", "weight", "bias"), ("hidden",), ("weight",), ("hidden", "bias"))]),
    objective=st.sampled_from([False, False, False, True]),
)


def random_prior(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.prior == "uniform":
        return None
    shape = (case.classes, case.classes) if case.prior == "rows" else (case.classes,)
    u = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01
    if case.prior == "sparse" and case.classes > 3:
        u[torch.rand(case.classes, generator=generator) < 0.5] = 0
        u[-3:] = 1
    return u / u.sum(-1, keepdim=True)


def check(case: Case) -> None:
    """The fused loss and its gradients, and the dense float64 ones of the same rounded inputs."""
    g = torch.Generator().manual_seed(case.seed)
    made = {
        "hidden": torch.randn(case.n, case.width, generator=g, dtype=torch.float64),
        "weight": torch.randn(case.classes, case.width, generator=g, dtype=torch.float64),
        "bias": torch.randn(case.classes, generator=g, dtype=torch.float64),
    }
    made = {name: t.to(case.dtype) for name, t in made.items() if case.bias or name != "bias"}
    labels = torch.randint(case.classes, (case.n,), generator=g)
    labels[torch.rand(case.n, generator=g) < case.ignored] = -100
    token_weight = (torch.rand(case.n, generator=g, dtype=torch.float64) * 3).floor() if case.weighted else None
    prior = random_prior(case, g)
    trained = sorted(case.trained & made.keys())
    leaves = {name: t.clone().requires_grad_(name in trained) for name, t in made.items()}
    exact = {name: t.double().requires_grad_(name in trained) for name, t in made.items()}

    shared: dict[str, Any] = {
        "token_weight": token_weight,
        "reduction": case.reduction,
        "z_loss": case.z_loss,
    }
    shared |= {"softcap": case.softcap, "logit_scale": case.logit_scale}
    if case.reduction == "mean":
        shared["num_items_in_batch"] = case.items
    smoothing = Smoothing(case.epsilon, case.convention, prior, allow_negative=True)  # type: ignore[arg-type]
    objective = squared_nll if case.objective else None
    got = linear_smoothed_cross_entropy(
        **leaves,
        labels=labels,
        smoothing=smoothing,
        chunk_rows=case.chunk_rows,
        objective=objective,
        **shared,
    )
    if case.objective:
        want = dense_objective(exact, labels, case, **shared)
    else:
        parts = {"epsilon": case.epsilon, "convention": case.convention, "prior": prior}
        want = dense_loss(**exact, labels=labels, **parts, **shared)
    assert got.shape == want.shape
    assert_near(got, want, case, "loss")
    upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
    found = torch.autograd.grad(got, [leaves[name] for name in trained], upstream.to(got.dtype))
    wanted = torch.autograd.grad(want, [exact[name] for name in trained], upstream)
    for name, a, b in zip(trained, found, wanted, strict=True):
        assert a.dtype == case.dtype
        assert_near(a, b, case, name)


def squared_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none").square()


def dense_objective(
    exact: dict[str, Tensor], labels: Tensor, case: Case, *, token_weight: Tensor | None, reduction: str, z_loss: float,
    num_items_in_batch: float | None = None, **head: Any,
) -> Tensor:  # fmt: skip
    logits = head_logits(exact["hidden"], exact["weight"], exact.get("bias"), **head)
    kept = (labels != -100).double()
    losses = squared_nll(logits, labels.clamp_min(0)) + z_loss * logits.logsumexp(1).square()
    weight = kept if token_weight is None else kept * token_weight
    losses = losses * weight
    if reduction == "none":
        return losses
    return losses.sum() / (num_items_in_batch or float(weight.sum()) or 1.0 if reduction == "mean" else 1.0)


def assert_near(got: Tensor, want: Tensor, case: Case, what: str) -> None:
    want = want.detach()
    assert torch.isfinite(got).all(), what
    # Half precision: the error of a sum follows the size of its terms, of which there are up to n.
    size = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    if case.dtype in (torch.bfloat16, torch.float16):
        size *= max(1.0, case.n**0.5) * max(1.0, case.logit_scale) * (10 if case.objective or case.z_loss else 3)
    error = (got.detach().double() - want).abs().max() if want.numel() else torch.zeros(())
    assert error <= TOLERANCE[case.dtype] * size, (what, float(error), size)


quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]


@given(cases)
@settings(max_examples=2500, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
def test_random_cases_equal_dense_float64(case: Case) -> None:
    check(case)


@pytest.mark.slow
@given(cases)
@settings(max_examples=22_000, deadline=None, database=None, suppress_health_check=quiet)
def test_many_random_cases_equal_dense_float64(case: Case) -> None:
    check(case)
