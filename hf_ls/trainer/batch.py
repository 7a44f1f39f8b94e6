"""What one micro-batch says, read once: its labels, which of them count and how much, and what the model gets.

Everything in a `Batch` and everything which goes from it into a model is a copy: models write into what they are given (FSMT
turns ignored labels into padding in place), and the caller's batch is read again for its labels, metrics and predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import IGNORE_INDEX, no_cache
from hf_ls.data.soft_labels import SOFT
from hf_ls.losses._checks import check_range, item_weights, next_labels
from hf_ls.trainer.shift import decoder_inputs
from hf_ls.trainer.spans import POSITIONS, positions_in

# What padding-free collators call labels which are aligned with the logits already.
SHIFTED = "shift_labels"
# Labels in the first-batch checks: enough to tell one position from the next, few enough for their logits to be small.
PROBE_LABELS = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch as the loss needs it.

    Attributes:
        labels: int64, one per row of logits, shifted already; −100 where nothing counts. [B], [B, T], or [B, 2] for the start
            and end positions of answers.
        weight: shaped as the labels: 0 where ignored, else 1 or the weight of the class.
        given: the labels before the shift, int64: what decoder inputs and the model's own loss are made of.
        names: what the batch calls its labels.
        others: its other columns, which are the caller's own: `for_model` copies them.
        soft: the distribution over the classes of each label [..., K], shifted as the labels; None without `soft_labels`.
    """

    labels: Tensor
    weight: Tensor
    given: Tensor
    names: tuple[str, ...]
    others: Mapping[str, Any]
    soft: Tensor | None = None

    @classmethod
    def read(
        cls,
        inputs: Mapping[str, Any],
        label_names: Sequence[str],
        *,
        shift: bool = False,
        class_weight: Tensor | None = None,
        prompt: int = 0,
    ) -> Batch:
        """Read the columns of a batch.

        Args:
            label_names: one name, or `start_positions` and `end_positions`.
            shift: whether the logits of position t predict label t+1; `shift_labels` in the batch are aligned already.
            class_weight: [K].
            prompt: how many virtual tokens stand before the labels, in the logits only.

        Raises: ValueError for a batch without labels, for start and end positions as `positions_in`, and for labels outside of
        the class weights; TypeError for floats: multi-label or soft targets, regression.
        """
        others = {name: value for name, value in inputs.items() if name not in (*label_names, SHIFTED, SOFT)}
        if len(label_names) == 2:
            given = labels = positions_in(inputs)
            names: tuple[str, ...] = tuple(label_names)
        else:
            name = label_names[0]
            names = (name,) if inputs.get(name) is not None else (name, SHIFTED)
            given = _class_ids(inputs, names[-1], name)
            aligned = given if names[-1] == SHIFTED or inputs.get(SHIFTED) is None else _class_ids(inputs, SHIFTED, name)
            labels = nn.functional.pad(aligned, (prompt, 0), value=IGNORE_INDEX) if prompt else aligned
            labels = next_labels(labels) if shift and inputs.get(SHIFTED) is None else labels
        soft = inputs.get(SOFT)
        if soft is not None:
            soft = _distributions(soft, given, shift and inputs.get(SHIFTED) is None, prompt)
        if class_weight is not None:
            check_range(labels, labels != IGNORE_INDEX, len(class_weight), IGNORE_INDEX)
        exact = torch.float64 if labels.device.type != "mps" else torch.float32
        return cls(labels, item_weights(labels, class_weight, IGNORE_INDEX, exact), given, names, others, soft)

    @property
    def spans(self) -> bool:
        """Whether the labels are start and end positions."""
        return "start_positions" in self.names

    @property
    def aligned(self) -> bool:
        """Whether the labels came as `shift_labels` alone."""
        return SHIFTED in self.names

    @property
    def kept(self) -> Tensor:
        """Which labels count, bool."""
        return self.labels != IGNORE_INDEX

    @property
    def count(self) -> Tensor:
        """What a sum of losses is divided by: Σ weight; of starts and ends apart [2], since the mean of each is half the loss."""
        return 2 * self.weight.sum(0) if self.spans else self.weight.sum()

    @property
    def tells(self) -> bool:
        """Whether the model's own loss can be compared on this batch: some label counts (a start and an end)."""
        found = self.given != IGNORE_INDEX
        return bool(found.any(0).all() if self.spans else found.any())

    def factors(self, num_items_in_batch: Any, processes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight of each item, and what their sum is multiplied by; `processes` average their gradients afterwards."""
        weight = self.weight.to(dtype)
        count = self.count if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 if num_items_in_batch is None else processes
        # A batch in which every label is ignored has count 0 and sum 0.
        per_count = scale / torch.as_tensor(count, dtype=dtype, device=weight.device).clamp_min(1e-30)
        return (weight * per_count, per_count.new_ones(())) if per_count.dim() else (weight, per_count)

    def items(self, num_items_in_batch: Any) -> Tensor:
        """How many items the optimizer step has, as far as is known: its count, or that of this batch."""
        return self.count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=self.labels.device)

    def named(self, error: ValueError, step: int, process: int) -> ValueError:
        """An error about NaN logits with the batch which has them; any other error as it is."""
        if "NaN" not in str(error):
            return error
        ids = self.others.get("input_ids")
        first = ids[0, :8].tolist() if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) else None
        begins = "" if first is None else f", whose first row begins with the ids {first}"
        return ValueError(f"{error} (step {step}, process {process}, a micro-batch of {len(self.labels)} rows{begins})")

    def for_model(self, model: nn.Module) -> dict[str, Any]:
        """Fresh inputs for one forward which returns logits: no labels, and decoder inputs where the model needs them."""
        inputs, config = copied(self.others), getattr(model, "config", None)
        if self.spans or not getattr(config, "is_encoder_decoder", False):
            return inputs
        if "decoder_input_ids" not in inputs:
            inputs = decoder_inputs(model, inputs, self.given.clone())
        return inputs | no_cache(model) if getattr(config, "use_cache", False) else inputs

    def label_inputs(self) -> dict[str, Tensor]:
        """Fresh labels as the model's own loss takes them; an ignored position of an answer lies beyond every text."""
        if self.spans:
            sides = self.given.masked_fill(self.given == IGNORE_INDEX, 1 << 30).unbind(1)
            return {name: side.clone() for name, side in zip(POSITIONS, sides, strict=True)}
        return {name: self.given.clone() for name in self.names}

    def with_labels(self, model: nn.Module) -> dict[str, Any]:
        """Fresh inputs for one forward which returns the model's own loss too."""
        return self.for_model(model) | self.label_inputs()

    def with_some_label(self) -> Batch:
        """The batch with class 0 as every label, for a process without any which must take part in collective forwards."""
        labels, given = torch.zeros_like(self.labels), torch.zeros_like(self.given)
        return replace(self, labels=labels, given=given, weight=torch.ones_like(self.weight))

    def small(self, enough_labels: int = PROBE_LABELS) -> Batch:
        """A valid small batch for the first-batch checks: one row, cut after that many labels.

        The row which holds them earliest, or which holds the most. Columns are cut only from tensors shaped as the labels. A
        batch with anything but tensors [B] and [B, T] (images, packed lengths, 4-d masks) stays whole.
        """
        target = self.given
        tensors = [value for value in self.others.values() if isinstance(value, Tensor)]
        if self.spans or target.dim() != 2 or not len(target):
            return self
        if any(not 1 <= t.dim() <= 2 or len(t) != len(target) for t in tensors):
            return self
        count = (target != IGNORE_INDEX).cumsum(1)
        enough = count >= enough_labels
        # argmax finds the first column with enough labels; rows without enough count as full length.
        columns = torch.where(enough.any(1), enough.int().argmax(1) + 1, target.shape[1])
        order = columns * (target.shape[1] + 1) - count[:, -1]
        row = int(order.argmin())
        stop = 64 * -(-int(columns[row]) // 64)  # kernels and block-sparse attention like round lengths

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value[row : row + 1, :stop] if value.shape == target.shape else value[row : row + 1]

        others = {name: cut(value) for name, value in self.others.items()}
        end = stop + self.labels.shape[1] - target.shape[1]  # virtual tokens stand in front
        labels, weight = (part[row : row + 1, :end] for part in (self.labels, self.weight))
        return replace(self, labels=labels, weight=weight, given=cut(target), others=others)


def _distributions(soft: Tensor, labels: Tensor, shift: bool, prompt: int) -> Tensor:
    """The soft labels [..., K] at the places of the labels they stand beside."""
    if not soft.is_floating_point() or soft.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected `{SOFT}` as floats {(*labels.shape, 'K')}, one distribution per label, got {soft.dtype} "
            f"{tuple(soft.shape)}; divide counts by their sum (hf_ls.priors.soft_targets)"
        )
    soft = nn.functional.pad(soft, (0, 0, prompt, 0)) if prompt else soft
    return nn.functional.pad(soft, (0, 0, 0, 1))[..., 1:, :] if shift else soft


def check_class_weight(class_weight: Tensor | None, classes: int) -> None:
    """Refuse class weights for another number of classes than the logits have.

    Raises: ValueError.
    """
    if class_weight is not None and len(class_weight) != classes:
        raise ValueError(f"expected class_weight [{classes}], one weight per logit, got {tuple(class_weight.shape)}")


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with every tensor in them copied, in lists, tuples and mappings too."""
    return {name: recursively_apply(Tensor.clone, value) for name, value in inputs.items()}


def with_named_labels(inputs: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """The inputs with their labels under the name by which a Trainer asks for them, where they come as `shift_labels` alone."""
    if inputs.get(SHIFTED) is None or not label_names or inputs.get(label_names[0]) is not None:
        return inputs
    return {**inputs, label_names[0]: nn.functional.pad(inputs[SHIFTED], (1, 0), value=IGNORE_INDEX)[:, :-1]}


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT's prompt tuning puts before the first token, in the logits too; 0 for all else."""
    config = getattr(unwrap_model(model), "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.task_type != "CAUSAL_LM":
        return 0
    # Prefixes go into the cache of the attention and leave the positions alone.
    return 0 if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") else config.num_virtual_tokens


def _class_ids(inputs: Mapping[str, Any], name: str, expected: str) -> Tensor:
    """The labels of a batch as int64, a copy: 8-bit labels wrap around where they are compared with −100 or K."""
    labels = inputs.get(name)
    if labels is None:
        raise ValueError(
            f"expected `{expected}` in the batch, got {sorted(inputs)}; name the label column so, or set "
            "TrainingArguments(label_names=[...])"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        given = f"expected integer labels, got {labels.dtype} {tuple(labels.shape)}"
        if labels.dim() > 1 and labels.shape[-1] > 1:
            raise TypeError(
                f"{given}; use labels.argmax(-1) if each example has exactly one class, or transformers.Trainer for multi-label "
                f"classification, or name soft targets `{SOFT}` beside `{expected}` and set label_smoothing_soft_labels=True"
            )
        raise TypeError(f"{given}; cast class ids to long, or use transformers.Trainer for regression")
    return labels.to(torch.int64, copy=True)
