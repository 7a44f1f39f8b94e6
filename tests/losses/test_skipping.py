"""Gradients from few entries: exact losses, errors within the tolerance, and a certificate which tells the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_reference import Matmuls, terms_of
from torch import Tensor

from hf_ls.losses._skipping import GradientCertificate
from hf_ls.losses.linear import tolerance_in
from hf_ls.losses.smoothing import Smoothing

N, D, K = 600, 24, 3000
TOLERANCE = 0.02


def zipf(dtype: torch.dtype = torch.float64, seed: int = 0, slope: float = 1.6) -> dict[str, Any]:
    """States of a model which knows which of its classes are frequent, as any trained language model does."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(K, D, generator=g, dtype=torch.float64) * 0.3
    weight[:, 0] -= slope * torch.arange(1, K + 1).log()
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    hidden[:, 0] = 1
    labels = torch.multinomial((hidden @ weight.t()).softmax(1), 1, generator=g).squeeze(1)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "labels": labels}


def found(given: dict[str, Any], tolerance: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor], GradientCertificate | None]:
    """Loss, gradients and certificate; one chunk holds 256 rows unless said otherwise."""
    frozen = options.pop("frozen", ())
    leaves = {
        name: value.detach().clone().requires_grad_(name not in frozen)
        for name, value in given.items()
        if value.is_floating_point() and name != "token_weight"
    }
    smoothing = options.pop("smoothing", 0.1)
    terms = terms_of(smoothing, **(given | leaves), gradient_tolerance=tolerance, **options)
    terms.loss.sum().backward()
    return terms.loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, terms.certificate


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())


def bias(g: int = 5) -> Tensor:
    return torch.randn(K, generator=torch.Generator().manual_seed(g), dtype=torch.float64) * 0.2


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no smoothing": {"smoothing": 0.0},
    "wrong": {"smoothing": Smoothing(0.2, "wrong")},
    "prior": {"smoothing": Smoothing(0.1, prior=torch.arange(1.0, K + 1, dtype=torch.float64) / (K * (K + 1) / 2))},
    "bias": {"bias": bias()},
    "scale": {"logit_scale": 0.9},
    "z-loss": {"z_loss": 1e-2},
    "weights": {"token_weight": (torch.arange(N) % 4).double()},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "frozen head": {"frozen": ("weight",)},
    "frozen body": {"frozen": ("hidden",)},
    "many chunks": {"chunk_rows": 32},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_exact_and_the_gradients_are_within_the_tolerance(options: dict[str, Any]) -> None:
    given = zipf() | {name: options[name] for name in ("bias", "token_weight") if name in options}
    given["labels"][::5] = -100
    options = {name: value for name, value in options.items() if name not in given}
    loss, exact, none = found(given, None, **options)
    got, gradients, certificate = found(given, TOLERANCE, **options)
    assert none is None
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        if name == "bias":
            torch.testing.assert_close(gradient, exact[name], rtol=1e-9, atol=1e-12)
        else:
            assert 0 < error(gradient, exact[name]) < 1.5 * TOLERANCE  # of the call, not of a row or a chunk
    if options.get("reduction") == "none":
        assert certificate is None  # its gradients are made in the backward
        return
    assert certificate is not None and certificate.kept_entries < 0.5
    assert 0 < certificate.mean_dropped_mass < certificate.largest_dropped_mass < 0.5
    estimates = {"hidden": certificate.hidden_error, "weight": certificate.weight_error}
    for name, estimate in estimates.items():
        if name in gradients:
            assert estimate == pytest.approx(error(gradients[name], exact[name]), rel=0.3)
        else:
            assert estimate == 0


def test_what_is_dropped_is_replaced_with_its_sums() -> None:
    """Each row of G and each column keeps its sum: what the hidden states and the weights have in common is exact."""
    given = zipf()
    given["hidden"][:, 1], given["weight"][:, 2] = 2.0, 3.0
    _, exact, _ = found(given, None)
    _, got, _ = found(given, 0.1)
    assert error(got["hidden"], exact["hidden"]) > 1e-3 < error(got["weight"], exact["weight"])
    torch.testing.assert_close(got["hidden"][:, 2], exact["hidden"][:, 2], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(got["weight"][:, 1], exact["weight"][:, 1], rtol=1e-9, atol=1e-15)


def test_random_states_take_all_columns_and_are_exact() -> None:
    given = zipf(slope=0.0)
    _, exact, _ = found(given, None)
    with Matmuls() as matmuls:
        _, got, certificate = found(given, TOLERANCE)
    assert certificate == (1.0, 0.0, 0.0, 0.0, 0.0, None)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-10, atol=1e-14)
    hidden, weight = given["hidden"], given["weight"]
    assert matmuls.multiplications <= 3.4 * hidden.numel() * len(weight)  # eight probes for 24 columns, in the first chunk only


def test_a_row_far_from_the_others_is_told_and_harms_no_other() -> None:
    given = zipf()
    given["hidden"][17, 0] = 0.0  # all classes alike
    _, exact, _ = found(given, None)
    _, got, certificate = found(given, TOLERANCE)
    assert certificate is not None and certificate.kept_entries < 0.5
    assert certificate.largest_dropped_mass > 5 * certificate.mean_dropped_mass
    assert error(got["hidden"][17], exact["hidden"][17]) < 5 * TOLERANCE  # its own entries stay, where it has large ones
    others = torch.arange(N) != 17
    assert error(got["hidden"][others], exact["hidden"][others]) < TOLERANCE
    assert error(got["weight"], exact["weight"]) < TOLERANCE


def test_the_rarest_labels_keep_their_gradient() -> None:
    given = zipf()
    given["labels"][:] = K - 1 - torch.arange(N) % 50
    _, exact, _ = found(given, None)
    _, got, certificate = found(given, TOLERANCE)
    rarest = given["labels"].unique()
    torch.testing.assert_close(got["weight"][rarest], exact["weight"][rarest], rtol=1e-6, atol=1e-9)
    assert error(got["hidden"], exact["hidden"]) < 1.5 * TOLERANCE
    # What the entries which are dropped miss is much of dW here, and said so.
    assert certificate is not None and certificate.weight_error == pytest.approx(error(got["weight"], exact["weight"]), rel=0.3)


def test_near_the_smoothed_optimum_all_columns_are_taken() -> None:
    """There the gradient is a difference which nearly cancels, and a small tail would be a large part of it."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % 40
    given = {
        "hidden": torch.nn.functional.one_hot(labels, 40).double() + 1e-3 * torch.randn(N, 40, generator=g, dtype=torch.float64),
        "weight": torch.eye(K, 40, dtype=torch.float64) * Smoothing(0.1).optimal_logit_gap(K)
        + 1e-2 * torch.randn(K, 1, generator=g, dtype=torch.float64),
        "labels": labels,
    }
    _, exact, _ = found(given, None)
    _, got, certificate = found(given, TOLERANCE)
    assert all(error(gradient, exact[name]) < TOLERANCE for name, gradient in got.items())
    assert certificate is not None and certificate.error < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"softcap": 20.0}, {"objective": lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none")}]
)
def test_other_losses_are_exact(options: dict[str, Any]) -> None:
    given = zipf()
    (_, exact, _), (_, got, certificate) = (found(given, tolerance, **options) for tolerance in (None, TOLERANCE))
    assert certificate is None
    assert all(torch.equal(gradient, exact[name]) for name, gradient in got.items())


def test_half_precision_stays_within_its_own_rounding() -> None:
    """ "auto" in bfloat16: against float64 no more than a quarter worse than the same arithmetic with all columns."""
    given = zipf(torch.bfloat16)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    _, wanted, _ = found(wide, None)
    _, plain, _ = found(given, None)
    _, got, certificate = found(given, "auto")
    assert certificate is not None and certificate.kept_entries < 0.5 and 0 < certificate.error < 3e-3
    for name in wanted:
        assert error(got[name], wanted[name]) < 1.25 * error(plain[name], wanted[name])


def test_what_auto_means() -> None:
    assert tolerance_in("auto", torch.bfloat16) == pytest.approx(2**-9)
    assert (
        tolerance_in("auto", torch.float32) is tolerance_in(None, torch.bfloat16) is tolerance_in("auto", torch.float16) is None
    )
    for wrong in (0, 1, -1.0, "off", True, float("nan")):
        with pytest.raises(ValueError, match="expected gradient_tolerance above 0 and below 1, 'auto' or None, got"):
            tolerance_in(wrong, torch.float32)
