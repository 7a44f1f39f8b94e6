"""A model's own loss: the cross entropy of its logits, and what it adds.

A mixture of experts adds the balance of its routers, AdaLoRA an orthogonality, SHADOW the loss of a second head, each under
another name and coefficient. No name is read here. The model computes its own loss in its own forward, in which those calls of
`torch.nn.functional.cross_entropy` which get the labels are answered by 0. What is left is what it adds: exact in every
precision, with its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_ls.common.models import IGNORE_INDEX, base_model
from hf_ls.losses.cross_entropy import smoothed_terms
from hf_ls.losses.smoothing import Smoothing


class CrossEntropyCall(NamedTuple):
    """One call of cross entropy in a forward: its kept labels in their order, and its mean, nats; None for no class labels."""

    labels: Tensor | None
    mean: float


class OwnLoss(NamedTuple):
    """A model's own loss on one batch."""

    value: float | None  # nats; None where the model returns no loss
    added: float  # what of it is no cross entropy of the labels, nats
    calls: tuple[int, ...]  # which calls of cross entropy in the forward are that of the labels; () for none of them
    others: int | None  # how many labels the cross entropy counts where they are not those of the batch; None: they are


class _CrossEntropies(TorchFunctionMode):
    """Listens to cross entropies: keeps what each is of, and answers those at `silenced` by 0 (None: all)."""

    def __init__(self, silenced: tuple[int, ...] | None = (), listen: bool = False) -> None:
        super().__init__()
        self.silenced, self.listen, self.count = silenced, listen, 0
        self.calls: list[CrossEntropyCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.cross_entropy, F.nll_loss):
            return func(*args, **kwargs)
        here, self.count = self.count, self.count + 1
        if self.silenced is None or here in self.silenced:
            return _nothing(*args, **kwargs)
        found = func(*args, **kwargs)
        if self.listen:
            self.calls.append(_call(found, *args, **kwargs))
        return found


# In both functions of torch these arguments come in this order.
def _nothing(
    input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = IGNORE_INDEX,
    reduce: Any = None, reduction: str = "mean", **kwargs: Any,
) -> Tensor:  # fmt: skip
    return input.new_zeros(target.shape if reduction == "none" else ())


def _call(
    found: Tensor, input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = IGNORE_INDEX, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> CrossEntropyCall:  # fmt: skip
    if target.is_floating_point() or weight is not None or label_smoothing:
        return CrossEntropyCall(None, float("nan"))
    kept = target != ignore_index
    mean = found.detach().double() if reduction == "mean" else found.detach().double().sum() / kept.sum()
    return CrossEntropyCall(target[kept], float(mean))


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in the outputs of a forward with labels: by name, or the scalar which a tuple begins with; None without one."""
    if isinstance(outputs, dict):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point() else None


@contextmanager
def without_cross_entropy(calls: tuple[int, ...]) -> Iterator[None]:
    """In this block, for one forward, the calls of cross entropy of these numbers are answered by 0.

    Raises: ValueError when they were not made: what the forward then returns as its loss is unknown.
    """
    if not calls:
        yield
        return
    with _CrossEntropies(calls) as heard:
        yield
    if heard.count <= max(calls):
        raise ValueError(
            f"expected {max(calls) + 1} calls of cross_entropy in the model's own loss, as in its first batch, got "
            f"{heard.count}: what it adds to them cannot be told; launch with torchrun instead of nn.DataParallel, switch off "
            "use_liger_kernel and torch_compile, or use transformers.Trainer"
        )


def without_any_cross_entropy() -> TorchFunctionMode:
    """In this block every cross entropy is 0: for a forward with labels of which only its inputs matter."""
    return _CrossEntropies(None)


def added_loss(outputs: Any, logits: Tensor, labels: Tensor, *, whole: bool) -> Tensor:
    """What the model's own loss adds, with its graph, from a forward with labels; nats.

    Args:
        whole: its cross entropy was not silenced (a compiled model's is not): take off that of its logits. Shapes as in
            `smoothed_terms`.
    """
    found = loss_in(outputs)
    if found is None:
        raise ValueError("expected a loss from the model's own forward with labels, as in its first batch, got none")
    if not whole:
        return found
    kept = labels != IGNORE_INDEX
    if not bool(kept.any()):
        return found.new_zeros(())
    nll = smoothed_terms(logits, labels, Smoothing(0.0)).nll
    # The mean over starts and that over ends count alike.
    return found - (nll.sum(0) / kept.sum(0)).mean() if "start_logits" in outputs else found - nll.sum() / kept.sum()


@torch.no_grad()
def own_loss(
    model: nn.Module, inputs: Callable[[], dict[str, Any]], labels: Sequence[tuple[Tensor, ...]], means: list[float]
) -> OwnLoss:
    """A model's own loss on a batch with labels, and what it adds to their cross entropy. Two forwards, never compiled.

    Args:
        inputs: makes the batch with its labels afresh for each forward.
        labels: for each cross entropy the kept labels [n], in the alignments which may be; two of them for starts and ends.
        means: the mean NLL which the model's logits have in these alignments, nats, to tell the heads of one model apart.
    """
    batch, parameters = inputs(), inspect.signature(base_model(model).forward).parameters
    if not (set(batch) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        return OwnLoss(None, 0.0, (), None)  # it takes no labels
    with torch.compiler.set_stance("force_eager"), _CrossEntropies(listen=True) as heard:
        found = loss_in(model(**batch))
    calls: list[int] = []
    for alignments in labels:
        same = [
            i
            for i, call in enumerate(heard.calls)
            if i not in calls and call.labels is not None and any(_equal(call.labels, kept) for kept in alignments)
        ]
        if same:
            calls.append(min(same, key=lambda i: min(abs(heard.calls[i].mean - mean) for mean in means)))
    if len(calls) < len(labels):
        counted = [len(call.labels) for call in heard.calls if call.labels is not None]
        return OwnLoss(None if found is None else float(found), 0.0, (), max(counted, default=None))
    with torch.compiler.set_stance("force_eager"), without_cross_entropy(tuple(sorted(calls))):
        added = loss_in(model(**inputs()))
    return OwnLoss(None if found is None else float(found), 0.0 if added is None else float(added), tuple(sorted(calls)), None)


def _equal(found: Tensor, kept: Tensor) -> bool:
    return found.shape == kept.shape and bool((found.to(kept.device) == kept).all())
