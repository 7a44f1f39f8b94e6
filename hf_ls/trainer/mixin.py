"""Trainer integration: one loss path for every epsilon, exact counting, honest evaluation.

Owns: `LabelSmoothingMixin`, `LabelSmoothingTrainer`.
Does not own: the loss (`losses`), what an evaluation reports (`evaluation`), checkpoint choice (`checkpoint`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_ls.common.models import IGNORE_INDEX, output_embedding
from hf_ls.losses._rows import observe
from hf_ls.losses.adaptive import OnlineLabelSmoothing
from hf_ls.losses.cross_entropy import SmoothedTerms, item_weights, logits_of, shift_if
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.arguments import LabelSmoothingArguments, check_direction, distillation_of, mixup_of
from hf_ls.trainer.card import TrainerCard
from hf_ls.trainer.criterion import OnlineState
from hf_ls.trainer.distillation import Teacher
from hf_ls.trainer.evaluation import CalibratedEvaluation
from hf_ls.trainer.logged_terms import LoggedTerms
from hf_ls.trainer.logits_free import LogitsFreeHead, probe_inputs, virtual_tokens
from hf_ls.trainer.mixup import check_mixable
from hf_ls.trainer.processes import without_repeats
from hf_ls.trainer.search import SearchableLoss
from hf_ls.trainer.shift import (
    SHIFTED,
    check_supported,
    counts_first_label,
    decoder_inputs,
    has_label,
    integer_labels,
    model_loss_gap,
    resolve_shift,
    router_loss,
    with_some_label,
)
from hf_ls.trainer.softening import check_combined, techniques
from hf_ls.trainer.spans import check_span_settings, check_spans, is_span_task, positions_in, span_terms

logger = logging.getLogger(__name__)


class LabelSmoothingMixin(TrainerCard, SearchableLoss, CalibratedEvaluation):
    """Put before a Trainer class: `class MyTrainer(LabelSmoothingMixin, Trainer)`.

    Training minimises Σ w_i·loss_i / Σ w_i over the whole global batch, whatever the micro-batches and processes; ε = 0 and
    ε > 0 run the same lines. It logs `loss` = `nll` + `smoothing_term`, with a teacher + `distillation_term`. Evaluation reports
    the unsmoothed `nll`, `brier`, `ece` (15 bins), `accuracy` and `signed_gap` over all examples or tokens at once; `eval_loss`
    equals `eval_nll`. See `CalibratedEvaluation` for more.

    Args (keyword, beside the Trainer's own):
        smoothing: a `Smoothing` in place of the one in the arguments (a prior needs this).
        class_weight: [K]; each example counts w_y times.
        objective: an `Objective` or `OnlineLabelSmoothing` in place of the one named in the arguments.
        shift_labels: whether position t predicts label t+1; None asks the model's own loss on the first batch. A batch
            with a `shift_labels` column (context parallelism, padding-free collators) is aligned already.
        teacher: a model for distillation; see `distillation.Distillation` and the arguments `distillation_*`.

    Attributes: distillation, mixup: of the training under way or the last one, None where there is none.

    Extractive question answering needs nothing else: each row has two labels, `start_positions` and `end_positions`, see
    `question_answering`.

    Raises: ValueError for `compute_loss_func`, two different epsilons, two target-softening techniques, tasks without one
    label per prediction (multi-label, regression, CTC), and a model whose own loss is no cross entropy of its logits.
    """

    _arguments_class: type[TrainingArguments] = LabelSmoothingArguments

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
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if training_args is None:
            training_args = kwargs["args"] = self._arguments_class(output_dir="trainer_output")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "expected no compute_loss_func, got one: a stock Trainer lets it silently replace label smoothing; remove it, "
                "or use it with transformers.Trainer and hf_ls.SmoothedCrossEntropy"
            )
        check_direction(training_args)
        if smoothing is not None and not isinstance(smoothing, Smoothing):
            raise TypeError(f"expected smoothing as a hf_ls.Smoothing, got {type(smoothing).__name__}; pass Smoothing(0.1)")
        self.class_weight = class_weight
        self._given_smoothing, self._given_objective, self._given_shift = smoothing, objective, shift_labels
        self._has_teacher, self._teacher = teacher is not None, None
        self._shift = shift_labels
        self._checked_shifted = shift_labels is not None
        self._head: LogitsFreeHead | None = None
        self._head_sought = False
        self._terms = LoggedTerms()
        if smoothing is not None and training_args.label_smoothing_factor not in (0.0, smoothing.epsilon):
            raise ValueError(
                f"expected one epsilon, got label_smoothing_factor={training_args.label_smoothing_factor} and "
                f"smoothing={smoothing}; set only one"
            )
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
        self._spans = is_span_task(self.model, self.label_names)
        check_supported(self.model, self.label_names, self.class_weight, spans=self._spans)
        check_span_settings(self)
        self._teacher = None if teacher is None else self._check_teacher(teacher)
        if self.mixup is not None:
            check_mixable(self.model)
        if self.get_sp_size() > 1:
            raise ValueError("expected no sequence parallelism, got sp_size > 1: there the Trainer reduces the model's own loss")
        self._online_state = OnlineState(self.criterion)
        self._register_online_state()

    def _read_settings(self, args: TrainingArguments) -> None:
        super()._read_settings(args)
        named = getattr(args, "distillation_teacher", None)
        if named and not self._has_teacher:
            raise ValueError(
                f"expected teacher=model with distillation_teacher={named!r}, got none; load it with "
                "hf_ls.trainer.distillation.load_teacher and pass it to the trainer"
            )
        self.distillation, self.mixup = (distillation_of(args) if self._has_teacher else None), mixup_of(args)
        found = techniques(self.smoothing, self.criterion, self.distillation, self.mixup)
        check_combined(found, getattr(args, "allow_combined_softening", False))
        check_span_settings(self)

    def _check_teacher(self, teacher: nn.Module) -> Teacher:
        has_head = output_embedding(self.model) is not None
        if has_head and self._logits_free == "on":
            raise ValueError(
                "expected label_smoothing_logits_free 'auto' or 'off' with a teacher, got 'on': distillation compares whole "
                "distributions; set 'auto'"
            )
        if has_head and self._logits_free == "auto":
            logger.warning(
                "The training loss is taken from the logits of %s: distillation compares whole distributions",
                type(self.model).__name__,
            )
        return Teacher(teacher, self.model)

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
        self._check_against_model([inputs])
        labels, batch = self._aligned(inputs), self._model_inputs(inputs)
        needs_logits = return_outputs or (model.training and self._teacher is not None)
        head = None if needs_logits else self._find_head(model, inputs)
        if head is not None and model.training:
            return self._logits_free_loss(head, model, batch, labels, num_items_in_batch)
        if head is not None:
            return self._logits_free_evaluation(head, model, batch, labels)
        mixed = self.mixup.draw(labels) if self.mixup is not None and model.training else None
        outputs = model(**batch) if mixed is None else mixed.forward(model, batch)
        logits = logits_of(outputs)
        if not model.training:
            loss = self._evaluation_loss(logits, labels)
            return (loss, outputs) if return_outputs else loss
        if self._observer is not None:
            kept = labels != IGNORE_INDEX
            observe(self._observer, logits[kept], labels[kept])
        teacher_logits = None if self._teacher is None else self._teacher.logits(batch)
        if mixed is None:
            terms = self._training_terms(logits, labels, teacher_logits, num_items_in_batch, batch=batch)
        else:  # of both labels of each example; an ignored one is its own partner, so either side has the same count
            theirs = None if teacher_logits is None else teacher_logits[mixed.partner]
            terms = self._training_terms(logits, labels, teacher_logits, num_items_in_batch, mixed.share)
            terms = terms + self._training_terms(logits, labels[mixed.partner], theirs, num_items_in_batch, 1 - mixed.share)
        self._log_terms(*terms)
        loss = terms.sum() + self._auxiliary_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def _training_terms(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, num_items_in_batch: Any,
        share: Tensor | None = None, batch: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """The parts of the training loss in the order of the log, each item counted by its share; [2], [3] with a teacher."""
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        terms: tuple[Tensor, ...] = (
            span_terms(logits, labels, smoothing, batch or {}) if self._spans else self.criterion.terms(logits, labels, smoothing)
        )
        if self.distillation is not None and teacher_logits is not None:
            terms = self.distillation.terms(SmoothedTerms(*terms), logits, teacher_logits, labels)
        weight, per_count = self._weighting(labels, num_items_in_batch, terms[0].dtype)
        weight = weight if share is None else weight * share
        return torch.stack([(part * weight).sum() * per_count for part in terms])

    def _logits_free_loss(
        self, head: LogitsFreeHead, model: nn.Module, batch: dict[str, Any], labels: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        """The training loss of `compute_loss` with its terms logged, from a forward without logits."""
        smoothing = self.smoothing.at(self.state.global_step, self.state.max_steps)
        exact = torch.float64 if labels.device.type != "mps" else torch.float32
        weight, per_count = self._weighting(labels, num_items_in_batch, exact)
        token_weight = None if self.class_weight is None else weight
        objective = self.criterion.for_rows(smoothing)
        found = head(
            model, batch, labels, smoothing, objective=objective, token_weight=token_weight, num_items_in_batch=1 / per_count,
            observer=self._observer,
        )  # fmt: skip
        self._log_terms(*((part * weight).sum() * per_count for part in (found.nll, found.smoothing_term)))
        return found.loss + self._auxiliary_loss(found.outputs)

    def _find_head(self, model: nn.Module, inputs: dict[str, Any]) -> LogitsFreeHead | None:
        """Once per training, all processes together: the head which gives losses instead of logits, or None and the reason in
        the log.

        Raises: ValueError with the reason under `label_smoothing_logits_free="on"`.
        """
        if self._head_sought or self._logits_free == "off" or self.criterion.objective is None or self._spans:
            return self._head
        name = self.label_names[0]
        counts = has_label(inputs, name)
        if not any(gather_object([counts])):
            return None  # nothing to compare: ask the next batch
        self._head_sought = True
        small = probe_inputs(
            inputs if counts else with_some_label(inputs, name), name if inputs.get(name) is not None else SHIFTED
        )
        head, error = None, None
        try:
            head = LogitsFreeHead(model)
            head.probe(self.model, self._model_inputs(small), self._aligned(small))
        except ValueError as found:
            error = found
        # One process on the other path would leave the rest alone in collective forwards.
        reason = next((r for r in gather_object([None if error is None else str(error)]) if r is not None), None)
        if reason is None:
            self._head = head
        elif self._logits_free == "on":
            raise ValueError(f"{reason}; set label_smoothing_logits_free='auto'") from error
        elif self._labels(small).dim() == 2 and output_embedding(model) is not None:  # others have no large logits to avoid
            logger.warning("The loss is taken from the logits of %s: %s", type(self.model).__name__, reason)
        return self._head

    def _weighting(self, labels: Tensor, num_items_in_batch: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight of each item, and what their sum is multiplied by."""
        weight = item_weights(labels, self.class_weight, IGNORE_INDEX, dtype)
        count = self._count(weight) if num_items_in_batch is None else num_items_in_batch
        scale = 1.0 if num_items_in_batch is None else self._loss_scale()
        # A batch in which every label is ignored has count 0 and sum 0.
        per_count = scale / torch.as_tensor(count, dtype=dtype, device=weight.device).clamp_min(1e-30)
        return (weight * per_count, per_count.new_ones(())) if per_count.dim() else (weight, per_count)

    def _count(self, weight: Tensor) -> Tensor:
        """What a sum of losses is divided by: Σ w; of starts and ends apart, since the mean of each is half the loss."""
        return 2 * weight.sum(0) if self._spans else weight.sum()

    def _labels(self, inputs: dict[str, Any], *, aligned: bool = False) -> Tensor:
        """The labels of a batch as they are given; `aligned` prefers its `shift_labels`."""
        if self._spans:
            return positions_in(inputs)
        labels = integer_labels(inputs, self.label_names[0], aligned)
        prompt = virtual_tokens(self.model)
        return nn.functional.pad(labels, (prompt, 0), value=IGNORE_INDEX) if prompt else labels

    def _aligned(self, inputs: dict[str, Any]) -> Tensor:
        """The labels each logit predicts: `shift_labels` as they are, else the labels by the model's own rule."""
        labels = self._labels(inputs, aligned=True)
        return shift_if(bool(self._shift) and inputs.get(SHIFTED) is None, labels, labels)[1]

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without labels, so that the model computes no loss of its own; the caller's batch stays whole."""
        batch = {name: value for name, value in inputs.items() if name not in (*self.label_names, SHIFTED)}
        return batch if self._spans else decoder_inputs(self.model, batch, self._labels(inputs))

    def _check_against_model(self, batches: list[dict[str, Any]]) -> None:
        """Once: find the shift from the model's own loss and refuse a model whose loss is another quantity.

        All processes together, since a forward of a sharded model is collective: one without any label joins in with a
        made-up one, and the first process which has labels decides for all.
        """
        if self._shift is not None:
            return
        if self._spans:
            self._shift = False if check_spans(self.model, batches, self._prepare_inputs) else None
            return
        name = self.label_names[0]
        batch = next((batch for batch in batches if has_label(batch, name)), batches[0])
        only_aligned = batch.get(name) is None and batch.get(SHIFTED) is not None
        if only_aligned and self._checked_shifted:
            return
        self._labels(batch)
        counts = has_label(batch, name)
        if not any(gather_object([counts])):
            return  # nothing was learnt: ask the next batch
        batch = self._prepare_inputs(batch if counts else with_some_label(batch, name))
        small = probe_inputs(batch, SHIFTED if only_aligned else name)
        # Virtual tokens have no labels in the batch: the model below the prompt has the same shift and loss.
        model = self.model.get_base_model() if virtual_tokens(self.model) else self.model
        own = model_loss_gap(model, small, name)
        gap = next(gap for gap in gather_object([own if counts else None]) if gap is not None)
        shift = resolve_shift(self.model, gap, gap.ambiguous and counts_first_label(model, small, name))
        if only_aligned:
            self._checked_shifted = True
        else:
            self._shift = shift

    def _auxiliary_loss(self, outputs: Any) -> Tensor | float:
        """Router losses of mixture-of-experts models, a mean per micro-batch (stock smoothing drops them)."""
        return router_loss(self.model, outputs) / getattr(self, "current_gradient_accumulation_steps", 1)

    def _loss_scale(self) -> int:
        # DDP averages gradients, but the count is global; tensor-parallel ranks see the same batch.
        return self.accelerator.num_processes // self.get_tp_size()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Σ w over the accumulated batches of all processes, by our own shift rule."""
        if self._statistics is not None or not batch_samples:
            return None
        self._ignore_repeats(batch_samples)
        self._check_against_model(batch_samples)  # the shift decides what counts
        count = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        for batch in batch_samples:
            weight = item_weights(self._aligned(batch), self.class_weight, IGNORE_INDEX, count.dtype)
            count = count + self._count(weight).to(device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        return count / self._copies()

    def _ignore_repeats(self, batches: list[dict[str, Any]]) -> None:
        """Ignore the labels of rows which fill the last batch, in the caller's list: it trains on those very batches."""
        last = batches[-1]
        labels = {name: last[name] for name in (*self.label_names, SHIFTED) if isinstance(last.get(name), Tensor)}
        batches[-1] = {**last} | {name: without_repeats(self.accelerator, y, self._copies()) for name, y in labels.items()}

    def _log_terms(self, *parts: Tensor) -> None:
        self._terms.add(torch.stack([part.detach() for part in parts]), self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the loss (nats, means over the steps since the last log) to each training log, and to the summary of
        the training the mean NLL of its steps: `train_loss` does not compare between ε, `train_nll` does."""
        if "loss" in logs or "train_loss" in logs:
            found = self._terms.take(self.state.global_step, self.accelerator.gather)
            if "loss" in logs and found:
                logs |= found
                if self.smoothing.schedule is not None:
                    logs["epsilon"] = self.smoothing.at(self.state.global_step - 1, self.state.max_steps).epsilon
            if "train_loss" in logs and self._terms.nll is not None:
                logs["train_nll"] = self._terms.nll
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A stock Trainer resumed from the checkpoint of its last step, in mid-epoch, takes one step more than max_steps.
        # A run which early stopping had ended takes none either.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._terms = LoggedTerms()
        self._head, self._head_sought = None, False
        if self.model_init is not None:  # which may make another model
            self._shift, self._checked_shifted = self._given_shift, self._given_shift is not None
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._online_state.resume_from = last or None
        return super().train(resume_from_checkpoint, *args, **kwargs)


class LabelSmoothingTrainer(LabelSmoothingMixin, Trainer):
    """`transformers.Trainer` with label smoothing done right; see `LabelSmoothingMixin`."""
