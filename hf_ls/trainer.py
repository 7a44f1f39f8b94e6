"""Trainer integration: one loss path for every epsilon, exact counting, honest evaluation.

Owns: `LabelSmoothingArguments`, `LabelSmoothingMixin`, `LabelSmoothingTrainer`.
Does not own: the loss (`losses`), the calibration sums (`metrics.streaming`), checkpoint choice (`checkpoint`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_ls.alignment import check_supported, decoder_inputs, model_loss_gap, resolve_shift
from hf_ls.losses import item_weights, logits_of, shift_if, smoothed_terms
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.smoothing import Schedule, Smoothing
from hf_ls.statistics import item_statistics

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin is mixed into
else:
    _Trainer = object

IGNORE_INDEX = -100

# Stock Transformers takes every name which does not end in "loss" as greater-is-better and so keeps the worst checkpoint.
LOWER_IS_BETTER = ("loss", "nll", "perplexity", "brier", "ece", "mce", "aurc")


@dataclass
class LabelSmoothingArguments(TrainingArguments):
    """`TrainingArguments` in which `label_smoothing_factor` is ε, with its convention and schedule beside it.

    Raises: ValueError for ε outside [0, 1), an unknown convention or schedule, or a lower-is-better
    `metric_for_best_model` with `greater_is_better=True`.
    """

    label_smoothing_convention: str = field(
        default="all",
        metadata={"help": "Where epsilon goes: 'all' K classes (PyTorch, Hugging Face) or the K-1 'wrong' ones (Megatron, T5X)."},
    )
    label_smoothing_schedule: str = field(
        default="constant", metadata={"help": "How epsilon moves with the step: constant, linear or cosine."}
    )
    label_smoothing_final_factor: float = field(
        default=0.0, metadata={"help": "Epsilon at the last step of a linear or cosine schedule."}
    )
    label_smoothing_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps with epsilon = 0 before smoothing starts."}
    )

    def __post_init__(self) -> None:
        smoothing_of(self)
        if self.greater_is_better is None and is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False
        super().__post_init__()
        check_direction(self)


def smoothing_of(args: TrainingArguments) -> Smoothing:
    """The `Smoothing` which the arguments describe; plain `TrainingArguments` give the "all" convention and a constant ε.

    Raises: as `Smoothing`.
    """
    epsilon = args.label_smoothing_factor
    if not isinstance(args, LabelSmoothingArguments):
        return Smoothing(epsilon)
    kind, warmup = args.label_smoothing_schedule, args.label_smoothing_warmup_steps
    constant = kind == "constant" and not warmup
    schedule = None if constant else Schedule(kind, args.label_smoothing_final_factor, warmup)  # type: ignore[arg-type]
    return Smoothing(epsilon, args.label_smoothing_convention, schedule=schedule)  # type: ignore[arg-type]


def is_lower_better(metric: str | None) -> bool:
    """Whether the last word of a metric name is a loss or a calibration error, as in `eval_test_ece`."""
    if metric is None:
        return False
    return any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)


def check_direction(args: TrainingArguments) -> None:
    """Refuse to keep the checkpoint with the greatest error.

    Raises: ValueError when `metric_for_best_model` is lower-is-better and `greater_is_better` is True.
    """
    if args.greater_is_better and is_lower_better(args.metric_for_best_model):
        raise ValueError(
            f"expected greater_is_better=False for metric_for_best_model={args.metric_for_best_model!r}, got True (plain "
            "TrainingArguments guess it from the name); use LabelSmoothingArguments or set greater_is_better=False"
        )


class LabelSmoothingMixin(_Trainer):
    """Put before a Trainer class: `class MyTrainer(LabelSmoothingMixin, Trainer)`.

    Training minimises Σ w_i·loss_i / Σ w_i over the whole global batch, whatever the micro-batches and processes; ε = 0 and
    ε > 0 run the same lines. It logs `loss` = `nll` + `smoothing_term`. Evaluation reports the unsmoothed `nll`, `brier`,
    `ece` (15 bins), `accuracy` and `signed_gap` over all examples or tokens at once; `eval_loss` equals `eval_nll`.

    Args (keyword, beside the Trainer's own):
        smoothing: a `Smoothing` in place of the one in the arguments (a prior needs this).
        class_weight: [K]; each example counts w_y times.
        shift_labels: whether position t predicts label t+1; None asks the model's own loss on the first batch.

    Raises: ValueError for `compute_loss_func`, two different epsilons, tasks without one label per prediction
    (multi-label, regression, question answering), and a model whose own loss is no cross entropy of its logits.
    """

    # The loss is divided by the item count of the whole accumulated batch, so the Trainer must not divide it again.
    loss_is_scaled_for_ga: bool | None = True
    model: Any

    def __init__(
        self,
        *args: Any,
        smoothing: Smoothing | None = None,
        class_weight: Tensor | None = None,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if training_args is None:
            training_args = kwargs["args"] = LabelSmoothingArguments(output_dir="trainer_output")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "expected no compute_loss_func, got one: a stock Trainer lets it silently replace label smoothing; remove it, "
                "or use it with transformers.Trainer and hf_ls.SmoothedCrossEntropy"
            )
        check_direction(training_args)
        self.smoothing = _one_smoothing(smoothing, training_args)
        self.class_weight = class_weight
        self._shift = shift_labels
        self._checked_loss = shift_labels is not None
        self._statistics: StreamingCalibration | None = None
        self._pending: Tensor | None = None
        self._step_terms: Tensor | None = None
        self._steps_before_terms = 0
        # The parent builds its own smoother from the factor (and fails on models without a config): keep epsilon from it.
        training_args.label_smoothing_factor = 0.0
        try:
            super().__init__(*args, **kwargs)
        finally:
            training_args.label_smoothing_factor = self.smoothing.epsilon
        check_supported(self.model, self.label_names)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The smoothed loss in training, the plain NLL in evaluation; nats per item.

        In training: world size × Σ w·loss / num_items_in_batch (DDP then averages over processes); without a count, and in
        evaluation, the mean over this batch.

        Raises: ValueError for a batch without labels and as `smoothed_terms`.
        """
        labels = self._labels(inputs)
        if self._shift is None or not self._checked_loss:
            self._check_against_model(inputs)
        # Without labels the model does not compute a loss of its own; a copy keeps the caller's batch whole.
        outputs = model(**decoder_inputs(self.model, {k: v for k, v in inputs.items() if k not in self.label_names}, labels))
        logits, labels = shift_if(bool(self._shift), logits_of(outputs), labels)
        if not model.training:
            loss = self._evaluation_loss(logits, labels)
            return (loss, outputs) if return_outputs else loss
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        terms = smoothed_terms(logits, labels, smoothing)
        weight = item_weights(labels, self.class_weight, IGNORE_INDEX, terms.nll.dtype)
        count = weight.sum() if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 if num_items_in_batch is None else self._loss_scale()
        # A batch in which every label is ignored has count 0 and sum 0.
        per_count = scale / torch.as_tensor(count, dtype=terms.nll.dtype, device=terms.nll.device).clamp_min(1e-30)
        nll, smoothing_term = (terms.nll * weight).sum() * per_count, (terms.smoothing_term * weight).sum() * per_count
        self._log_terms(nll, smoothing_term)
        loss = nll + smoothing_term + self._auxiliary_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def _labels(self, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.get(self.label_names[0])
        if labels is None:
            raise ValueError(
                f"expected `{self.label_names[0]}` in the batch, got {sorted(inputs)}; name the label column so, or set "
                "TrainingArguments(label_names=[...])"
            )
        if labels.is_floating_point():
            raise TypeError(
                f"expected integer labels, got {labels.dtype}; cast class ids to long, or use transformers.Trainer for regression"
            )
        return labels

    def _check_against_model(self, inputs: dict[str, Any]) -> None:
        """Once: find the shift from the model's own loss and refuse a model whose loss is another quantity."""
        self._labels(inputs)
        gap = model_loss_gap(self.model, inputs, self.label_names[0])
        if gap is None:  # every label ignored: nothing was learnt, ask the next batch
            return
        self._shift = resolve_shift(self.model, gap)
        self._checked_loss = True

    def _evaluation_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        items = item_statistics(logits, labels)
        if self._statistics is not None:
            self._pending = items
        nll = items[..., 2]
        return nll.nanmean() if bool((~nll.isnan()).any()) else nll.new_zeros(())

    def _auxiliary_loss(self, outputs: Any) -> Tensor | float:
        """Router losses of mixture-of-experts models, a mean per micro-batch (stock smoothing drops them)."""
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        coefficient = getattr(self.model.config, "router_aux_loss_coef", None) if auxiliary is not None else None
        if auxiliary is None or coefficient is None:
            return 0.0
        return coefficient * auxiliary / getattr(self, "current_gradient_accumulation_steps", 1)

    def _loss_scale(self) -> int:
        # DDP averages gradients, but the count is global; tensor-parallel ranks see the same batch.
        return self.accelerator.num_processes // self.get_tp_size()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Σ w over the accumulated batches of all processes, by our own shift rule."""
        if self._statistics is not None or not batch_samples:
            return None
        if not self._checked_loss:
            self._check_against_model(self._prepare_inputs(batch_samples[0]))
        count = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        for batch in batch_samples:
            labels = self._labels(batch)
            labels = labels[..., 1:] if self._shift else labels
            count += item_weights(labels, self.class_weight, IGNORE_INDEX, count.dtype).sum().to(device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return count / self.get_tp_size()

    def _log_terms(self, nll: Tensor, smoothing_term: Tensor) -> None:
        terms = torch.stack([nll.detach(), smoothing_term.detach()])
        if self._step_terms is None:  # the first micro-batch since the last log, or since a resume
            self._step_terms, self._steps_before_terms = torch.zeros_like(terms), self.state.global_step
        self._step_terms += terms

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add `nll` and `smoothing_term` (nats, means over the steps since the last log) to each training log."""
        if "loss" in logs and self._step_terms is not None:
            steps = max(1, self.state.global_step - self._steps_before_terms)
            nll, term = (self.accelerator.gather(self._step_terms[None]).mean(0) / steps).tolist()
            logs |= {"nll": nll, "smoothing_term": term}
            if self.smoothing.schedule is not None:
                logs["epsilon"] = self.smoothing.at(self.state.global_step - 1, self.state.max_steps).epsilon
            self._step_terms = None
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._step_terms = None
        return super().train(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, keeping four numbers per item for the exact calibration sums."""
        self._pending = None
        result = super().prediction_step(*args, **kwargs)
        if self._pending is not None and self._statistics is not None:
            items = self._pending
            if items.dim() > 2:  # processes pad their tokens to different lengths
                items = self.accelerator.pad_across_processes(items, dim=1, pad_index=float("nan"))
            # gather_for_metrics drops the examples repeated to fill the last batch.
            items = self.gather_function(items).reshape(-1, items.shape[-1]).cpu().numpy()
            confidence, correct, nll, brier = items[~(items != items).any(1)].T
            self._statistics.update(confidence, correct.astype(bool), nll, brier)
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the unsmoothed calibration metrics over all items."""
        standalone = not self.is_in_train and self.model_wrapped is self.model
        self._statistics = StreamingCalibration()
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            statistics, self._statistics = self._statistics, None
            if standalone:
                self._forget_evaluation_preparation()
        if len(statistics) and output.metrics is not None:
            metrics = statistics.compute()
            output.metrics[f"{metric_key_prefix}_loss"] = metrics["nll"]
            for name in ("nll", "brier", "ece", "accuracy", "signed_gap"):
                output.metrics.setdefault(f"{metric_key_prefix}_{name}", metrics[name])
        return output

    def _forget_evaluation_preparation(self) -> None:
        """Let a later train() wrap the model: accelerate >= 1.14 takes a model prepared for evaluation as prepared for good
        and leaves it out of DDP, so that the processes drift apart in silence."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # prepared by sharding, which training shares
        self.accelerator._models = [m for m in self.accelerator._models if m is not self.model]
        if getattr(self.model, "_is_accelerate_prepared", False):
            self.model._is_accelerate_prepared = False


class LabelSmoothingTrainer(LabelSmoothingMixin, Trainer):
    """`transformers.Trainer` with label smoothing done right; see `LabelSmoothingMixin`."""


def _one_smoothing(smoothing: Smoothing | None, args: TrainingArguments) -> Smoothing:
    from_args = smoothing_of(args)
    if smoothing is None:
        return from_args
    if from_args.epsilon not in (0.0, smoothing.epsilon):
        raise ValueError(
            f"expected one epsilon, got label_smoothing_factor={from_args.epsilon} and smoothing={smoothing}; set only one"
        )
    return smoothing
