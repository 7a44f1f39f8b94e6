"""Extractive question answering: the labels are two positions in the text, the classes are its tokens.

The loss is that of the models: the mean over starts and the mean over ends, halved. Both softmaxes run over all T positions of
a row, padding too, as the models have it. The smoothing mass stays on tokens of the text, see `span_terms`. An evaluation counts
each labelled start and each labelled end as one item; its mean NLL is the models' loss where no answer is cut in two.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ls.common.models import IGNORE_INDEX, base_model, in_eval_mode
from hf_ls.losses.cross_entropy import SmoothedTerms, logits_of, smoothed_terms
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.shift import LossGap, loss_gap, loss_tolerance, own_loss

if TYPE_CHECKING:
    from hf_ls.trainer.batch import Batch

POSITIONS = ("start_positions", "end_positions")
# Models rule positions out by a logit of -1e6 (BigBird: the question) or of the least float (Splinter: padding). No logit which
# a model means is as far below the largest one; mass on a ruled-out position would add 1e6·ε to the loss.
_RULED_OUT = 1e4


def is_span_task(model: nn.Module, label_names: Iterable[str]) -> bool:
    """Whether the labels are a start and an end position.

    Raises: ValueError for one of the two without the other, and for beam-search models (XLNet, XLM, Flaubert).
    """
    names = list(label_names)
    if not set(names) & set(POSITIONS):
        return False
    name = type(base_model(model)).__name__
    if sorted(names) != sorted(POSITIONS):
        raise ValueError(
            f"expected the label names {list(POSITIONS)} for question answering, got {names}; drop label_names from the "
            "arguments, or name both"
        )
    if "is_impossible" in inspect.signature(base_model(model).forward).parameters:
        raise ValueError(
            f"expected a model with start_logits and end_logits, got {name}, which searches with beams and returns others; use "
            f"{name}Simple, or transformers.Trainer"
        )
    return True


def check_span_settings(trainer: Any) -> None:
    """Refuse settings of a question answering trainer which mean nothing where classes are positions of one text.

    Raises: ValueError for a prior, class weights, another objective than the smoothed cross entropy, mixup, a label shift, the
    logits-free loss, generation, virtual tokens in front of the text, and models which return tuples.
    """
    if not trainer._spans:
        return
    name, criterion = type(base_model(trainer.model)).__name__, trainer.criterion
    prompt = getattr(trainer.model, "active_peft_config", None)
    refused = (
        (
            trainer.smoothing.prior is not None,
            "no prior",
            "one",
            "leave it out: the mass is uniform over the tokens of each text",
        ),
        (trainer.class_weight is not None, "no class_weight", "one", "leave it out"),
        (
            not criterion.plain,
            "the objective 'smoothed_ce' without z_loss",
            f"{criterion.name!r}" if criterion.name != "smoothed_ce" else "a z_loss",
            "others spread mass over padding or learn one target per class; set label_smoothing_objective='smoothed_ce'",
        ),
        (trainer.mixup is not None, "no mixup", "mixup_alpha > 0", "two texts have no common positions; set mixup_alpha=0"),
        (bool(trainer._given_shift), "shift_labels None or False", "True", "a position labels its own logit; leave it out"),
        (
            trainer._logits_free == "on",
            "label_smoothing_logits_free 'auto' or 'off'",
            "'on'",
            "there is one logit per token, nothing to save; set 'auto'",
        ),
        (
            getattr(trainer.args, "predict_with_generate", False),
            "predict_with_generate=False",
            "True",
            "the answer is a part of the text, nothing is generated; set it to False",
        ),
        (
            prompt is not None and prompt.is_prompt_learning and prompt.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"),
            "no virtual tokens before the text",
            f"{getattr(prompt, 'peft_type', None)}",
            "they move every position; use LoRA or prefix tuning",
        ),
        (
            getattr(getattr(trainer.model, "config", None), "return_dict", True) is False,
            "config.return_dict=True",
            "False",
            "start and end logits are found by name; set it to True",
        ),
    )
    for found, expected, got, remedy in refused:
        if found:
            raise ValueError(f"expected {expected} for question answering ({name}), got {got}; {remedy}")


def check_both_positions(inputs: Mapping[str, Any]) -> None:
    """Refuse a batch with one of the positions, which a stock Trainer evaluates without a loss and without a word.

    Raises: ValueError naming the missing one.
    """
    missing = [name for name in POSITIONS if inputs.get(name) is None]
    if len(missing) == 1:
        raise ValueError(f"expected `start_positions` and `end_positions` in the batch, got no `{missing[0]}`; add that column")


def positions_in(inputs: Mapping[str, Any]) -> Tensor:
    """The start and end position of each row [B, 2], −100 where ignored.

    Ignored are positions ≥ T, answers which were cut off, as the models' own losses have it, and −100. Those losses take every
    negative position as 0, the first token, in silence; here any but −100 is an error.

    Raises: ValueError for a missing column, other shapes than [B] or [B, 1], and negative positions; TypeError for floats.
    """
    check_both_positions(inputs)
    sides = []
    for name in POSITIONS:
        given = inputs.get(name)
        if given is None:
            raise ValueError(
                f"expected `{POSITIONS[0]}` and `{POSITIONS[1]}` in the batch, got {sorted(inputs)}; add both columns (tokens of "
                "the answer, from the tokenizer's offset_mapping)"
            )
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"expected integer `{name}`, got {given.dtype}; give token indices as long")
        side = given.squeeze(-1) if given.dim() == 2 and given.shape[1] == 1 else given
        if side.dim() != 1:
            raise ValueError(f"expected one position per row in `{name}` [B], got {tuple(given.shape)}; choose one answer each")
        sides.append(side)
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"expected as many starts as ends, got {len(sides[0])} and {len(sides[1])}; check the collator")
    positions = torch.stack(sides, 1).long()
    negative = positions[(positions < 0) & (positions != IGNORE_INDEX)]
    if len(negative):
        raise ValueError(
            f"expected positions >= 0, or {IGNORE_INDEX} for ignored, got {int(negative[0])}; a text without the answer is "
            "labelled by the position of its [CLS] token, usually 0"
        )
    return positions.masked_fill(positions >= _length(inputs), IGNORE_INDEX)


def span_terms(logits: Tensor, labels: Tensor, smoothing: Smoothing, inputs: Mapping[str, Any]) -> SmoothedTerms:
    """The NLL and the smoothing term of each start and end, [B, 2], nats.

    nll = lse(z) − z_y over all T positions, as in the models; smoothing_term = e·(z_y − mean of z over the candidates), with e
    as in `Smoothing` for the uniform prior u = 1/n over them. Shapes: logits [B, 2, T], labels [B, 2].

    The n candidates are the attended positions which the model has not ruled out. Padding gets no mass: otherwise the target
    of a text, and with it the model, would depend on the longest text in its batch, up to telling the model to answer with
    padding. The term is the same however much padding there is; the NLL is as dependent on padding as the model's own loss.

    Raises: as `smoothed_terms`; ValueError for an attention mask which does not fit, or a labelled row without candidates.
    """
    nll = smoothed_terms(logits, labels, Smoothing(0.0)).nll
    if not smoothing.epsilon:
        return SmoothedTerms(nll, torch.zeros_like(nll))
    kept = labels != IGNORE_INDEX
    z, y, allowed = logits[kept].to(nll.dtype), labels[kept].long(), _candidates(logits, inputs)[kept]
    count = allowed.sum(-1, keepdim=True)
    if bool((count == 0).any()):
        raise ValueError("expected a token in every labelled row, got an attention_mask of zeros; drop rows without text")
    prior = allowed.to(z.dtype) / count
    # 0·(−inf) is NaN, but a position without mass must add exactly 0.
    expected = (z.masked_fill(~allowed, 0) * prior).sum(-1)
    term = smoothing.mixing(y, prior) * (z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - expected)
    return SmoothedTerms(nll, nll.new_zeros(nll.shape).masked_scatter(kept, term))


@torch.no_grad()
def span_loss_gap(model: nn.Module, batch: Batch) -> LossGap:
    """The model's own loss beside the mean of its mean start and end NLL, nats. Two forwards in evaluation mode.

    Raises: as `smoothed_terms`.
    """
    labels, kept = batch.given, batch.given != IGNORE_INDEX
    with in_eval_mode(model):
        logits = logits_of(model(**batch.for_model(model)))
        nll = smoothed_terms(logits, labels, Smoothing(0.0)).nll.sum(0) / kept.sum(0)
        alignments = [(side[side != IGNORE_INDEX],) for side in labels.unbind(1)]
        own = own_loss(model, lambda: batch.with_labels(model), alignments, nll.tolist())
    return loss_gap(own, float(nll.mean()), None, loss_tolerance(model, logits))


def _length(inputs: Mapping[str, Any]) -> int:
    """T, the number of tokens in each row."""
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[1]
    raise ValueError(f"expected input_ids in the batch for question answering, got {sorted(inputs)}; give token ids")


def _candidates(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which positions may get smoothing mass, bool, shaped as the logits [B, 2, T]."""
    mask, length = inputs.get("attention_mask"), logits.shape[-1]
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        if mask.dim() != 2 or len(mask) != len(logits) or mask.shape[1] > length:
            raise ValueError(
                f"expected attention_mask [B, T] for logits {tuple(logits.shape)}, got {tuple(mask.shape)}; smoothing has to "
                "know the padding"
            )
        # LayoutLMv3 has logits of its image patches after those of the text; they hold no answer.
        allowed = nn.functional.pad(mask.bool(), (0, length - mask.shape[1]))[:, None].expand_as(logits)
    z = logits.detach().float().masked_fill(~allowed, -torch.inf)
    return allowed & (z > z.amax(-1, keepdim=True) - _RULED_OUT)
