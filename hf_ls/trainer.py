"""Trainer integration: one loss path for every epsilon, exact counting, honest evaluation.

Owns: `LabelSmoothingMixin`, `LabelSmoothingTrainer`.
Does not own: the loss (`losses`), the calibration sums (`metrics.streaming`), checkpoint choice (`checkpoint`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from hf_ls.adaptive import OnlineLabelSmoothing
from hf_ls.alignment import check_supported, decoder_inputs, model_loss_gap, resolve_shift
from hf_ls.arguments import LabelSmoothingArguments, check_direction, smoothing_of
from hf_ls.criterion import Criterion, OnlineState, parse_params
from hf_ls.head import LogitsFreeHead, output_embedding, probe_inputs, virtual_tokens
from hf_ls.losses import item_weights, logits_of, shift_if
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.objectives import Objective
from hf_ls.smoothing import Smoothing
from hf_ls.statistics import item_statistics

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin is mixed into
else:
    _Trainer = object

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


class LabelSmoothingMixin(_Trainer):
    """Put before a Trainer class: `class MyTrainer(LabelSmoothingMixin, Trainer)`.

    Training minimises Σ w_i·loss_i / Σ w_i over the whole global batch, whatever the micro-batches and processes; ε = 0 and
    ε > 0 run the same lines. It logs `loss` = `nll` + `smoothing_term`. Evaluation reports the unsmoothed `nll`, `brier`,
    `ece` (15 bins), `accuracy` and `signed_gap` over all examples or tokens at once; `eval_loss` equals `eval_nll`.

    Args (keyword, beside the Trainer's own):
        smoothing: a `Smoothing` in place of the one in the arguments (a prior needs this).
        class_weight: [K]; each example counts w_y times.
        objective: an `Objective` or `OnlineLabelSmoothing` in place of the one named in the arguments.
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
        objective: Objective | OnlineLabelSmoothing | None = None,
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
        name = getattr(training_args, "label_smoothing_objective", "smoothed_ce")
        params = parse_params(getattr(training_args, "label_smoothing_objective_params", None))
        self.criterion = Criterion(self.smoothing, objective or name, params)
        self.class_weight = class_weight
        self._shift = shift_labels
        self._checked_loss = shift_labels is not None
        self._logits_free = getattr(training_args, "label_smoothing_logits_free", "auto")
        self._head: LogitsFreeHead | None = None
        self._head_sought = False
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
        self._online_state = OnlineState(self.criterion)
        if self.criterion.name == "online":  # first: its file must be there before a checkpoint is marked complete
            self.callback_handler.callbacks.insert(0, self._online_state)

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
        batch = decoder_inputs(self.model, {k: v for k, v in inputs.items() if k not in self.label_names}, labels)
        if model.training and not return_outputs and (head := self._find_head(model, inputs)) is not None:
            return self._logits_free_loss(head, model, batch, labels, num_items_in_batch)
        outputs = model(**batch)
        logits, labels = shift_if(bool(self._shift), logits_of(outputs), labels)
        if not model.training:
            loss = self._evaluation_loss(logits, labels)
            return (loss, outputs) if return_outputs else loss
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        terms = self.criterion.terms(logits, labels, smoothing)
        weight, per_count = self._weighting(labels, num_items_in_batch, terms.nll.dtype)
        nll, smoothing_term = (terms.nll * weight).sum() * per_count, (terms.smoothing_term * weight).sum() * per_count
        self._log_terms(nll, smoothing_term)
        loss = nll + smoothing_term + self._auxiliary_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def _logits_free_loss(
        self, head: LogitsFreeHead, model: nn.Module, batch: dict[str, Any], labels: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        """The training loss of `compute_loss` with its terms logged, from a forward without logits."""
        _, labels = shift_if(bool(self._shift), labels, labels)
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        exact = torch.float64 if labels.device.type != "mps" else torch.float32
        weight, per_count = self._weighting(labels, num_items_in_batch, exact)
        token_weight = None if self.class_weight is None else weight
        objective = self.criterion.for_rows(smoothing)
        found = head(
            model, batch, labels, smoothing, objective=objective, token_weight=token_weight, num_items_in_batch=1 / per_count
        )
        self._log_terms(*((part * weight).sum() * per_count for part in (found.nll, found.smoothing_term)))
        return found.loss + self._auxiliary_loss(found.outputs)

    def _find_head(self, model: nn.Module, inputs: dict[str, Any]) -> LogitsFreeHead | None:
        """Once per training: the head which gives losses instead of logits, or None and the reason in the log.

        Raises: ValueError with the reason under `label_smoothing_logits_free="on"`.
        """
        if self._head_sought or self._logits_free == "off" or self.criterion.objective is None:
            return self._head
        small = probe_inputs(inputs, self.label_names[0])
        labels = self._labels(small)
        if not bool((labels != IGNORE_INDEX).any()):
            return None  # nothing to compare: ask the next batch
        self._head_sought = True
        try:
            head = LogitsFreeHead(model)
            batch = decoder_inputs(self.model, {k: v for k, v in small.items() if k not in self.label_names}, labels)
            head.probe(self.model, batch, shift_if(bool(self._shift), labels, labels)[1])
            self._head = head
        except ValueError as reason:
            if self._logits_free == "on":
                raise ValueError(f"{reason}; set label_smoothing_logits_free='auto'") from reason
            if labels.dim() == 2 and output_embedding(model) is not None:  # others have no large logits to avoid
                logger.warning("The loss is taken from the logits of %s: %s", type(self.model).__name__, reason)
        return self._head

    def _weighting(self, labels: Tensor, num_items_in_batch: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight of each item, and what their sum is multiplied by."""
        weight = item_weights(labels, self.class_weight, IGNORE_INDEX, dtype)
        count = weight.sum() if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 if num_items_in_batch is None else self._loss_scale()
        # A batch in which every label is ignored has count 0 and sum 0.
        return weight, scale / torch.as_tensor(count, dtype=dtype, device=weight.device).clamp_min(1e-30)

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
        prompt = virtual_tokens(self.model)
        return nn.functional.pad(labels, (prompt, 0), value=IGNORE_INDEX) if prompt else labels

    def _check_against_model(self, inputs: dict[str, Any]) -> None:
        """Once: find the shift from the model's own loss and refuse a model whose loss is another quantity."""
        self._labels(inputs)
        inputs = probe_inputs(inputs, self.label_names[0])
        # Virtual tokens have no labels in the batch: the model below the prompt has the same shift and loss.
        model = self.model.get_base_model() if virtual_tokens(self.model) else self.model
        gap = model_loss_gap(model, inputs, self.label_names[0])
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
        for batch in batch_samples:  # until one has a label: the shift decides what counts
            if not self._checked_loss:
                self._check_against_model(self._prepare_inputs(batch))
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._step_terms = None
        self._head, self._head_sought = None, False
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._online_state.resume_from = last or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
