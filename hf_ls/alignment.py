"""Which label a logit predicts, and whether a model's loss is a cross entropy at all.

Owns: the refusal of unsuitable tasks, decoder inputs, and the first-batch check against the model's own loss.
Does not own: the loss (`losses`) or when the check runs (`trainer`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from hf_ls.losses import logits_of, shift_if, smoothed_terms
from hf_ls.smoothing import Smoothing


class LossGap(NamedTuple):
    """The model's own loss beside the plain NLL without and with the causal shift, nats; None where it cannot be had."""

    own: float | None
    unshifted: float
    shifted: float | None
    tolerance: float


def check_supported(model: nn.Module, label_names: list[str]) -> None:
    """Refuse tasks in which label smoothing over one softmax has no meaning.

    Raises: ValueError for multi-label or regression heads and for models with several label inputs.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        raise ValueError(
            f"expected one class per example, got problem_type={problem!r}; use transformers.Trainer, or set "
            "config.problem_type='single_label_classification' if each example has exactly one class"
        )
    if type(model).__name__.endswith("ForSequenceClassification") and getattr(config, "num_labels", 2) < 2:
        raise ValueError("expected num_labels >= 2, got 1, which is a regression head; load the model with num_labels=2 or more")
    if len(label_names) != 1:
        raise ValueError(
            f"expected one label input, got {label_names}; {type(model).__name__} is not supported, use transformers.Trainer"
        )


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
def model_loss_gap(model: nn.Module, inputs: dict[str, Any], label_name: str) -> LossGap | None:
    """Compare the model's own loss on one batch, auxiliary losses taken off, with the NLL of its logits.

    Two forwards in evaluation mode: no dropout, no random numbers drawn. None when every label is ignored.

    Raises: ValueError/TypeError as `smoothed_terms`, and when the model returns no logits.
    """
    labels = inputs[label_name]
    if not bool((labels != -100).any()):
        return None
    training = model.training
    model.eval()
    try:
        bare = model(**decoder_inputs(model, {name: value for name, value in inputs.items() if name != label_name}, labels))
        # Before the model sees them: wrong labels end in an index error there, or in a crashed GPU.
        unshifted = _mean_nll(logits_of(bare), labels)
        outputs = model(**inputs)
    finally:
        model.train(training)
    own = outputs.get("loss") if isinstance(outputs, dict) else None
    logits = logits_of(bare)
    if own is not None and isinstance(outputs, dict) and outputs.get("aux_loss") is not None:
        own = own - getattr(model.config, "router_aux_loss_coef", 0.0) * outputs["aux_loss"]
    low = torch.finfo(logits.dtype).eps > 1e-6 or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return LossGap(
        None if own is None else float(own),
        unshifted,
        _mean_nll(*shift_if(True, logits, labels)) if labels.dim() == 2 else None,
        2e-2 if low else 1e-4,
    )


def resolve_shift(model: nn.Module, gap: LossGap) -> bool:
    """Whether the labels are shifted, by which NLL agrees with the model's own loss.

    Raises: ValueError when neither agrees, or when there is no own loss to ask and the labels are sequences.
    """
    name = type(model).__name__
    if gap.own is None:
        if gap.shifted is None:
            return False
        raise ValueError(
            f"expected {name} to return a loss to find its label shift, got none; pass shift_labels=True (decoder-only) or False"
        )
    distances = {False: abs(gap.own - gap.unshifted)}
    if gap.shifted is not None:
        distances[True] = abs(gap.own - gap.shifted)
    shift = min(distances, key=lambda key: distances[key])
    if not distances[shift] <= gap.tolerance * max(1.0, abs(gap.own)):
        shifted = "" if gap.shifted is None else f" ({gap.shifted:.6g} with labels shifted)"
        raise ValueError(
            f"expected the loss of {name} to be the cross entropy of its logits, got {gap.own:.6g} against {gap.unshifted:.6g}"
            f"{shifted}; use transformers.Trainer for another loss, or pass shift_labels=True/False to train with cross entropy"
        )
    return shift


def _mean_nll(logits: Tensor, labels: Tensor) -> float:
    kept = labels != -100
    return float(smoothed_terms(logits, labels, Smoothing(0.0)).nll.sum() / kept.sum().clamp_min(1))
