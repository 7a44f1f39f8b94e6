"""Which label a logit predicts, and whether a model's loss is a cross entropy at all.

Here are the refusal of unsuitable tasks, decoder inputs, and the first-batch check against the model's own loss; `batch` reads
the labels, `spans` holds the check of start and end positions.

The rule is explicit. A batch with `shift_labels` is aligned already. Else labels are shifted if the model's own loss is
the cross entropy with a shift, and not if it is the one without; a model whose loss is neither is refused.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import IGNORE_INDEX, base_model, in_eval_mode
from hf_ls.losses.cross_entropy import check_no_probabilities, logits_of, shift_if, smoothed_terms
from hf_ls.losses.smoothing import Smoothing

if TYPE_CHECKING:
    from hf_ls.trainer.batch import Batch

# Losses over all alignments of labels to audio frames; the ends of the names of the classes.
_ALIGNING = ("ForCTC", "ForRNNT", "ForTDT")


class LossGap(NamedTuple):
    """The model's own loss beside the plain NLL without and with the causal shift, nats; None where it cannot be had."""

    own: float | None
    unshifted: float
    shifted: float | None
    tolerance: float

    def agrees(self, nll: float | None) -> bool:
        """Whether the model's own loss is this NLL, up to rounding."""
        if self.own is None or nll is None:
            return False
        return abs(self.own - nll) <= self.tolerance * max(1.0, abs(self.own))

    @property
    def ambiguous(self) -> bool:
        """Whether both alignments give the model's own loss, as with a head of zeros, all of whose logits are alike."""
        return self.agrees(self.unshifted) and self.agrees(self.shifted)


def check_supported(model: nn.Module, label_names: list[str], class_weight: Tensor | None = None, *, spans: bool = False) -> None:
    """Refuse tasks in which label smoothing over one softmax has no meaning; `spans`: two positions are the labels.

    Raises: ValueError for multi-label and regression heads, for losses over alignments (CTC, transducers), for models with
    no or several label inputs, and for class weights of another K.
    """
    inner = base_model(model)
    name, config = type(inner).__name__, getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(
            f"expected one class per example, got problem_type={problem!r}: its classes are separate yes/no decisions, no "
            "distribution whose mass could be spread; use transformers.Trainer, or set "
            "config.problem_type='single_label_classification' if each example has exactly one class"
        )
    if problem == "regression":
        raise ValueError(
            f"expected classes, got problem_type={problem!r}: a number has no distribution to smooth; use transformers.Trainer, "
            "or load the model with num_labels=2 or more and problem_type='single_label_classification'"
        )
    if "Classification" in name and getattr(config, "num_labels", 2) < 2:
        raise ValueError(
            f"expected num_labels >= 2, got {config.num_labels} in {name}, which is a regression head; use transformers.Trainer, "  # type: ignore[union-attr]
            "or load the model with num_labels=2 or more"
        )
    if any(kind.__name__.endswith(_ALIGNING) for kind in type(inner).__mro__):
        raise ValueError(
            f"expected one label per logit, got {name}, whose loss sums over alignments of the labels to audio frames; use "
            "transformers.Trainer, or an encoder-decoder speech model such as Whisper"
        )
    if not label_names:
        parameters = inspect.signature(inner.forward).parameters
        usual = [key for key in ("labels", "start_positions", "end_positions") if key in parameters] or ["labels"]
        raise ValueError(
            f"expected a label input, got none which the Trainer knows of {name}; set TrainingArguments(label_names={usual})"
        )
    if len(label_names) != 1 and not spans:
        raise ValueError(f"expected one label input, got {label_names}; {name} is not supported, use transformers.Trainer")
    # Of other models only the logits tell: the classes of multiple choice are the choices, not `num_labels`.
    classes = getattr(config, "num_labels", None) if "Classification" in name else None
    if class_weight is not None and classes is not None and class_weight.shape != (classes,):
        raise ValueError(f"expected class_weight [{classes}], got {tuple(class_weight.shape)}; one weight per class of the model")


def decoder_inputs(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The inputs with `decoder_input_ids` made from the labels if an encoder-decoder language model lacks them.

    Without labels in its inputs T5 fails misleadingly and BART feeds its source to the decoder in silence.

    Raises: ValueError when the model cannot make them.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or labels.dim() != 2:
        return inputs
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return inputs
    prepare = getattr(unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise ValueError(
            f"expected decoder_input_ids, got none, and {type(model).__name__} cannot make them from labels; use "
            "DataCollatorForSeq2Seq(tokenizer, model=model)"
        )
    return {**inputs, "decoder_input_ids": prepare(labels=labels)}


@torch.no_grad()
def model_loss_gap(model: nn.Module, batch: Batch) -> LossGap:
    """Compare the model's own loss on one batch with some label, auxiliary losses taken off, with the NLL of its logits.

    Two forwards in evaluation mode: no dropout, no random numbers drawn. A batch which has only `shift_labels` is compared
    with the NLL without a further shift.

    Raises: ValueError/TypeError as `smoothed_terms`, and when the model returns no logits, or probabilities instead.
    """
    labels = batch.given
    with in_eval_mode(model):
        logits = logits_of(model(**batch.for_model(model)))
        check_no_probabilities(logits)
        # Before the model sees the labels: wrong ones end in an index error there, or in a crashed GPU.
        unshifted = _mean_nll(logits, labels)
        shifted = _mean_nll(*shift_if(True, logits, labels)) if labels.dim() == 2 and not batch.aligned else None
        own = own_loss(model, batch.with_labels(model))
    return LossGap(own, unshifted, shifted, loss_tolerance(model, logits))


@torch.no_grad()
def counts_first_label(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's own loss counts labels at the first position, which no logit predicts where labels are shifted.

    One forward in evaluation mode. It tells the alignments apart when their losses are the same.
    """
    labels = batch.given
    first = torch.full_like(labels, IGNORE_INDEX)
    first[:, 0] = labels[labels != IGNORE_INDEX][0]
    with in_eval_mode(model):
        own = own_loss(model, batch.for_model(model) | {batch.names[0]: first})
    return own is not None and math.isfinite(own) and own > 1e-3  # else NaN or 0: a mean over nothing


def resolve_shift(model: nn.Module, gap: LossGap, first_counts: bool = False) -> bool:
    """Whether the labels are shifted, by which NLL agrees with the model's own loss; where both do, by `first_counts`.

    Raises: ValueError when neither agrees, or when there is no own loss to ask and the labels are sequences.
    """
    name = type(unwrap_model(model)).__name__
    if gap.own is None:
        if gap.shifted is None:
            return False
        raise ValueError(
            f"expected {name} to return a loss to find its label shift, got none; pass shift_labels=True (decoder-only) or False"
        )
    if gap.ambiguous:
        return not first_counts
    distances = {False: abs(gap.own - gap.unshifted)}
    if gap.shifted is not None:
        distances[True] = abs(gap.own - gap.shifted)
    shift = min(distances, key=lambda key: distances[key])
    if not gap.agrees(gap.shifted if shift else gap.unshifted):
        shifted = "" if gap.shifted is None else f" ({gap.shifted:.6g} with labels shifted)"
        raise ValueError(
            f"expected the loss of {name} to be the cross entropy of its logits, got {gap.own:.6g} against {gap.unshifted:.6g}"
            f"{shifted}; use transformers.Trainer for another loss, or pass shift_labels=True/False to train with cross entropy"
        )
    return shift


def own_loss(model: nn.Module, inputs: dict[str, Any]) -> float | None:
    """The model's own loss without the auxiliary one of its router, nats; None if it returns none."""
    outputs = model(**inputs)
    own = outputs.get("loss") if isinstance(outputs, dict) else None
    return None if own is None else float(own - router_loss(model, outputs))


def router_loss(model: Any, outputs: Any) -> Tensor | float:
    """The auxiliary loss of a mixture-of-experts model as its own loss counts it; 0 for other models."""
    auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
    coefficient = getattr(model.config, "router_aux_loss_coef", None) if auxiliary is not None else None
    return 0.0 if auxiliary is None or coefficient is None else coefficient * auxiliary


def loss_tolerance(model: nn.Module, logits: Tensor) -> float:
    """How far two ways to compute a loss may be apart, relative: half precision or better."""
    low = torch.finfo(logits.dtype).eps > 1e-6 or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return 2e-2 if low else 1e-4


def _mean_nll(logits: Tensor, labels: Tensor) -> float:
    kept = labels != IGNORE_INDEX
    return float(smoothed_terms(logits, labels, Smoothing(0.0)).nll.sum() / kept.sum().clamp_min(1))
