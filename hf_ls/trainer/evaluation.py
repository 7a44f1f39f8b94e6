"""What an evaluation measures: unsmoothed, over all items at once, the same on any number of processes.

`item_statistics` reduces logits to four numbers per item before anything is gathered; `Evaluation` adds them up. `Steps`
tells evaluation from training; what is gathered is the Trainer's part (`mixin`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_utils import unwrap_model

from hf_ls.calibration.token_temperature import TokenTemperature
from hf_ls.common.models import IGNORE_INDEX, output_embedding
from hf_ls.losses._rows import Observer
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.ceiling import ceiling_warning, last_epsilon
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.trainer.batch import Batch, copied
from hf_ls.trainer.logits_free import LogitsFreeHead

_METRICS = ("nll", "brier", "ece", "accuracy", "signed_gap", "perplexity", "eos_nll", "eos_ece")
# At a vocabulary of 128k this is 32 rows in float64: 32 MiB however long the batch is.
_CHUNK_ELEMENTS = 1 << 22


class Evaluation:
    """The sums of one evaluation.

    Attributes:
        sums: over all labels which count.
        tokens: the same for labels [B, T], with groups and intervals; None for other labels.
        pending: rows of numbers per item [..., 5 or 6] and labels [...] of the batch under way; None until the loss has seen it.
        examples: rows with a label, the number of independent observations.
        labelled: whether any batch had labels at all, ignored or not.
        reached: whether any batch came through our `prediction_step`.
    """

    def __init__(
        self,
        eos_token_id: int | None = None,
        token_counts: np.ndarray | None = None,
        temperature: float = 1.0,
        fit: TokenTemperature | None = None,
    ) -> None:
        self.sums = StreamingCalibration()
        self.tokens: TokenCalibration | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.rows = self.examples = 0
        self.labelled = self.reached = False
        self._eos_token_id, self._token_counts = eos_token_id, token_counts
        self._temperature, self._fit = temperature, fit
        self._inverse_classes, self._classes, self._spans = 0.0, 1, False

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Keep the items of a batch and return their mean NLL, NaN where no label counts; 0 while a temperature is fitted."""
        if self._fit is not None:
            self._fit.update(logits, batch.labels)
            return logits.new_zeros(())
        return self._keep(item_statistics(logits, batch.labels, temperature=self._temperature), batch, logits.shape[-1])

    def loss_without_logits(
        self, head: LogitsFreeHead, model: nn.Module, inputs: dict[str, Any], batch: Batch, observer: Observer | None
    ) -> tuple[Tensor, Any]:
        """As `loss`, from a forward without logits, with its outputs."""
        found: list[Tensor] = []

        def each(logits: Tensor, y: Tensor) -> None:
            if observer is not None:
                observer(logits, y)
            if self._fit is not None:
                self._fit.update(logits, y)
            else:
                found.append(item_statistics(logits, y, temperature=self._temperature))

        with torch.no_grad():
            outputs = head(model, inputs, batch.labels, Smoothing(0.0), observer=each).outputs
        if self._fit is not None:
            return batch.weight.new_zeros(()), outputs
        items = batch.weight.new_full((*batch.labels.shape, 4), math.nan)
        if found:  # without any label too: the other processes gather theirs
            items[batch.kept] = torch.cat(found)
        return self._keep(items, batch, head.classes), outputs

    def _keep(self, items: Tensor, batch: Batch, classes: int) -> Tensor:
        # Rows [..., 5]: four numbers and the label; ids below 2**53 are exact. Of single labels and of positions 1/K of their
        # logits too, which may differ from batch to batch; the vocabulary of tokens does not.
        parts = [items, batch.labels.unsqueeze(-1).to(items.dtype)]
        if batch.spans or batch.labels.dim() == 1:
            parts.append(torch.full_like(items[..., :1], 1 / classes))
        self.pending, self._classes = (torch.cat(parts, -1), batch.labels), classes
        self._spans = batch.spans
        return items[..., 2].nanmean()

    def add(self, gathered: np.ndarray) -> None:
        """Count the kept rows [..., 5] or [..., 6] of all processes."""
        counts = ~np.isnan(gathered).any(-1)
        confidence, correct, nll, brier, _, *inverse = gathered[counts].T
        self.sums.update(confidence, correct.astype(bool), nll, brier)
        self._inverse_classes += float(inverse[0].sum()) if inverse else len(nll) / self._classes
        self.examples += int(counts.reshape(len(counts), -1).any(1).sum())
        if gathered.ndim == 3 and not self._spans:
            if self.tokens is None:
                self.tokens = TokenCalibration(eos_token_id=self._eos_token_id, token_counts=self._token_counts)
            self.tokens.update(gathered[..., :4], np.nan_to_num(gathered[..., 4], nan=IGNORE_INDEX).astype(np.int64))

    def metrics(self) -> dict[str, float]:
        """The metrics as far as they were measured; empty without a label which counts.

        Labels [B, T] also give `perplexity`, and those of language models `eos_nll` and `eos_ece` of the end-of-sequence token.
        """
        if not len(self.sums):
            return {}
        found = self.sums.compute()
        if self.tokens is not None and len(self.tokens):
            found["perplexity"] = math.exp(found["nll"]) if found["nll"] < 709 else math.inf
            for group in self.tokens.groups():
                if group["name"] == "end of sequence":
                    found |= {"eos_nll": group["nll"], "eos_ece": group["ece"]}
        return {name: found[name] for name in _METRICS if name in found}

    def add_to(self, metrics: dict[str, Any], prefix: str) -> None:
        """Put what was measured among the metrics of a Trainer; a loss of labels none of which counts is NaN, not 0."""
        found = self.metrics()
        if found or self.labelled:
            metrics[f"{prefix}_loss"] = found.get("nll", math.nan)
        for name, value in found.items():
            metrics.setdefault(f"{prefix}_{name}", value)

    def missing(self, trainer: type) -> str | None:
        """Why an evaluation with labels has no calibration metrics, in a sentence; None where it has, or has no labels."""
        if len(self.sums):
            return None
        if not self.reached:
            name = next(kind.__name__ for kind in trainer.__mro__ if "prediction_step" in vars(kind))
            return (
                f"No calibration metrics: prediction_step of {name} does not call super().prediction_step, so that its loss is "
                "another one; put LabelSmoothingMixin before that class"
            )
        ignored = f"No label counted in this evaluation: all are {IGNORE_INDEX}, ignored; its loss is NaN"
        return ignored if self.labelled else None

    def ceiling_warning(self, smoothing: Smoothing) -> str | None:
        """One sentence when the ε at the end of training asks for less confidence than the model is right; else None.

        K is that of the logits seen: the choices of multiple choice, the positions of question answering. Where it differs from
        row to row it is the harmonic mean, since the confidence at the optimum is 1 − ε + ε/K.
        """
        if not len(self.sums) or smoothing.prior is not None:
            return None
        last = last_epsilon(smoothing.epsilon, smoothing.schedule)
        classes = len(self.sums) / self._inverse_classes
        accuracy = self.sums.compute()["accuracy"]
        return ceiling_warning(last, smoothing.convention, accuracy, self.examples, round(classes))


@torch.no_grad()
def item_statistics(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """Confidence, correctness, NLL and Brier score of each prediction, float64 [..., 4]; NaN rows where ignored.

    With z = logits / temperature and p = softmax z: confidence = max p (0 to 1); correct = 1 if arg max p = y (the first of
    equals); nll = lse(z) − z_y in nats; brier = 1 − 2·p_y + Σ p² (0 to 2, lower is better).
    Shapes: logits [..., K], labels [...].
    Rows are reduced in chunks, so memory does not grow with the number of tokens.

    Raises: ValueError for labels outside [0, K) other than `ignore_index`, and for NaN logits.
    """
    num_classes = logits.shape[-1]
    flat, y = logits.reshape(-1, num_classes), labels.reshape(-1)
    kept = y != ignore_index
    if bool((kept & ((y < 0) | (y >= num_classes))).any()):
        raise ValueError(f"expected labels in [0, {num_classes}) or {ignore_index}, got others; map class names to ids 0..K-1")
    dtype = torch.float64 if logits.device.type != "mps" else torch.float32
    out = torch.full((y.numel(), 4), float("nan"), dtype=dtype, device=logits.device)
    rows = kept.nonzero().squeeze(1)
    for chunk in rows.split(max(1, _CHUNK_ELEMENTS // num_classes)):
        z = flat[chunk].to(dtype) / temperature
        log_normaliser = z.logsumexp(-1)
        if bool(log_normaliser.isnan().any()):
            raise ValueError("expected finite logits, got NaN; the model diverged: lower the learning rate")
        top, prediction = z.max(-1)
        nll = log_normaliser - z.gather(-1, y[chunk].unsqueeze(-1)).squeeze(-1)
        squares = ((2 * z).logsumexp(-1) - 2 * log_normaliser).exp()
        confidence = (top - log_normaliser).exp()
        out[chunk] = torch.stack([confidence, (prediction == y[chunk]).to(dtype), nll, 1 - 2 * (-nll).exp() + squares], -1)
    return out.reshape(*labels.shape, 4)


def beside_loss(loss: Tensor, outputs: Any) -> Any:
    """Outputs of a model without labels as it returns them with labels: a Trainer takes `outputs[1:]` of a tuple."""
    return outputs if isinstance(outputs, dict) else (loss, outputs) if isinstance(outputs, Tensor) else (loss, *outputs)


def for_prediction(model: Any) -> Any:
    """The model for a prediction without labels; a bare tensor in a tuple, of which a Trainer takes the first element."""

    def forward(**inputs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return forward


@contextmanager
def given_copies(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """In this block a forward with labels of these names, inside wrappers too, gets copies of its inputs.

    It may write into them, and a Trainer's own `prediction_step` returns the labels afterwards.
    """

    def copies(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, copied(kwargs) if any(name in kwargs for name in names) else kwargs

    handle = unwrap_model(model).register_forward_pre_hook(copies, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


class Steps(Trainer):
    """A `Trainer` which knows whether a step is of a training or an evaluation, takes none too many, and evaluates in order."""

    _evaluates: bool | None = None  # the step under way: of an evaluation, of a training, or none of the Trainer's

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`."""
        with self._step(evaluates=False):
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _step(self, *, evaluates: bool) -> Iterator[None]:
        before, self._evaluates = self._evaluates, evaluates
        try:
            yield
        finally:
            self._evaluates = before

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A stock Trainer resumed from the checkpoint of its last step, in mid-epoch, takes one step more than max_steps.
        # A run which early stopping had ended takes none either.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # A stock Trainer groups evaluation by length too: predictions come in another order than the dataset, in silence.
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy
