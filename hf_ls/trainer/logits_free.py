"""Lets a model's forward return the loss of its language-model head instead of logits.

Owns: `LogitsFreeHead`, which takes the loss inside the model's own forward, and the probe that it is exact for a model.
Does not own: the loss from hidden states (`linear`), labels, shift and counting (`trainer`, `alignment`).

How: for the time of one call the forward of the output embedding layer is replaced by the loss of its hidden states. It
returns logits for no sequence at all, [0, T, K], so that all which a model does to its logits afterwards costs nothing.
The loss leaves through the outputs of the model's own forward, because DDP, FSDP and ZeRO hold the weights and watch the
graph there. Outside of that call the model is untouched: generation, evaluation, saving and copying see nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import in_eval_mode, output_embedding
from hf_ls.losses._rows import Observer, RowLoss
from hf_ls.losses.cross_entropy import logits_of, smoothed_terms
from hf_ls.losses.linear import LinearTerms, linear_smoothed_terms
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.batch import Batch, copied

# What a config calls the number which multiplies, divides or caps the logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; FalconH1; MuseGlimmer
DIVISORS = ("logits_scaling",)  # Granite
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


class HeadLoss(NamedTuple):
    """What one logits-free forward gives; the parts are detached, unweighted and shaped as the labels, in nats."""

    loss: Tensor  # a scalar with its graph
    nll: Tensor
    smoothing_term: Tensor
    outputs: Any  # of the model; its logits are empty


class PostProcessing(NamedTuple):
    """What a model does to x = h·Wᵀ + b: logits = c·tanh(s·x/c) + final bias."""

    logit_scale: float  # s > 0
    softcap: float | None  # c > 0
    final_bias: Tensor | None  # [K]

    def apply(self, x: Tensor) -> Tensor:
        """The logits which the model makes of x [..., K]."""
        z = x * self.logit_scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.final_bias is None else z + self.final_bias.to(z)


class LogitsFreeHead:
    """The language-model head of a model, ready to return losses instead of logits.

    Exact for an output embedding which is a plain linear layer, tied or not, whose logits are only scaled, soft-capped
    or biased afterwards. `probe` makes sure of that; call it before the first use.

    Raises: ValueError with the reason when the head of the model cannot be used; the caller then takes the dense path.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the head of `model`, wrapped or not."""
        if _is_compiled(model):
            raise ValueError("expected an eager model, got a compiled one; torch.compile keeps the logits path")
        if isinstance(model, nn.DataParallel):
            raise ValueError("expected one device per process, got nn.DataParallel; launch with torchrun or accelerate")
        self.model = unwrap_model(model)
        head = output_embedding(model)
        if head is None:
            raise ValueError(f"expected a language-model head, got none in {type(self.model).__name__}; its logits are small")
        self.head = _plain_linear(head)
        self.post_processing = _post_processing(self.model)

    @property
    def classes(self) -> int:
        """The number of logits K, also where ZeRO-3 has divided the weight and left an empty one between two forwards."""
        return getattr(self.head.weight, "ds_shape", self.head.weight.shape)[0]

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
    ) -> HeadLoss:
        """One forward of `model` on inputs without labels, with the smoothed loss of the head, in nats.

        loss = Σ w·loss / num_items_in_batch, or / Σ w without a count. Shapes: labels [B, T] aligned with the logits
        (shifted already for a causal model), token_weight [B, T].

        Args:
            model: this head's model as wrapped by DDP or FSDP, or itself.
            objective: another loss per row, as in `linear.linear_smoothed_cross_entropy`.
            observer: sees the logits and labels of the kept items, a chunk at a time.

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
            terms = linear_smoothed_terms(
                hidden,
                self.head.weight,
                labels,
                RowLoss(smoothing, objective, logit_scale=scale, softcap=softcap, observer=observer),
                bias=_one_bias(self.head.bias, final_bias, scale),
                token_weight=token_weight,
                num_items_in_batch=num_items_in_batch,
            )
            found.append(terms)
            # Empty, but in the graph of the loss: FSDP and ZeRO hang their backward hooks on what a module returns.
            return terms.loss.reshape(1)[:0].reshape(0, *hidden.shape[1:-1], self.head.weight.shape[0]).to(hidden.dtype)

        def with_loss(outputs: Any) -> Any:
            if len(found) != 1:
                raise ValueError(f"expected one call of the head in a forward, got {len(found)}; it is not used as a layer")
            logits = logits_of(outputs)
            if logits.numel() or not isinstance(outputs, dict):
                raise ValueError(f"expected a ModelOutput with empty logits, got {type(outputs).__name__} {tuple(logits.shape)}")
            outputs["loss"] = found[0].loss + logits.sum().to(found[0].loss.dtype)
            return outputs

        with self._replaced(head_forward, with_loss):
            outputs = model(**inputs)
        return HeadLoss(outputs["loss"], found[0].nll, found[0].smoothing_term, outputs)

    @torch.no_grad()
    def probe(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Compare with the model's own logits, in evaluation mode and without random numbers: three small forwards.

        First what the model makes of known logits, whatever its weights (a new head's are so small that a factor would
        not be seen); then the loss of its hidden states against that of its own logits. Shapes: labels [B, T] aligned.

        Raises: ValueError with the reason when they differ.
        """
        with in_eval_mode(model):
            own = logits_of(model(**copied(inputs)))
            known, processed = self._known_logits(model, inputs)
            if processed.shape != known.shape:
                raise ValueError(f"expected logits {tuple(known.shape)} as the head makes them, got {tuple(processed.shape)}")
            smoothing = Smoothing(0.5)
            try:
                here = self(model, copied(inputs), labels, smoothing)
            except (RuntimeError, IndexError, TypeError) as error:
                raise ValueError(
                    f"expected a forward which can do with empty logits, got {type(error).__name__}: {error}"
                ) from error
        if own.shape[-1] != self.classes:
            raise ValueError(f"expected {self.classes} logits as the head has rows, got {own.shape[-1]}")
        tolerance = 2e-2 if known.dtype in (torch.float16, torch.bfloat16) else 1e-4
        exact = torch.promote_types(processed.dtype, torch.float32)
        _check_close("logits after the head", self.post_processing.apply(known.to(exact)), processed.to(exact), tolerance)
        dense = smoothed_terms(own, labels, smoothing)
        _check_close("nll", here.nll, dense.nll, tolerance)
        _check_close("smoothing term", here.smoothing_term, dense.smoothing_term, tolerance)

    def _known_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Made-up logits in [−8, 8] put in the place of the head's, and what the model returns for them."""
        put: list[Tensor] = []

        def head_forward(hidden: Tensor) -> Tensor:
            shape, weight = hidden.shape[:-1], self.head.weight
            angle = torch.arange(shape.numel() * weight.shape[0], device=hidden.device, dtype=torch.float32)
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            put.append((8 * angle.cos()).reshape(*shape, -1).to(dtype))
            # The model may change its logits in place.
            return put[0].clone()

        with self._replaced(head_forward, lambda outputs: outputs):
            outputs = model(**copied(inputs))
        if len(put) != 1:
            raise ValueError(f"expected one call of the head in a forward, got {len(put)}; it is not used as a layer")
        return put[0], logits_of(outputs)

    @contextmanager
    def _replaced(self, head_forward: Callable[[Tensor], Tensor], finish: Callable[[Any], Any]) -> Iterator[None]:
        """The head's forward replaced, and `finish` applied to the outputs inside the model's own forward."""
        original = self.model.forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            return finish(original(*args, **kwargs))

        with _forward_of(self.head, head_forward), _forward_of(self.model, model_forward):
            yield


def head_for(wrapped: nn.Module, model: nn.Module, small: Batch) -> tuple[LogitsFreeHead | None, str | None]:
    """The head of a model after its probe on a small batch, or the reason why it cannot be used. All processes together.

    One process on the other path would leave the rest alone in collective forwards: the reason of any is that of all.
    """
    head, error = None, None
    try:
        head = LogitsFreeHead(wrapped)
        head.probe(model, small.for_model(model), small.labels)
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


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def _plain_linear(head: nn.Module) -> nn.Linear:
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"expected a plain nn.Linear as output embedding, got {kind}: an adapter, or a quantised head")
    return head


def _check_weight(weight: Tensor) -> None:
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(f"expected a plain tensor as the head's weight, got {type(weight).__name__}: sharded or quantised")


def _post_processing(model: nn.Module) -> PostProcessing:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config(decoder=True)

    def named(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value > 0]

    scale = 1.0
    for value in named(MULTIPLIERS):
        scale *= value
    for value in named(DIVISORS):
        scale /= value
    bias, softcap = getattr(model, "final_logits_bias", None), next(iter(named(CAPS)), None)
    if isinstance(bias, Tensor) and softcap is not None:
        raise ValueError("expected a final bias or a soft-cap, got both; no model is known which has them")
    return PostProcessing(scale, softcap, bias.flatten() if isinstance(bias, Tensor) else None)


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
            "the logits; the model does something to its logits that its config does not name"
        )
