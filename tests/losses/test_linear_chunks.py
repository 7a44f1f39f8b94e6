"""The chunk loop: what it allocates, how many matmuls it takes, how it rounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from linear_reference import (
    Matmuls,
    dense_losses,
    doubled,
    gradients,
    problem,
)

from hf_ls.losses._chunks import PriorRow, default_chunk_rows
from hf_ls.losses._rows import RowLoss
from hf_ls.losses.linear import linear_smoothed_cross_entropy
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Smoothing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"z_loss": 0.1},
        {"objective": lambda z, y: F.cross_entropy(z, y, reduction="none")},
        *({"objective": partial(Objective(name), smoothing=Smoothing(0.0))} for name in ("dft", "eaft", "brier")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_builds_the_logits(options: dict, dtype: torch.dtype) -> None:
    n, k = 900, 400
    inputs = problem(dtype, n=n, k=k) | {"labels": torch.arange(n) % k}
    with Matmuls() as dense:
        F.cross_entropy(F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]), inputs["labels"]).backward()
    with Matmuls() as fused:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=100, **options).backward()
    assert dense.largest >= n * k
    assert fused.largest <= 128 * k  # 100 rows, one for the prior, padded to a multiple of 32 in half precision


def test_default_chunks_are_balanced() -> None:
    assert default_chunk_rows(100_000, 512, torch.float32, False) == 384
    assert default_chunk_rows(2048, 512, torch.bfloat16, False) == 512
    assert default_chunk_rows(400, 512, torch.float32, False) == 224  # two alike, not one of 384 and one of 16
    # Half precision rounds dW at each chunk: 16 longer chunks, as long as one is no larger than dW.
    assert default_chunk_rows(16_000, 4096, torch.bfloat16, True) == 1024
    assert default_chunk_rows(16_000, 256, torch.bfloat16, True) == 512


@pytest.mark.parametrize("reduction, trained, matmuls", [
    ("mean", ("hidden", "weight"), 3),
    ("mean", ("hidden",), 2),
    ("mean", ("weight",), 2),
    ("none", ("hidden",), 2),
    ("none", ("hidden", "weight"), 4),
])  # fmt: skip
def test_matmuls_per_chunk(reduction: str, trained: tuple[str, ...], matmuls: int) -> None:
    inputs = problem(bias=False)
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_(name in trained)
    with Matmuls() as seen:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, reduction=reduction, chunk_rows=1000).sum().backward()
    assert seen.large == matmuls


def test_ignored_rows_cost_no_matmul() -> None:
    inputs = problem(n=40) | {"labels": torch.full((40,), -100)}
    inputs["labels"][::10] = 1
    with Matmuls() as seen:
        linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=4).backward()
    assert seen.large == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"reduction": "none"}, {"token_weight": torch.rand(200)}])
def test_half_precision_is_no_worse_than_a_dense_head(dtype: torch.dtype, options: dict) -> None:
    """Against float64 on the same rounded inputs, twice the error of nn.Linear + cross_entropy in that dtype is allowed.

    Both round every logit once (relative 2^-9 or 2^-12) and every gradient at least once; chunks add roundings of dW.
    """
    inputs = problem(dtype, bias=False, n=200, k=300)
    exact = doubled(inputs)
    options = {"reduction": "sum"} | options
    fused = linear_smoothed_cross_entropy(**inputs, smoothing=0.1, chunk_rows=64, **options)
    parts = {k: v for k, v in options.items() if k not in ("reduction", "softcap")}
    true = dense_losses(**exact, **parts, softcap=options.get("softcap"))
    logits = F.linear(inputs["hidden"], inputs["weight"]).float()
    logits = logits if "softcap" not in options else 3.0 * torch.tanh(logits / 3.0)
    rough = F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1, reduction="none")
    rough = rough * options["token_weight"] if "token_weight" in options else rough
    assert fused.dtype == torch.float32
    errors = [(x.sum().double() - true.sum()).abs().item() for x in (fused, rough)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * true.sum().item()
    wanted = gradients(true.sum(), exact)
    for name, gradient in gradients(fused.sum(), inputs).items():
        assert gradient.dtype == dtype
        ours, theirs = (
            ((g.double() - wanted[name]).norm() / wanted[name].norm()).item()
            for g in (gradient, gradients(rough.sum(), inputs, retain_graph=True)[name])
        )
        assert ours <= 2 * theirs, (name, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniform_prior_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    """1/K is no half-precision number: rounding it would shift every smoothing term by up to 0.4 %."""
    for k in (999, 32128, 256000):
        labels, hidden = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, dtype=dtype)
        rider = PriorRow.of(RowLoss(Smoothing(0.1)), labels, None, k, hidden)
        assert rider.row.dtype == dtype and len(rider.row.unique()) == 1
        assert float(rider.row[0]) * rider.factor == pytest.approx(1 / k, rel=1e-7)


@pytest.mark.parametrize("peaked", [False, True])
def test_prior_row_stays_in_range_of_float16(peaked: bool) -> None:
    k = 4000
    hidden = torch.full((600, 4), 30.0, dtype=torch.float16).requires_grad_()
    weight = torch.full((k, 4), 20.0, dtype=torch.float16).requires_grad_()
    prior = torch.full((k,), 1e-6)
    prior[7] = 1 - prior[1:].sum() if peaked else prior[7]
    prior = prior / prior.sum()
    inputs = {"hidden": hidden, "weight": weight, "labels": torch.arange(600)}
    found = gradients(linear_smoothed_cross_entropy(**inputs, smoothing=Smoothing(0.5, prior=prior)), inputs)
    assert all(torch.isfinite(g).all() for g in found.values())
