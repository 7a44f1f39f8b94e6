"""Trainer integration: one loss path for every epsilon, exact counting, honest evaluation.

`LabelSmoothingMixin` is the whole of it, in the order of a run: settings, what a batch costs, evaluation, search and card. What
can be said without a Trainer stands beside it: a batch (`batch`), the objective (`criterion`), the sums of an evaluation
(`evaluation`), whether a model's loss is ours (`shift`), the loss without logits (`logits_free`).
"""

from __future__ import annotations

import inspect
import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_batch_size, gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, get_last_checkpoint

from hf_ls.calibration.token_temperature import CrossFittedTemperature, TokenTemperature
from hf_ls.common.models import in_eval_mode, output_embedding
from hf_ls.common.privacy import pickled_for_others
from hf_ls.data.soft_labels import SOFT
from hf_ls.losses._rows import Observer, observe
from hf_ls.losses.adaptive import OnlineLabelSmoothing
from hf_ls.losses.cross_entropy import check_no_probabilities, logits_of
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.classes import ClassCounts
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.trainer.arguments import LabelSmoothingArguments, check_given, check_search, loss_of, loss_settings
from hf_ls.trainer.batch import SHIFTED, Batch, check_class_weight, copied, virtual_tokens, with_named_labels
from hf_ls.trainer.card import warn_of_paths, write_trainer_card
from hf_ls.trainer.criterion import LoggedTerms, OnlineState, check_one_loss
from hf_ls.trainer.distillation import teacher_for
from hf_ls.trainer.evaluation import Evaluation, Steps, beside_loss, class_names_of, end_of_sequence, for_prediction, given_copies
from hf_ls.trainer.logits_free import GradientWatch, LogitsFreeHead, head_for, is_compiled
from hf_ls.trainer.mixup import check_mixable
from hf_ls.trainer.processes import (
    check_parallelism,
    evaluation_before_deepspeed,
    forget_preparation,
    gather_once,
    reshard,
    without_repeats,
)
from hf_ls.trainer.shift import (
    added_loss,
    check_supported,
    counts_first_label,
    label_inputs,
    model_loss_gap,
    resolve_shift,
    without_cross_entropy,
)
from hf_ls.trainer.spans import check_both_positions, check_span_settings, is_span_task, span_loss_gap

logger = logging.getLogger(__name__)


class LabelSmoothingMixin(Steps):
    """Put before a Trainer class: `class MyTrainer(LabelSmoothingMixin, Trainer)`.

    Training minimises Σ w_i·loss_i / Σ w_i over the whole global batch, whatever the micro-batches and processes; ε = 0 and
    ε > 0 run the same lines. It logs `loss` = `nll` + `smoothing_term`, with a teacher + `distillation_term`. Evaluation, always
    in the order of the dataset, reports the unsmoothed `nll`, `brier`, `ece` (15 bins), `accuracy` and `signed_gap` over all
    examples or tokens at once; `eval_loss` equals `eval_nll`. Where no label counted, a mean is NaN and a warning says so.

    Args (keyword, beside the Trainer's own):
        smoothing: a `Smoothing` in place of the one in the arguments (a prior needs this).
        class_weight: [K]; each example counts w_y times.
        objective: an `Objective` or `OnlineLabelSmoothing` in place of the one named in the arguments.
        shift_labels: whether position t predicts label t+1; None asks the model's own loss on the first batch. A batch
            with a `shift_labels` column (padding-free collators) is aligned already.
        teacher: a model for distillation; see `distillation.Distillation` and the arguments `distillation_*`.

    Attributes:
        smoothing, criterion, distillation, mixup: of the last training, or the one under way.
        temperature: divides the logits of the evaluation statistics, and of nothing else.
        token_counts: how often each token id is a training label [V]; evaluations of tokens then have frequency groups.
        class_counts: of the last evaluation of a classifier, for `metrics.classes`.
        token_calibration: the sums of the last evaluation of labels [B, T]; None before.

    Extractive question answering needs nothing else: each row has two labels, `start_positions` and `end_positions`, see `spans`.

    Raises: ValueError for `compute_loss_func`, a second `compute_loss`, two different epsilons, two techniques at once,
    tasks without one label per prediction (multi-label, regression, CTC), sequences cut among processes, and a model whose own
    loss is no cross entropy of its logits.
    """

    _arguments_class: type[TrainingArguments] = LabelSmoothingArguments
    # The loss is divided by the item count of the whole accumulated batch, so the Trainer must not divide it again.
    loss_is_scaled_for_ga: bool | None = True
    model: Any
    temperature: float = 1.0
    token_counts: np.ndarray | None = None
    token_calibration: TokenCalibration | None = None
    class_counts: ClassCounts | None = None
    _evaluation: Evaluation | None = None  # of the evaluation under way
    _measured: Evaluation | None = None  # of the last one
    _fit: TokenTemperature | None = None
    cross_fitted: CrossFittedTemperature | None = None  # given to the next evaluations, which add their examples to it
    _observer: Observer | None = None
    _warned_of_ceiling = False
    _saw_logits = False  # enough of them to tell logits from probabilities

    def __init__(
        self,
        *args: Any,
        smoothing: Smoothing | None = None,
        class_weight: Tensor | None = None,
        shift_labels: bool | None = None,
        objective: Objective | OnlineLabelSmoothing | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if training_args is None:
            training_args = kwargs["args"] = self._arguments_class(output_dir="trainer_output")
        check_one_loss(type(self), LabelSmoothingMixin)
        check_given(training_args, smoothing, kwargs.get("compute_loss_func"))
        self.class_weight = class_weight
        self._given_smoothing, self._given_objective, self._given_shift = smoothing, objective, shift_labels
        self._has_teacher, self._teacher = teacher is not None, None
        self._shift, self._checked_shifted = shift_labels, shift_labels is not None
        # Which calls of cross entropy in the model's own loss are that of the labels, where it adds something to them.
        self._added: tuple[int, ...] | None = None
        self._head: LogitsFreeHead | None = None
        self._head_sought = False
        self._terms, self._spans = LoggedTerms(), False
        self._told_of_paths: set[str] = set()
        epsilon = training_args.label_smoothing_factor if smoothing is None else smoothing.epsilon
        training_args.label_smoothing_factor = epsilon
        self._read_settings(training_args)
        # The parent builds its own smoother from the factor (and fails on models without a config): keep epsilon from it.
        training_args.label_smoothing_factor = 0.0
        try:
            super().__init__(*args, **kwargs)
        finally:
            training_args.label_smoothing_factor = epsilon
        self.args.label_smoothing_factor = epsilon  # SFTTrainer makes its own arguments from plain ones
        self.label_names = label_inputs(self.label_names, self.args.label_names)
        self._spans = is_span_task(self.model, self.label_names)
        check_supported(self.model, self.label_names, self.class_weight, spans=self._spans)
        check_span_settings(self)
        self._teacher = None if teacher is None else teacher_for(self.model, teacher, self._logits_free)
        if self.mixup is not None:
            check_mixable(self.model)
        check_parallelism(self.get_sp_size(), self.get_cp_size())
        self._online_state = OnlineState(self.criterion)
        self._online_state.register(self.callback_handler.callbacks, self.criterion)

    # Settings: read from the arguments again before each training, so that a search over epsilon is not in vain.

    def _read_settings(self, args: TrainingArguments) -> None:
        """Make what the arguments describe now; raises as `loss_of`."""
        settled = loss_of(args, self._given_smoothing, self._given_objective, self._has_teacher)
        self.smoothing, self.criterion, self.distillation, self.mixup = settled
        self._logits_free = getattr(args, "label_smoothing_logits_free", "auto")
        self._gradients = GradientWatch(getattr(args, "gradient_tolerance", None))
        check_span_settings(self)
        self._settings = loss_settings(args)

    # What a batch costs.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The smoothed loss in training, the plain NLL in evaluation; nats per item. No tensor of `inputs` is changed.

        The Trainer's own steps say which it is, in a call from elsewhere the mode of the model inside its wrappers. In training:
        world size × Σ w·loss / num_items_in_batch (DDP then averages over processes); without a count, and in evaluation, the
        mean over this batch. With `return_outputs` also the outputs; a tuple or a tensor as the model returns it beside its own
        loss, (loss, logits, ...).

        Raises: ValueError for a batch without labels and as `smoothed_terms`. One batch with NaN logits ends training, and the
        error names it: a stock Trainer hides the number (`logging_nan_inf_filter`) and goes on with weights which are all NaN.
        """
        self._check_against_model([inputs])
        batch = self._read(inputs)
        evaluates = self._is_evaluation(model)
        needs_logits = return_outputs or (not evaluates and self._teacher is not None)
        head = None if needs_logits else self._find_head(model, batch)
        if evaluates:
            loss, outputs = self._evaluation_loss(head, model, batch)
        else:
            try:
                loss, outputs = self._training_loss(head, model, batch, num_items_in_batch)
            except ValueError as error:
                raise batch.named(error, self.state.global_step + 1, self.args.process_index) from error
        return (loss, beside_loss(loss, outputs)) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*dict.fromkeys([*self._signature_columns, SOFT])]

    def _is_evaluation(self, model: nn.Module) -> bool:
        # The mode of a wrapper says nothing: DeepSpeed's engine hands eval() on to the model and stays in training mode itself.
        return not unwrap_model(model).training if self._evaluates is None else self._evaluates

    def _read(self, inputs: dict[str, Any]) -> Batch:
        shift, prompt = bool(self._shift), virtual_tokens(self.model)
        return Batch.read(inputs, self.label_names, shift=shift, class_weight=self.class_weight, prompt=prompt)

    def _training_loss(self, head: LogitsFreeHead | None, model: nn.Module, batch: Batch, num_items_in_batch: Any) -> Any:
        """The loss with its terms logged, and the outputs; with a head from a forward without logits."""
        if head is not None:
            return self._logits_free_loss(head, model, batch, num_items_in_batch)
        inputs, labels = batch.for_model(self.model), batch.label_inputs() if self._added else {}
        mixed = None if self.mixup is None else self.mixup.draw(batch.labels)
        silent = without_cross_entropy(self._added) if self._added and not is_compiled(model) else nullcontext()
        with silent:
            outputs = model(**inputs, **labels) if mixed is None else mixed.forward(model, inputs, **labels)
        logits = self._logits_of(outputs, batch)
        teacher_logits = None if self._teacher is None else self._teacher.logits(batch.for_model(self.model))
        if mixed is None:
            terms = self._training_terms(logits, batch, teacher_logits, num_items_in_batch)
        else:  # of both labels of each example; an ignored one is its own partner, so either side has the same count
            theirs = None if teacher_logits is None else teacher_logits[mixed.partner]
            soft = None if batch.soft is None else batch.soft[mixed.partner]
            other = replace(batch, labels=batch.labels[mixed.partner], weight=batch.weight[mixed.partner], soft=soft)
            terms = self._training_terms(logits, batch, teacher_logits, num_items_in_batch, mixed.share)
            terms = terms + self._training_terms(logits, other, theirs, num_items_in_batch, 1 - mixed.share)
        self._terms.add(terms, batch.items(num_items_in_batch), self.state.global_step)
        if not self._added:
            return terms.sum(), outputs
        return terms.sum() + self._added_share() * added_loss(outputs, logits, batch.labels, whole=is_compiled(model)), outputs

    def _training_terms(
        self, logits: Tensor, batch: Batch, teacher_logits: Tensor | None, num_items_in_batch: Any, share: Tensor | None = None
    ) -> Tensor:
        """The parts of the training loss in the order of the log, each item counted by its share; [2], [3] with a teacher."""
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        terms = self.criterion.parts(logits, batch, smoothing, self.distillation, teacher_logits)
        weight, per_count = batch.factors(num_items_in_batch, self._loss_scale(), terms[0].dtype)
        weight = weight if share is None else weight * share
        return torch.stack([(part * weight).sum() * per_count for part in terms])

    def _logits_free_loss(self, head: LogitsFreeHead, model: nn.Module, batch: Batch, num_items_in_batch: Any) -> Any:
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        check_class_weight(self.class_weight, head.classes)
        weight, per_count = batch.factors(num_items_in_batch, self._loss_scale(), batch.weight.dtype)
        found = head(
            model, batch.with_labels(self.model) if self._added else batch.for_model(self.model), batch.labels, smoothing,
            objective=self.criterion.for_rows(smoothing), token_weight=None if self.class_weight is None else weight,
            num_items_in_batch=1 / per_count, observer=self._observer, added=self._added or (), share=self._added_share(),
            gradients=self._gradients,
        )  # fmt: skip
        terms = torch.stack([(part * weight).sum() * per_count for part in (found.nll, found.smoothing_term)])
        self._terms.add(terms, batch.items(num_items_in_batch), self.state.global_step)
        return found.loss, found.outputs

    def _evaluation_loss(self, head: LogitsFreeHead | None, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """The mean NLL of a batch, its items kept for the metrics; the sums of a fitted temperature instead while one is."""
        evaluation = self._evaluation or Evaluation(temperature=self.temperature)
        if self._fit is not None:
            batch = replace(batch, labels=without_repeats(self.accelerator, batch.labels, self._copies()))
        inputs = batch.for_model(self.model)
        if head is not None:
            return evaluation.loss_without_logits(head, model, inputs, batch, self._observer)
        outputs = model(**inputs)
        return evaluation.loss(self._logits_of(outputs, batch), batch), outputs

    def _logits_of(self, outputs: Any, batch: Batch) -> Tensor:
        """The logits, shown to the observer; refused while they may be probabilities, or where the class weights do not fit."""
        logits = logits_of(outputs)
        if not self._saw_logits and logits.shape[:-1] == batch.labels.shape:
            check_no_probabilities(logits[batch.kept])
            self._saw_logits = int(batch.kept.sum()) >= 4  # fewer rows say too little: look at the next batch again
        check_class_weight(self.class_weight, logits.shape[-1])
        if self._observer is not None:
            observe(self._observer, logits[batch.kept], batch.labels[batch.kept])
        return logits

    def _added_share(self) -> float:
        """The weight of what the model's own loss adds, a mean per micro-batch (stock smoothing drops it)."""
        return 1 / getattr(self, "current_gradient_accumulation_steps", 1)

    def _loss_scale(self) -> int:
        # DDP averages gradients, but the count is global; tensor-parallel ranks see the same batch.
        return self.accelerator.num_processes // self.get_tp_size()

    def _copies(self) -> int:
        """How many processes in a row see the same batch."""
        return self.get_tp_size()

    def _check_against_model(self, batches: list[dict[str, Any]]) -> None:
        """Once: find the shift from the model's own loss and refuse a model whose loss is another quantity.

        All processes together, since a forward of a sharded model is collective: one without any label joins in with a
        made-up one, and the first process which has labels decides for all.
        """
        if self._shift is not None and self._added is not None:
            return
        found, raw = next(((b, r) for r in batches if (b := Batch.read(r, self.label_names)).tells), (None, batches[0]))
        batch = found or Batch.read(raw, self.label_names)
        if batch.aligned and self._checked_shifted and self._added is not None:
            return
        if not any(gather_object([found is not None])):
            return  # nothing was learnt: ask the next batch
        batch = Batch.read(self._prepare_inputs(raw), self.label_names)
        batch = (batch if found or batch.spans else batch.with_some_label()).small()
        prompt = virtual_tokens(self.model)
        own = span_loss_gap(self.model, batch) if batch.spans else model_loss_gap(self.model, batch, prompt)
        gap = next(gap for gap in gather_object([own if found else None]) if gap is not None)
        if self._given_shift is None:
            # Virtual tokens predict the first label too: ask the model below the prompt.
            model = self.model.get_base_model() if prompt else self.model
            shift = resolve_shift(self.model, gap, gap.ambiguous and counts_first_label(model, batch))
            if batch.aligned:
                self._checked_shifted = True
            else:
                self._shift = shift
        self._added = gap.calls if gap.added else ()

    def _find_head(self, model: nn.Module, batch: Batch) -> LogitsFreeHead | None:
        """Once per training, all processes together: the head which gives losses instead of logits; why none, in the log."""
        unfit = self._spans or self.criterion.objective is None or batch.soft is not None
        if self._head_sought or self._logits_free == "off" or unfit:
            return self._head
        if not any(gather_object([batch.tells])):
            return None  # nothing to compare: ask the next batch
        self._head_sought = True
        small = (batch if batch.tells else batch.with_some_label()).small()
        head, reason = head_for(model, self.model, small, self._added or ())
        if reason is None:
            self._head = head
        elif self._logits_free == "on":
            raise ValueError(f"{reason}; set label_smoothing_logits_free='auto'")
        elif batch.labels.dim() == 2 and output_embedding(model) is not None:  # others have no large logits to avoid
            logger.warning("The loss is taken from the logits of %s: %s", type(self.model).__name__, reason)
        return self._head

    # Training: the global count, and what the log says.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Σ w over the accumulated batches of all processes, by our own shift rule."""
        if self._evaluates or not batch_samples:
            return None
        last, copies = batch_samples[-1], self._copies()  # the Trainer trains on the batches of this very list
        for name in (*self.label_names, SHIFTED):
            if isinstance(last.get(name), Tensor):
                last = {**last, name: without_repeats(self.accelerator, last[name], copies)}
        batch_samples[-1] = last
        self._check_against_model(batch_samples)  # the shift decides what counts
        count = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        for inputs in batch_samples:
            count = count + self._read(inputs).count.to(device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        return count / copies

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the loss (nats, means over the steps since the last log) to each training log, and `train_nll` to its
        summary: `train_loss` does not compare between ε, `train_nll` does. Both are means over the steps of this call of
        `train`; after a resume `train_nll_steps` says how many those are. NaN where no label counted."""
        if "loss" in logs or "train_loss" in logs:
            self._terms.add_to(logs, self.state.global_step, self.accelerator.gather)
            self._gradients.add_to(logs)
            if "nll" in logs and self.smoothing.schedule is not None:
                logs["epsilon"] = self.smoothing.at(self.state.global_step - 1, self.state.max_steps).epsilon
        super().log(logs, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Once per try of `auto_find_batch_size`: nothing of a failed one may stay.
        self._terms, self._head, self._head_sought = LoggedTerms(), None, False
        self._gradients = GradientWatch(getattr(self.args, "gradient_tolerance", None))
        self.criterion.restart()
        return super()._inner_training_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        if self.model_init is not None:  # which may make another model
            self._shift, self._checked_shifted, self._added = self._given_shift, self._given_shift is not None, None
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._online_state.resume_from = last or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, with a warning, once, when ε asks for less confidence than the model is right."""
        self._measured = None
        metrics = super().evaluate(*args, **kwargs)
        if self._measured is not None and not self._warned_of_ceiling and self.criterion.plain:
            warning = self._measured.ceiling_warning(self.smoothing)
            if warning and self.is_world_process_zero():
                logger.warning(warning)
            self._warned_of_ceiling = warning is not None
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the unsmoothed calibration metrics over all items, see `Evaluation.metrics`."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"expected temperature > 0, got {self.temperature}; set trainer.temperature to 1.0 for none")
        standalone = not self.is_in_train and self.model_wrapped is self.model
        self._evaluation = Evaluation(
            end_of_sequence(self.model, self.processing_class), self.token_counts, self.temperature, self._fit,
            names=class_names_of(self.model), selected_by=self.args.metric_for_best_model, crossed=self.cross_fitted,
        )  # fmt: skip
        # Seq2SeqTrainer gathers the examples repeated to fill the last batch too, so that its metrics count them twice; the
        # Trainer counts the copies of tensor parallelism.
        self.gather_function = self._gather_once
        engine = evaluation_before_deepspeed(self) if standalone and self.is_deepspeed_enabled else nullcontext()
        try:
            with self._step(evaluates=True), given_copies(self.model, self.label_names), engine:
                output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            self._measured, self._evaluation = self._evaluation, None
            if standalone and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # those prepare by sharding
                forget_preparation(self.accelerator, self.model)
            if not self.is_in_train:
                reshard(self.model)
        if self._measured.tokens is not None and len(self._measured.tokens):
            self.token_calibration = self._measured.tokens
        self.class_counts = self._measured.by_class
        if self._fit is None and output.metrics is not None:
            self._measured.add_to(output.metrics, metric_key_prefix)
            if (warning := self._measured.missing(type(self))) and self.is_world_process_zero():
                logger.warning(warning)
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """As `Trainer.prediction_step`, keeping four numbers per item for the exact calibration sums.

        A Trainer below with its own step, whose loss is its model's, costs one more forward, in which ours is taken.
        """
        evaluation = self._evaluation
        if self._spans:
            check_both_positions(inputs)
        inputs = with_named_labels(inputs, self.label_names)
        labelled = all(inputs.get(name) is not None for name in self.label_names)
        if evaluation is not None:
            evaluation.pending, evaluation.rows = None, find_batch_size(inputs) or 0
            evaluation.reached, evaluation.labelled = True, evaluation.labelled or labelled
        # A wrapper may keep eval() to itself: then dropout would be on.
        with self._step(evaluates=True), in_eval_mode(self.model) if self.model.training else nullcontext():
            result = super().prediction_step(
                model if labelled else for_prediction(model), copied(inputs), prediction_loss_only, ignore_keys, **kwargs
            )
            if evaluation is None or self._fit is not None:
                return result
            if evaluation.pending is None and labelled:
                with torch.no_grad(), self.compute_loss_context_manager():
                    result = self.compute_loss(model, self._prepare_inputs(inputs)).detach(), *result[1:]
        if evaluation.pending is None:
            return result
        rows, labels = evaluation.pending
        if labels.dim() > 1:  # processes pad their tokens to different lengths
            rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=math.nan)
        evaluation.add(self._gather_once(rows).cpu().numpy().astype(np.float64))
        return result

    def _gather_once(self, items: Any) -> Any:
        if isinstance(items, Tensor) and items.dim() == 1 and self._evaluation is not None and self._evaluation.rows:
            items = items[: self._evaluation.rows]  # the loss of a batch, which the Trainer repeats to the size of a full one
        return gather_once(self.accelerator, items, self._copies())

    def fit_temperature(self, dataset: Any) -> float:
        """The T > 0 which minimises the NLL of softmax(logits / T) on the labels of a dataset: one teacher-forced pass.

        Takes validation data; set `temperature` to the result and report on test data. Memory does not grow with the number
        of labels. The same on any number of processes.

        Raises: NoFiniteTemperature (a ValueError) where the NLL has no minimum.
        """
        self._fit = TokenTemperature()
        try:
            self.evaluation_loop(self.get_eval_dataloader(dataset), "Temperature", prediction_loss_only=True)
            if self.accelerator.num_processes > 1:
                sums = self._fit.sums.to(self.accelerator.device)
                self._fit.sums = self.accelerator.reduce(sums, reduction="sum").cpu()
            return self._fit.fit()
        finally:
            self._fit = None

    # Search, and what others get: the card, and the arguments beside the weights.

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, which writes a trial into the arguments; this reads the loss from them again.

        Raises: ValueError for an `OnlineLabelSmoothing` object in a search, whose state would go from trial to trial.
        """
        super()._hp_search_setup(trial)
        if trial is not None and isinstance(self._given_objective, OnlineLabelSmoothing):
            raise ValueError(
                "expected online label smoothing by name in a search, got an object; objective='online' starts afresh"
            )
        if trial is not None or self._settings != loss_settings(self.args):
            self._read_settings(self.args)
            self._online_state.register(self.callback_handler.callbacks, self.criterion)

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but without `compute_objective` the objective is the unsmoothed `eval_loss`, lower is better.

        (The stock one adds up all metrics, here NLL and accuracy. Smoothed losses of two epsilons do not compare.)

        Raises: ValueError for direction="maximize" without `compute_objective`.
        """
        check_search(compute_objective, args[1] if len(args) > 1 else kwargs.get("direction", "minimize"))
        return super().hyperparameter_search(hp_space, compute_objective or itemgetter("eval_loss"), *args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with pickled_for_others(self.args):
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            warn_of_paths(self, checkpoint_folder)
        with pickled_for_others(self.args):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if hasattr(self, "push_in_progress"):  # all files are there, and the next thing is to upload them
            warn_of_paths(self, self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`, arguments as in the Trainer below this mixin, and thereby in `push_to_hub` and the saving of TRL.

        A README.md which was written by hand stays as it is. Where `calibration.json` belongs to these weights the card is
        that of the report, with its intervals; else it states the last evaluation and the smoothing which training used.
        """
        if self.is_world_process_zero():
            write_trainer_card(self, inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments)


class LabelSmoothingTrainer(LabelSmoothingMixin, Trainer):
    """`transformers.Trainer` with label smoothing done right; see `LabelSmoothingMixin`."""
