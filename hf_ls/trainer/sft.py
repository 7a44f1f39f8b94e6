"""Supervised fine-tuning with TRL: one forward a step, no logits, TRL's own metrics.

TRL prepares the data; here are the Trainer, its config, and entropy and top-1 accuracy from logits seen in pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_ls.common.errors import extra
from hf_ls.losses.objectives import OBJECTIVES
from hf_ls.trainer.arguments import LabelSmoothingArguments
from hf_ls.trainer.mixin import LabelSmoothingMixin

with extra("trl", "LabelSmoothingSFTTrainer"):
    from trl import SFTConfig, SFTTrainer

logger = logging.getLogger(__name__)


# SFTConfig first: a dataclass takes its defaults from the first base which has them, and TRL changes those of the Trainer.
@dataclass
class LabelSmoothingSFTConfig(SFTConfig, LabelSmoothingArguments):
    """`trl.SFTConfig` with the settings of `LabelSmoothingArguments`."""

    def __post_init__(self) -> None:
        """As TRL, whose own default (1.16) stands under a name of which transformers (5.24) warns."""
        if self.gradient_checkpointing and getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = True
        super().__post_init__()

    @classmethod
    def of(cls, training: TrainingArguments, **settings: Any) -> LabelSmoothingSFTConfig:
        """Other arguments of a Trainer, as they were settled, with TRL's settings beside them."""
        made = cls(output_dir=training.output_dir, use_cpu=training.use_cpu, bf16=False, report_to=[], **settings)
        vars(made).update({name: value for name, value in vars(training).items() if name not in settings})
        return made


class TokenMetrics:
    """Sums of the entropy −Σ p·log p (nats) and of the top-1 hits over logits [m, K] with labels [m], piece by piece."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)

    @torch.no_grad()
    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        """Add some rows."""
        entropy = torch.special.entr(logits.softmax(-1)).sum()
        hits = (logits.argmax(-1) == labels).sum()
        self.sums += torch.stack([entropy.to(self.sums), hits.to(self.sums), self.sums.new_tensor(len(labels))])


class _LossOrLogits(SFTTrainer):
    """TRL's trainer with evaluation steps of our own: TRL (1.16) has announced to give its own no logits from 2.0 on."""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss, and logits and labels as far as somebody asks for them, which cost another forward or [B, T, V] numbers."""
        inputs = self._prepare_inputs(inputs)
        if any(inputs.get(name) is None for name in self.label_names):
            return Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"].detach(), inputs[self.label_names[0]].detach()


class LabelSmoothingSFTTrainer(LabelSmoothingMixin, _LossOrLogits):  # type: ignore[misc]
    """`trl.SFTTrainer` with label smoothing done right; see `LabelSmoothingMixin`.

    TRL's own smoothing runs two forwards a step, one of them with logits [B, T, V]. Here it is one, without logits, and so
    are evaluations whose logits nobody asked for. Logs TRL's `entropy` and `mean_token_accuracy` (means over the labels of a
    micro-batch, over all processes) and `num_tokens`, taken from the chunks of logits which the loss makes anyway; because of
    them a GPU keeps to the chunk loop. Masks of prompts and users, packing and padding-free batches, PEFT: as in TRL. Examples
    which TRL drops, because `max_length` leaves no token to learn, are counted in a warning.

    TRL's `loss_type="dft"` is here `label_smoothing_objective="dft"`, with the NLL in evaluations.

    Raises: ValueError for a `loss_type` other than "nll" and where no example is left; TypeError for arguments which are no
    `SFTConfig`; as the mixin.
    """

    _arguments_class: type[TrainingArguments] = LabelSmoothingSFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if given is not None and not isinstance(given, SFTConfig):
            raise TypeError(f"expected LabelSmoothingSFTConfig or trl.SFTConfig, got {type(given).__name__}; use one of them")
        if given is not None and given.loss_type != "nll":
            named = given.loss_type in OBJECTIVES
            remedy = f"set label_smoothing_objective={given.loss_type!r}, the same loss" if named else "leave it out"
            raise ValueError(f"expected loss_type='nll', got {given.loss_type!r}; {remedy}")
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **options: Any) -> Any:
        """As TRL, which cuts examples to `max_length` and drops those without a label left, without a word."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **options)
        if packing or not (isinstance(dataset, Dataset) and isinstance(prepared, Dataset)):
            return prepared  # packs and streams have no examples to count
        name = options.get("dataset_name") or (rest[-1] if rest else "train")
        lost = len(dataset) - len(prepared)
        if lost and not len(prepared):
            raise ValueError(
                f"expected {name} examples with a token to learn within max_length={args.max_length}, got none of {lost}; raise "
                "max_length, or shorten the prompts"
            )
        if lost:
            logger.warning(
                "%s: %d of %d examples are dropped, because max_length=%d leaves no token of them to learn; raise max_length, or "
                "shorten their prompts",
                name, lost, len(dataset), args.max_length,
            )  # fmt: skip
        return prepared

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer.get_eval_dataloader`, see `_rows_apart`."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._rows_apart(chosen[next(iter(chosen))] if isinstance(chosen, dict) else chosen):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `Trainer.get_test_dataloader`, see `_rows_apart`."""
        with self._rows_apart(test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _rows_apart(self, dataset: Any) -> Iterator[None]:
        """Batches with padding of an evaluation which is not packed, where training is: intervals are over whole examples."""
        before: Any = self.data_collator
        columns, packs = getattr(dataset, "column_names", None) or (), getattr(self.args, "packing", False)
        if getattr(before, "padding_free", False) and packs and "seq_lengths" not in columns:
            self.data_collator = replace(before, padding_free=False)
        try:
            yield
        finally:
            self.data_collator = before

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LabelSmoothingMixin.compute_loss`, adding to TRL's metrics."""
        inputs = self._as_trl(inputs)
        seen = TokenMetrics(self.accelerator.device)
        self._observer = seen
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        finally:
            self._observer = None
        self._log_metrics(inputs, seen, training=not self._is_evaluation(model))
        return result

    def _log_metrics(self, inputs: dict[str, Any], seen: TokenMetrics, *, training: bool) -> None:
        metrics = self._metrics["train" if training else "eval"]
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["position_ids"].shape[1])
        local = torch.cat([seen.sums, tokens.reshape(1).to(seen.sums)])
        entropy, hits, count, total = self.accelerator.gather(local[None]).sum(0).tolist()
        metrics["entropy"].append(entropy / count if count else 0.0)
        metrics["mean_token_accuracy"].append(hits / count if count else 0.0)
        if training:
            self._total_train_tokens += int(total) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]

    def _check_against_model(self, batches: list[dict[str, Any]]) -> None:
        super()._check_against_model([self._as_trl(inputs) for inputs in batches])

    def _as_trl(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Without a cache packed sequences are kept apart; vision-language models take the router flag only so.
        return {**inputs, "use_cache": False} | ({"output_router_logits": True} if self.aux_loss_enabled else {})

    def _training_loss(self, *args: Any) -> tuple[Tensor, Any]:
        loss, outputs = super()._training_loss(*args)
        if self.aux_loss_enabled:
            auxiliary = outputs["aux_loss"].detach()
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(auxiliary).mean().item())
        return loss, outputs
