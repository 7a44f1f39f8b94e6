"""The evaluation half of the Trainer mixin: unsmoothed, over all items at once, the same on any number of processes.

Owns: `CalibratedEvaluation`: which numbers an evaluation reports and keeps, and the temperature pass.
Does not own: the numbers of one item (`statistics`), their sums (`metrics`), the training loss (`trainer`).
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import EvalLoopOutput

from hf_ls.calibration.token_temperature import TokenTemperature
from hf_ls.common.models import IGNORE_INDEX, output_embedding
from hf_ls.losses._rows import Observer, observe
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.ceiling import ceiling_warning, last_epsilon
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.trainer.logits_free import LogitsFreeHead
from hf_ls.trainer.processes import gather_once, reshard, without_repeats
from hf_ls.trainer.shift import SHIFTED
from hf_ls.trainer.spans import check_both_positions
from hf_ls.trainer.statistics import item_statistics

logger = logging.getLogger(__name__)

_METRICS = ("nll", "brier", "ece", "accuracy", "signed_gap")


class CalibratedEvaluation(Trainer):
    """What `LabelSmoothingMixin` does in `evaluate` and `predict`, always in the order of the dataset.

    A Trainer itself, so that it comes before the Trainer in `class Mine(Theirs, LabelSmoothingMixin, Trainer)` too; else
    Python would put Trainer's own evaluation first there, and the metrics would be missing in silence.

    Attributes:
        temperature: divides the logits of the evaluation statistics, and of nothing else.
        token_counts: how often each token id is a training label [V]; evaluations of tokens then have frequency groups.
        token_calibration: the sums of the last evaluation of labels [B, T]; None before.
    """

    temperature: float = 1.0
    token_counts: np.ndarray | None = None
    token_calibration: TokenCalibration | None = None
    model: Any
    _spans: bool = False  # the labels are a start and an end position, each an item of the metrics
    _statistics: StreamingCalibration | None = None
    _tokens: TokenCalibration | None = None
    _fit: TokenTemperature | None = None
    _judged: tuple[float, int] | None = None  # accuracy and items of the last evaluation, or its sequences of tokens
    _classes = 0  # logits of one item there; where the batches differ in it, the fewest, which allow the largest epsilon
    _warned_of_ceiling = False
    _pending: tuple[Tensor, Tensor] | None = None  # items [..., 4] and aligned labels [...] of the batch under way
    _observer: Observer | None = None

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

    def _evaluation_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean NLL of a batch, its items kept for the metrics."""
        self._classes = min(self._classes or logits.shape[-1], logits.shape[-1])
        if self._observer is not None:
            kept = labels != IGNORE_INDEX
            observe(self._observer, logits[kept], labels[kept])
        if self._fit is not None:
            self._fit.update(logits, without_repeats(self.accelerator, labels, self._copies()))
            return logits.new_zeros(())
        return self._keep(item_statistics(logits, labels, temperature=self.temperature), labels)

    def _logits_free_evaluation(self, head: LogitsFreeHead, model: nn.Module, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """As `_evaluation_loss`, from a forward without logits."""
        found: list[Tensor] = []
        fit, observer = self._fit, self._observer
        if fit is not None:
            labels = without_repeats(self.accelerator, labels, self._copies())

        def each(logits: Tensor, y: Tensor) -> None:
            self._classes = logits.shape[-1]
            if observer is not None:
                observer(logits, y)
            if fit is not None:
                fit.update(logits, y)
            else:
                found.append(item_statistics(logits, y, temperature=self.temperature))

        with torch.no_grad():
            head(model, batch, labels, Smoothing(0.0), observer=each)
        if fit is not None:
            return torch.zeros((), device=labels.device)
        exact = torch.float64 if labels.device.type != "mps" else torch.float32
        items = torch.full((*labels.shape, 4), math.nan, dtype=exact, device=labels.device)
        if found:
            items[labels != IGNORE_INDEX] = torch.cat(found)
        return self._keep(items, labels)  # without any label too: the other processes gather theirs

    def _keep(self, items: Tensor, labels: Tensor) -> Tensor:
        if self._statistics is not None:
            self._pending = items, labels
        nll = items[..., 2]
        return nll.nanmean() if bool((~nll.isnan()).any()) else nll.new_zeros(())

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # A stock Trainer groups evaluation by length too: predictions come in another order than the dataset, in silence.
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def _copies(self) -> int:
        """How many processes in a row see the same batch."""
        return self.get_tp_size() * self.get_cp_size()

    def _gather_once(self, items: Any) -> Any:
        return gather_once(self.accelerator, items, self._copies())

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.prediction_step`, keeping four numbers per item for the exact calibration sums."""
        self._pending = None
        if self._spans:
            check_both_positions(inputs)
        if inputs.get(SHIFTED) is not None and inputs.get(self.label_names[0]) is None:  # the Trainer asks for labels by name
            labels = nn.functional.pad(inputs[SHIFTED], (1, 0), value=IGNORE_INDEX)[:, :-1]
            inputs = {**inputs, self.label_names[0]: labels}
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        if self._pending is None or self._statistics is None:
            return result
        items, labels = self._pending
        rows = torch.cat([items, labels.unsqueeze(-1).to(items.dtype)], -1)  # ids below 2**53 are exact
        if labels.dim() > 1:  # processes pad their tokens to different lengths
            rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=math.nan)
        found = self._gather_once(rows).cpu().numpy().astype(np.float64)
        confidence, correct, nll, brier = found[~np.isnan(found).any(-1)].T[:4]
        self._statistics.update(confidence, correct.astype(bool), nll, brier)
        if labels.dim() == 2 and not self._spans:
            if self._tokens is None:
                self._tokens = TokenCalibration(
                    eos_token_id=end_of_sequence(self.model, self.processing_class), token_counts=self.token_counts
                )
            self._tokens.update(found[..., :4], np.nan_to_num(found[..., 4], nan=IGNORE_INDEX).astype(np.int64))
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the unsmoothed calibration metrics over all items.

        Labels [B, T] also give `perplexity`, and those of language models `eos_nll` and `eos_ece` of the end-of-sequence token.
        """
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"expected temperature > 0, got {self.temperature}; set trainer.temperature to 1.0 for none")
        standalone = not self.is_in_train and self.model_wrapped is self.model
        self._statistics, self._tokens, self._classes = StreamingCalibration(), None, 0
        # Seq2SeqTrainer gathers the examples repeated to fill the last batch too, so that its metrics count them twice; the
        # Trainer counts the copies of tensor parallelism.
        self.gather_function = self._gather_once
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            statistics, self._statistics = self._statistics, None
            if standalone:
                self._forget_evaluation_preparation()
            if not self.is_in_train:
                reshard(self.model)
        metrics = {} if output.metrics is None else output.metrics
        found = statistics.compute() if len(statistics) else {}
        if found:
            metrics[f"{metric_key_prefix}_loss"] = found["nll"]
            self._judged = found["accuracy"], len(statistics)
        tokens = self._tokens
        if tokens is not None and len(tokens):
            self.token_calibration, self._judged = tokens, (found["accuracy"], tokens.sequences)
            found["perplexity"] = math.exp(found["nll"]) if found["nll"] < 709 else math.inf
            for group in tokens.groups():
                if group["name"] == "end of sequence":
                    found |= {"eos_nll": group["nll"], "eos_ece": group["ece"]}
        for name in (*_METRICS, "perplexity", "eos_nll", "eos_ece"):
            if name in found:
                metrics.setdefault(f"{metric_key_prefix}_{name}", found[name])
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, with a warning, once, when ε asks for less confidence than the model is right."""
        self._judged = None
        metrics = super().evaluate(*args, **kwargs)
        if self._judged is not None:
            self._warn_of_ceiling(*self._judged)
        return metrics

    def _warn_of_ceiling(self, accuracy: float, n: int) -> None:
        smoothing, criterion = getattr(self, "smoothing", None), getattr(self, "criterion", None)
        if self._warned_of_ceiling or smoothing is None or smoothing.prior is not None or not getattr(criterion, "plain", False):
            return
        epsilon = last_epsilon(smoothing.epsilon, smoothing.schedule)
        warning = ceiling_warning(epsilon, smoothing.convention, accuracy, n, self._classes)
        if warning and self.is_world_process_zero():
            logger.warning(warning)
        self._warned_of_ceiling = warning is not None

    def _forget_evaluation_preparation(self) -> None:
        """Let a later train() wrap the model: accelerate >= 1.14 takes a model prepared for evaluation as prepared for good
        and leaves it out of DDP, so that the processes drift apart in silence."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # prepared by sharding, which training shares
        self.accelerator._models = [m for m in self.accelerator._models if m is not self.model]
        if getattr(self.model, "_is_accelerate_prepared", False):
            self.model._is_accelerate_prepared = False


def end_of_sequence(model: nn.Module, tokenizer: Any = None) -> int | None:
    """The token id which ends a sequence, the first where there are several; None for other models than language models.

    The tokenizer is asked first, to which the Trainer aligns the model when it trains, then `generation_config` and `config`.
    """
    if output_embedding(model) is None:  # its classes are no tokens
        return None
    inner: Any = unwrap_model(model)
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for source in (tokenizer, getattr(inner, "generation_config", None), text):
        found = getattr(source, "eos_token_id", None)
        found = found[0] if isinstance(found, list | tuple) and found else found
        if isinstance(found, int):
            return found
    return None
