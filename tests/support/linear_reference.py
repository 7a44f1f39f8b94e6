"""What the tests of `hf_ls.linear` share: random problems, the dense loss written from the target, comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ls.losses._rows import RowLoss
from hf_ls.losses.linear import LinearTerms, linear_smoothed_cross_entropy, linear_smoothed_terms
from hf_ls.losses.smoothing import Smoothing


def target(labels: Tensor, classes: int, epsilon: float, convention: str, prior: Tensor | None) -> Tensor:
    """t [n, K] in float64: (1−ε)·e_y plus ε spread by the prior, over all classes or over the wrong ones."""
    u = torch.full((classes,), 1 / classes, dtype=torch.float64) if prior is None else prior.double()
    rows = u.expand(len(labels), classes) if u.dim() == 1 else u[labels]
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    if convention == "wrong":
        rows = rows * (1 - one_hot)
        rows = rows / rows.sum(1, keepdim=True)
    return (1 - epsilon) * one_hot + epsilon * rows


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.1,
    convention: str = "all",
    prior: Tensor | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    **head: object,
) -> Tensor:
    """Per-item losses [...], weighted, 0 where ignored: −Σ t·log p + λ·lse², with 0·(−inf) = 0."""
    logits = head_logits(hidden, weight, **head)  # type: ignore[arg-type]
    flat, y = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = y != ignore_index
    t = target(y.masked_fill(~kept, 0), flat.shape[1], epsilon, convention, prior).to(flat.dtype)
    losses = -(t * flat.log_softmax(1).masked_fill(t == 0, 0)).sum(1)
    if z_loss:
        losses = losses + z_loss * flat.logsumexp(1).square()
    losses = losses.masked_fill(~kept, 0).reshape(labels.shape)
    return losses if token_weight is None else losses * token_weight


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
    **options: object,
) -> Tensor:
    losses = dense_losses(hidden, weight, labels, **options)  # type: ignore[arg-type]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    kept = (labels != options.get("ignore_index", -100)).to(losses.dtype)
    token_weight = options.get("token_weight")
    total = float((kept if token_weight is None else kept * token_weight).sum())
    return losses.sum() / (num_items_in_batch or total or 1.0)


N, D, K = 23, 6, 31


def problem(dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0, n: int = N, k: int = K) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    labels[torch.randperm(n, generator=g)[: n // 4]] = -100
    made = {
        "hidden": torch.randn(n, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(k, D, generator=g, dtype=torch.float64),
        "bias": torch.randn(k, generator=g, dtype=torch.float64),
    }
    made = {name: t.to(dtype).requires_grad_() for name, t in made.items() if bias or name != "bias"}
    return made | {"labels": labels}


def prior_of(kind: str, k: int = K) -> Tensor | None:
    g = torch.Generator().manual_seed(3)
    if kind == "uniform":
        return None
    u = torch.rand((k, k) if kind == "rows" else (k,), generator=g, dtype=torch.float64)
    if kind == "support":
        u[..., : k // 2] = 0
    return u / u.sum(-1, keepdim=True)


def gradients(loss: Tensor, inputs: dict[str, Any], upstream: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    leaves = {name: t for name, t in inputs.items() if t.is_floating_point() and t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), upstream, **kwargs), strict=True))


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: t.detach().double().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}


def assert_same(inputs: dict[str, Any], smoothing: Smoothing, tolerance: float, **options: Any) -> None:
    """Loss and all gradients of the fused loss against dense float64, relative to their largest entry."""
    fused_only = {name: options.pop(name) for name in ("chunk_rows",) if name in options}
    exact = doubled(inputs)
    parts = {"epsilon": smoothing.epsilon, "convention": smoothing.convention, "prior": smoothing.prior}
    want = dense_loss(**exact, **parts, **options)
    got = linear_smoothed_cross_entropy(**inputs, smoothing=smoothing, **options, **fused_only)
    assert got.dtype == (torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    scale = max(1.0, float(want.detach().abs().max()))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)
    wanted = gradients(want, exact, upstream)
    found = gradients(got, inputs, upstream.to(got.dtype))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype
        atol = tolerance * max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


ROW_OPTIONS = ("objective", "logit_scale", "softcap", "z_loss", "observer")


def terms_of(smoothing: Smoothing | float, **options: Any) -> LinearTerms:
    """`linear_smoothed_terms` with the options of `linear_smoothed_cross_entropy`."""
    own = {name: options.pop(name) for name in ROW_OPTIONS if name in options}
    smoothing = smoothing if isinstance(smoothing, Smoothing) else Smoothing(smoothing)
    return linear_smoothed_terms(**options, loss=RowLoss(smoothing, **own))


class Matmuls(TorchDispatchMode):
    """Counts matmuls of more than one row, their multiplications, and remembers the largest tensor any operator returned."""

    def __enter__(self) -> Matmuls:
        self.large, self.largest, self.multiplications = 0, 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[0] > 1:
            self.large += 1
            self.multiplications += out.numel() * args[-1].shape[0]
        return out
