"""The way the loss takes on CUDA, as far as a CPU can check it: no value is read, sums are float32, one kernel per row."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from linear_reference import N, assert_same, gradients, prior_of, problem, terms_of
from test_linear_sweep import TOLERANCE

from hf_ls.losses import _checks, _chunks
from hf_ls.losses._chunks import KeptRows, chunks, default_chunk_rows
from hf_ls.losses.linear import linear_smoothed_cross_entropy
from hf_ls.losses.smoothing import Smoothing


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Let every tensor count as one whose values the host must not read."""
    monkeypatch.setattr(_checks, "reading_waits", lambda values: True)
    monkeypatch.setattr(_chunks, "_FIRST_ROWS", 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prior", ["uniform", "support", "rows"])
@pytest.mark.parametrize("options", [
    {},
    {"reduction": "sum", "z_loss": 0.05},
    {"reduction": "none", "logit_scale": 0.3},
    {"token_weight": torch.arange(N) % 3 / 2, "softcap": 2.0},
    {"num_items_in_batch": torch.tensor(7)},
    {"token_weight": torch.arange(N) % 3 / 2},
], ids=lambda options: " ".join(options) or "plain")  # fmt: skip
def test_the_numbers_are_those_of_dense_float64(as_on_cuda, dtype, bias, prior, options):
    for epsilon, rows in ((0.1, 5), (0.0, None), (0.1, 1000)):
        smoothing = Smoothing(epsilon, "wrong", prior=prior_of(prior))
        assert_same(problem(dtype, bias=bias), smoothing, 3 * TOLERANCE[dtype], chunk_rows=rows, **options)


@pytest.mark.parametrize("kept", ["none", "one", "all"])
def test_any_number_of_ignored_rows_whatever_they_hold(as_on_cuda, kept):
    inputs = problem()
    inputs["labels"] = torch.full((N,), -100) if kept != "all" else torch.arange(N)
    if kept == "one":
        inputs["labels"][11] = 3
    with torch.no_grad():
        inputs["hidden"][inputs["labels"] < 0] = torch.nan
    loss = linear_smoothed_cross_entropy(**inputs, smoothing=0.1)
    found = gradients(loss, inputs)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert not found["hidden"][inputs["labels"] < 0].any()
    if kept == "none":
        assert loss == 0 and not any(gradient.any() for gradient in found.values())


def test_an_observer_sees_the_kept_rows_and_no_others(as_on_cuda):
    inputs, seen = problem(), []
    terms_of(**inputs, smoothing=0.1, observer=lambda z, y: seen.append(y))
    assert torch.equal(torch.cat(seen), inputs["labels"][inputs["labels"] >= 0])


def test_wrong_labels_and_nan_are_assertions_on_the_device(as_on_cuda):
    inputs = problem()
    with pytest.raises(RuntimeError, match=r"expected labels in \[0, 31\) or -100"):
        linear_smoothed_cross_entropy(**(inputs | {"labels": torch.full((N,), 31)}), smoothing=0.1)
    with pytest.raises(RuntimeError, match="expected finite logits"):
        linear_smoothed_cross_entropy(**(inputs | {"hidden": torch.full_like(inputs["hidden"], torch.nan)}), smoothing=0.1)


def test_the_number_of_rows_is_asked_for_once_and_after_the_first_chunk(as_on_cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(_chunks, "later", lambda number: lambda: asked.append("count") or int(number))
    is_kept = torch.arange(10_000) % 5 == 0
    rows = KeptRows.of(is_kept)
    assert not asked and rows.order[:3].tolist() == [0, 5, 10]
    taken = chunks(rows, 4096)
    assert next(taken) == (0, 2528) and not asked  # a quarter, a multiple of 32
    assert list(taken) == [] and asked == ["count"]  # 2,000 rows were kept
    assert list(chunks(KeptRows.of(torch.ones(10_000, dtype=torch.bool)), 4096)) == [(0, 2528), (2528, 6272), (6272, 10_000)]


def test_default_chunks_on_cuda_are_long():
    assert default_chunk_rows(100_000, 4096, torch.bfloat16, False, cuda=True) == 4000
    assert default_chunk_rows(8192, 4096, torch.float32, False, cuda=True) == 4096


def test_the_kernel_gives_the_gradient_and_the_terms():
    """In Triton's interpreter, in a process of its own: it must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL], env=environment, check=True, timeout=200)


KERNEL = """
import torch
from hf_ls.losses import _cuda
_cuda.MOST_COLUMNS = 16
generator = torch.Generator().manual_seed(0)
# The interpreter cuts bfloat16 off where a GPU rounds.
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
    for share, weighted, z_loss in ((False, False, 0.0), (True, True, 0.1), (True, False, 0.0), (False, True, 0.1)):
        z = (torch.randn(6, 50, generator=generator) * 5).to(dtype)
        z[1, :20] = -torch.inf
        z[2, 0] = 3000.0
        y = torch.tensor([0, 49, 7, 16, 15, 31])
        s = torch.rand(6, generator=generator) if share else None
        w = torch.rand(6, generator=generator) * 3 if weighted else None
        exact = z.double()
        lse = exact.logsumexp(1)
        want = exact.softmax(1) * (1 + 2 * z_loss * lse)[:, None]
        want[torch.arange(6), y] -= 1 if s is None else s.double()
        want = want if w is None else want * w.double()[:, None]
        kept = z.clone()
        nll, label_logit = _cuda.plain_chunk_(kept, y, s, w, z_loss, False)
        assert torch.equal(kept, z)
        nll, label_logit = _cuda.plain_chunk_(z, y, s, w, z_loss, True)
        torch.testing.assert_close(label_logit.double(), exact[torch.arange(6), y])
        torch.testing.assert_close(nll.double(), lse - exact[torch.arange(6), y], rtol=1e-6, atol=1e-5)
        scale = want.abs().amax(1, keepdim=True).clamp_min(1)
        assert float(((z.double() - want).abs() / scale).max()) < tolerance, (dtype, share, weighted, z_loss)
"""
