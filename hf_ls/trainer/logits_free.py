"""Lets a model's forward return the loss of its language-model head instead of logits, and probes that this is exact.

How: for the time of one call the forward of the output embedding layer is replaced by the loss of its hidden states. It
returns logits for no sequence at all, [0, T, K], so that all which a model does to its logits afterwards costs nothing.
The loss leaves through the outputs of the model's own forward, because DDP, FSDP and ZeRO hold the weights and watch the
graph there. Outside of that call the model is untouched: generation, evaluation, saving and copying see nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import base_model, in_eval_mode, output_embedding
from hf_ls.losses._rows import Observer, RowLoss
from hf_ls.losses._skipping import GradientCertificate, Thresholds
from hf_ls.losses.cross_entropy import logits_of, smoothed_terms
from hf_ls.losses.linear import GradientTolerance, LinearTerms, linear_smoothed_terms, tolerance_in
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.batch import Batch, copied
from hf_ls.trainer.shift import added_loss, without_cross_entropy

logger = logging.getLogger(__name__)


class HeadLoss(NamedTuple):
    """What one logits-free forward gives; the parts are detached, unweighted and shaped as the labels, in nats."""

    loss: Tensor  # a scalar with its graph
    nll: Tensor
    smoothing_term: Tensor
    outputs: Any  # of the model; its logits are empty


class PostProcessing(NamedTuple):
    """What a model does to x = h·Wᵀ + b: logits = c·tanh(s·x/c) + final bias. Measured, see `measured`."""

    logit_scale: float = 1.0  # s > 0
    softcap: float | None = None  # c > 0
    final_bias: Tensor | None = None  # [K]

    def apply(self, x: Tensor) -> Tensor:
        """The logits which the model makes of x [..., K]."""
        z = x * self.logit_scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.final_bias is None else z + self.final_bias.to(z)


class LogitsFreeHead:
    """The language-model head of a model, ready to return losses instead of logits.

    Exact for an output embedding which is a linear layer, tied or not, whose logits are only scaled, soft-capped or biased
    afterwards. `probe` measures how and makes sure of that; call it before the first use.

    Raises: ValueError with the reason when the head of the model cannot be used; the caller then takes the dense path.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the head of `model`, wrapped or not."""
        if is_compiled(model):
            raise ValueError("expected an eager model, got a compiled one; torch.compile keeps the logits path")
        if isinstance(model, nn.DataParallel):
            raise ValueError("expected one device per process, got nn.DataParallel; launch with torchrun or accelerate")
        self.model = unwrap_model(model)
        head = output_embedding(model)
        if head is None:
            raise ValueError(f"expected a language-model head, got none in {type(self.model).__name__}")
        self.head = _plain_linear(head)
        self.post_processing = PostProcessing()
        # K; the probe finds it where the weight is there only during a forward, as under ZeRO-3.
        self.classes: int = self.head.weight.shape[0]

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Tensor,
        smoothing: Smoothing,
        *,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
        token_weight: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        observer: Observer | None = None,
        added: tuple[int, ...] = (),
        share: float = 1.0,
        gradients: GradientWatch | None = None,
    ) -> HeadLoss:
        """One forward of `model` with the smoothed loss of the head, in nats.

        loss = Σ w·loss / num_items_in_batch, or / Σ w without a count; + share · what the model's own loss adds.
        Shapes: labels [B, T] aligned with the logits (shifted already for a causal model), token_weight [B, T].

        Args:
            model: this head's model as wrapped by DDP or FSDP, or itself.
            objective: another loss per row, as in `linear.linear_smoothed_cross_entropy`.
            observer: sees the logits and labels of the kept items, a chunk at a time.
            added: which calls of cross entropy to silence in the model's own loss (`shift.OwnLoss.calls`), whose labels are
                then among the inputs; () for inputs without labels.
            gradients: knows their tolerance, and sees what was made of it; None for exact ones.

        Raises: ValueError when the head is not called exactly once with one hidden state per label; as
        `linear.linear_smoothed_terms`.
        """
        found: list[LinearTerms] = []

        def head_forward(hidden: Tensor) -> Tensor:
            _check_weight(self.head.weight)
            if hidden.shape[:-1] != labels.shape:
                raise ValueError(
                    f"expected hidden states {tuple(labels.shape)} at the head, one per label, got {tuple(hidden.shape[:-1])}; "
                    "leave `logits_to_keep` out of the batch"
                )
            scale, softcap, final_bias = self.post_processing
            with torch._C.DisableTorchFunction():  # an objective may be a cross entropy of its own
                terms = linear_smoothed_terms(
                    hidden,
                    self.head.weight,
                    labels,
                    RowLoss(smoothing, objective, logit_scale=scale, softcap=softcap, observer=observer),
                    bias=_one_bias(self.head.bias, final_bias, scale),
                    token_weight=token_weight,
                    num_items_in_batch=num_items_in_batch,
                    gradient_tolerance=None if gradients is None else gradients.of_next_step(),
                    thresholds=None if gradients is None else gradients.thresholds,
                )
            if gradients is not None:
                gradients.see(terms.certificate, self.head.weight.dtype)
            found.append(terms)
            # Empty, but in the graph of the loss: FSDP and ZeRO hang their backward hooks on what a module returns.
            return terms.loss.reshape(1)[:0].reshape(0, *hidden.shape[1:-1], self.head.weight.shape[0]).to(hidden.dtype)

        def with_loss(outputs: Any) -> Any:
            if len(found) != 1:
                raise ValueError(f"expected one call of the head in a forward, got {len(found)}; it is not used as a layer")
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            if logits is None or logits.numel():
                shape = "" if logits is None else f" {tuple(logits.shape)}"
                raise ValueError(f"expected a ModelOutput with empty logits, got {type(outputs).__name__}{shape}")
            own = added_loss(outputs, logits, labels, whole=False) if added else 0.0
            outputs["loss"] = found[0].loss + logits.sum().to(found[0].loss.dtype) + share * own
            return outputs

        with self._replaced(head_forward, with_loss), without_cross_entropy(added) if added else nullcontext():
            outputs = model(**inputs)
        return HeadLoss(outputs["loss"], found[0].nll, found[0].smoothing_term, outputs)

    @torch.no_grad()
    def probe(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, added: tuple[int, ...] = ()) -> None:
        """Measure and compare with the model's own logits, in evaluation mode, without random numbers: small forwards.

        First what the model makes of known logits, whatever its weights (a new head's are so small that a factor would
        not be seen); then the loss of its hidden states against that of its own logits. Shapes: labels [B, T] aligned.

        Args:
            added: as in the call.

        Raises: ValueError with the reason when they differ.
        """
        with in_eval_mode(model):
            with without_cross_entropy(added):
                own = logits_of(model(**copied(inputs)))
            self.post_processing, half = self._measure(model, inputs, added)
            smoothing = Smoothing(0.5)
            try:
                here = self(model, copied(inputs), labels, smoothing, added=added)
            except (RuntimeError, IndexError, TypeError) as error:
                raise ValueError(
                    f"expected a forward which can do with empty logits, got {type(error).__name__}: {error}"
                ) from error
        self.classes = own.shape[-1]
        tolerance = 2e-2 if half or own.dtype.itemsize < 4 else 1e-4
        dense = smoothed_terms(own, labels, smoothing)
        _check_close("nll", here.nll, dense.nll, tolerance)
        _check_close("smoothing term", here.smoothing_term, dense.smoothing_term, tolerance)

    def _measure(self, model: nn.Module, inputs: Mapping[str, Any], added: tuple[int, ...]) -> tuple[PostProcessing, bool]:
        """What the model does to its logits, from what it makes of known ones, and whether its head runs in half precision.

        Known are, in float32 or better even where the model is not: zeros, which show a final bias; ±2¹⁴, at which a soft-cap is
        its constant; and values in [−8, 8], which show the scale and check the whole.

        Raises: ValueError where that does not explain the logits, or where a trained weight takes part.
        """
        put: list[Tensor] = []
        half: list[bool] = []
        far = 2.0**14

        def head_forward(hidden: Tensor) -> Tensor:
            rows, classes = hidden.shape[:-1].numel(), self.head.weight.shape[0]
            exact = torch.promote_types(self.head.weight.dtype, torch.float32)
            half.append(torch.is_autocast_enabled(hidden.device.type) or self.head.weight.dtype.itemsize < 4)
            known = 8 * torch.arange(rows * classes, device=hidden.device, dtype=exact).cos().reshape(rows, classes)
            known[0] = 0
            known[-1, ::2], known[-1, 1::2] = far, -far
            put.append(known.reshape(*hidden.shape[:-1], classes))
            torch.set_grad_enabled(True)  # up to the end of `no_grad` in the probe: shows weights which work on the logits
            # The model may change its logits in place.
            return put[0].clone()

        # Rows of one or two labels (T5 as a classifier) are too few logits to measure by; three copies of them are enough.
        sizes = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
        copies = {
            name: torch.cat([value] * 3) if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()
        }
        with torch.no_grad(), self._replaced(head_forward, lambda outputs: outputs), without_cross_entropy(added):
            processed = logits_of(model(**copied(copies if sizes == {1} else inputs)))
        if len(put) != 1:
            raise ValueError(f"expected one call of the head in a forward, got {len(put)}; it is not used as a layer")
        if processed.shape != put[0].shape:
            raise ValueError(f"expected logits {tuple(put[0].shape)} as the head makes them, got {tuple(processed.shape)}")
        if processed.requires_grad:
            raise ValueError("expected logits from the head alone, got a trained weight which works on them after it")
        known, found = (part.detach().to(put[0].dtype).flatten(0, -2) for part in (put[0], processed))
        if len(known) < 3:
            raise ValueError(f"expected at least 3 rows of logits to measure what the model does to them, got {len(known)}")
        scale, softcap, bias = _fit(known, found)
        own_bias = getattr(base_model(self.model), "final_logits_bias", None)
        if bias is not None and not (isinstance(own_bias, Tensor) and torch.allclose(own_bias.flatten().to(bias), bias)):
            raise ValueError("expected `final_logits_bias` as the only bias after the head, got another")
        post = PostProcessing(scale, softcap, None if bias is None else own_bias.flatten())  # type: ignore[union-attr]
        _check_close("logits after the head", post.apply(known), found, 2e-2 if processed.dtype.itemsize < 4 else 1e-5)
        return post, half[0]

    @contextmanager
    def _replaced(self, head_forward: Callable[[Tensor], Tensor], finish: Callable[[Any], Any]) -> Iterator[None]:
        """The head's forward replaced, and `finish` applied to the outputs inside the model's own forward."""
        original = self.model.forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            return finish(original(*args, **kwargs))

        with _forward_of(self.head, head_forward), _forward_of(self.model, model_forward):
            yield


# Steps: a model which is trained from scratch is looked at again now and then.
_LONGEST_PAUSE = 64


class GradientWatch:
    """The tolerance of the gradients of one training; none any more, with one warning, after an error which is larger.

    It decides for its own process: the gradients of others do not wait for it.
    """

    def __init__(self, tolerance: GradientTolerance) -> None:
        self.tolerance = tolerance
        self.thresholds: Thresholds | None = None  # where the next step begins
        self._pause, self._waited = 0, 0  # steps without a look, those to come and the last ones
        self._since: list[GradientCertificate] = []

    def of_next_step(self) -> GradientTolerance:
        """The tolerance; None for a while after a step which needed all entries, since to find that out costs time too."""
        if self._pause:
            self._pause -= 1
            return None
        return self.tolerance

    def see(self, certificate: GradientCertificate | None, dtype: torch.dtype) -> None:
        """Remember what a step says of its gradients, made in `dtype`."""
        if certificate is None:
            return
        self._since.append(certificate)
        self.thresholds = certificate.thresholds
        self._waited = min(max(1, 2 * self._waited), _LONGEST_PAUSE) if certificate.kept_entries == 1 else 0
        self._pause = self._waited
        asked = tolerance_in(self.tolerance, dtype)
        if asked is not None and certificate.error > 2 * asked:  # as much as chance makes of a small batch
            logger.warning(
                "The gradients of the head are exact from here on: their error was %.2g where gradient_tolerance asks for %.2g",
                certificate.error,
                asked,
            )
            self.tolerance = None

    def add_to(self, logs: dict[str, float]) -> None:
        """Put what was seen since the last log of this process into a training log."""
        if not self._since or "loss" not in logs:
            return
        kept, largest, dropped, *_ = zip(*self._since, strict=True)
        logs |= {
            "gradient_error": max(found.error for found in self._since),
            "kept_entries": sum(kept) / len(kept),
            "dropped_mass": sum(dropped) / len(dropped),
            "largest_dropped_mass": max(largest),
        }
        self._since.clear()


def head_for(
    wrapped: nn.Module, model: nn.Module, small: Batch, added: tuple[int, ...] = ()
) -> tuple[LogitsFreeHead | None, str | None]:
    """The head of a model after its probe on a small batch, or the reason why it cannot be used. All processes together.
    `added` as in the call of the head.

    One process on the other path would leave the rest alone in collective forwards: the reason of any is that of all.
    """
    head, error = None, None
    try:
        head = LogitsFreeHead(wrapped)
        head.probe(model, small.with_labels(model) if added else small.for_model(model), small.labels, added)
    except ValueError as found:
        error = str(found)
    return head, next((reason for reason in gather_object([error]) if reason is not None), None)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # accelerate's mixed precision leaves one here
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model or a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def _plain_linear(head: nn.Module) -> nn.Linear:
    weights = {name for name, _ in head.named_parameters()} | {name for name, _ in head.named_buffers()}
    if not isinstance(head, nn.Linear) or "forward" in head.__dict__ or weights - {"weight", "bias"}:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(
            f"expected a plain nn.Linear as output embedding, got {kind}: an adapter, weights beside it, or quantised"
        )
    return head


def _check_weight(weight: Tensor) -> None:
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(f"expected a plain tensor as the head's weight, got {type(weight).__name__}: sharded or quantised")


def _fit(known: Tensor, found: Tensor) -> tuple[float, float | None, Tensor | None]:
    """(s, c, final bias) with found = c·tanh(s·known/c) + bias, for rows [N, K] as `_measure` makes them."""
    if not bool(found.isfinite().all()):
        raise ValueError("expected finite logits of finite ones, got others; the model masks some")
    bias = found[0] if bool(found[0].any()) else None
    x, y = known[1:], found[1:] if bias is None else found[1:] - bias
    if bool((x == y).all()):
        return 1.0, None, bias
    cap, line = float(y[-1, 0]), float(y[-1, 0] / x[-1, 0])
    near = x[:-1].flatten()
    top = int(near.argmax())
    slope = float(y[:-1].flatten()[top] / near[top])
    if not (0 < line < math.inf and 0 < slope < math.inf):
        raise ValueError("expected logits which grow with those of the head, got others; the model does something else to them")
    if abs(line - slope) <= 1e-2 * slope:
        # Over all of them the rounding of half precision evens out.
        return float((x * y).double().sum() / (x * x).double().sum()), None, bias
    share = y[:-1].flatten().double() / cap
    clear = (share.abs() > 0.2) & (share.abs() < 0.8)  # tanh is neither a line there nor flat: its inverse loses no digits
    if not bool(clear.any()):
        clear = share.abs() == share.abs().masked_fill(share.abs() >= 1, 0).amax()
    return float((cap * share[clear].atanh() / near[clear].double()).mean()), cap, bias


def _one_bias(bias: Tensor | None, final_bias: Tensor | None, scale: float) -> Tensor | None:
    """The head's own bias, which is scaled with the logits, and the final one, which is not; BART's is nearly always 0."""
    if final_bias is None or not bool(final_bias.any()):
        return bias
    return final_bias / scale if bias is None else bias + final_bias.to(bias) / scale


def _check_close(what: str, here: Tensor, dense: Tensor, tolerance: float) -> None:
    bad = ~((here - dense).abs() <= tolerance * (1 + dense.abs())) | ~dense.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"expected the {what} of the model's own forward, {float(dense[bad][0]):.6g}, got {float(here[bad][0]):.6g} without "
            "the logits; the model does something else to its logits than to scale, soft-cap or bias them"
        )
