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

from hf_ls.calibration.token_temperature import CURVES, CrossFittedTemperature, TokenTemperature, kept_rows, temperature_curves
from hf_ls.common.models import IGNORE_INDEX, base_model, chooses, output_embedding
from hf_ls.losses._rows import Observer
from hf_ls.losses.cross_entropy import check_soft_targets
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.ceiling import ceiling_warning, last_epsilon
from hf_ls.metrics.classes import CLASS_SCORES, ClassCounts
from hf_ls.metrics.core import N_BINS, bin_edges
from hf_ls.metrics.entities import words_of
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.metrics.tokens import TokenCalibration
from hf_ls.trainer.batch import Batch, copied
from hf_ls.trainer.logits_free import LogitsFreeHead

SOFT_SCORES = ("soft_nll", "soft_brier")  # against the distributions of `soft_labels`
_METRICS = ("nll", "calibrated_nll", "brier", "ece", "full_ece", "accuracy", "signed_gap", "perplexity", "eos_nll", "eos_ece")
# At a vocabulary of 128k this is 32 rows in float64: 32 MiB however long the batch is.
_CHUNK_ELEMENTS = 1 << 22
_GAPS = N_BINS - 1


class Evaluation:
    """The sums of one evaluation.

    Attributes:
        sums: over all labels which count.
        tokens: the same for labels [B, T], with groups and intervals; None for other labels.
        by_class: counts of each class, of classifiers only, whose classes have names.
        pending: numbers per item [..., 5 and more] and labels [...] of the batch under way; None until the loss has seen it.
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
        names: Sequence[str] = (),
        selected_by: str | None = None,
        crossed: CrossFittedTemperature | None = None,
    ) -> None:
        self.sums = StreamingCalibration()
        self.tokens: TokenCalibration | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.rows = self.examples = 0
        self.labelled = self.reached = False
        self._eos_token_id, self._token_counts = eos_token_id, token_counts
        self._temperature, self._fit = temperature, fit
        self._inverse_classes, self._classes, self._spans = 0.0, 1, False
        self._columns: dict[str, slice] = {}
        self._soft: dict[str, float] = {}
        self._names = names
        # 21 temperatures of a whole vocabulary cost more than its softmax: of tokens only where the best model is chosen by it.
        self._crosses = crossed is not None or (selected_by or "").endswith("calibrated_nll")
        self._crossed = CrossFittedTemperature() if crossed is None else crossed
        self.by_class: ClassCounts | None = None

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Keep the items of a batch and return their mean NLL, NaN where no label counts; 0 while a temperature is fitted."""
        if self._fit is not None:
            self._fit.update(logits, batch.labels)
            return logits.new_zeros(())
        tokens = batch.labels.dim() > 1 and not batch.spans
        items = item_statistics(logits, batch.labels, temperature=self._temperature, gaps=tokens)
        more = {} if batch.soft is None else soft_statistics(logits, batch, self._temperature)
        if self._names and not batch.spans:
            more = {"prediction": logits.argmax(-1)} | more
        if self._crosses or batch.labels.dim() == 1:
            more["curves"] = temperature_curves(logits / self._temperature, batch.labels)
        return self._keep(items, batch, logits.shape[-1], more)

    def loss_without_logits(
        self, head: LogitsFreeHead, model: nn.Module, inputs: dict[str, Any], batch: Batch, observer: Observer | None
    ) -> tuple[Tensor, Any]:
        """As `loss`, from a forward without logits, with its outputs."""
        found: list[Tensor] = []
        curves: list[Tensor] = []

        def each(logits: Tensor, y: Tensor) -> None:
            if observer is not None:
                observer(logits, y)
            if self._fit is not None:
                self._fit.update(logits, y)
            else:
                found.append(item_statistics(logits, y, temperature=self._temperature, gaps=True))
                if self._crosses:
                    curves.append(temperature_curves(logits / self._temperature, y))

        with torch.no_grad():
            outputs = head(model, inputs, batch.labels, Smoothing(0.0), observer=each).outputs
        if self._fit is not None:
            return batch.weight.new_zeros(()), outputs
        items = batch.weight.new_full((*batch.labels.shape, 4 + _GAPS), math.nan)
        if found:  # without any label too: the other processes gather theirs
            items[batch.kept] = torch.cat(found)
        more = {}
        if self._crosses:
            more["curves"] = items.new_zeros(*batch.labels.shape, CURVES)
            more["curves"][batch.kept] = torch.cat([items.new_zeros(0, CURVES), *(part.to(items) for part in curves)])
        return self._keep(items, batch, head.classes, more), outputs

    def _keep(self, items: Tensor, batch: Batch, classes: int, more: dict[str, Tensor] | None = None) -> Tensor:
        # Rows [..., 5 + m]: four numbers and the label; ids below 2**53 are exact. Of single labels and of positions 1/K of their
        # logits too, which may differ from batch to batch; the vocabulary of tokens does not.
        parts = {"items": items[..., :4], "label": batch.labels} | (more or {})
        if items.shape[-1] > 4:
            parts["gaps"] = items[..., 4:]
        if batch.spans or batch.labels.dim() == 1:
            parts["inverse_classes"] = torch.full_like(items[..., 0], 1 / classes)
        columns = [part.to(items).reshape(*batch.labels.shape, -1) for part in parts.values()]
        ends = np.cumsum([part.shape[-1] for part in columns]).tolist()
        self._columns = {name: slice(a, b) for name, a, b in zip(parts, [0, *ends], ends, strict=False)}
        self.pending = torch.cat(columns, -1), batch.labels
        self._classes, self._spans = classes, batch.spans
        return items[..., 2].nanmean()

    def add(self, gathered: np.ndarray) -> None:
        """Count the kept rows [..., 5 + m] of all processes."""
        counts = ~np.isnan(gathered).any(-1)
        kept = gathered[counts]
        columns = {name: kept[:, place].squeeze(-1) for name, place in self._columns.items() if place.stop - place.start == 1}
        confidence, correct, nll, brier = kept[:, self._columns["items"]].T
        self.sums.update(confidence, correct.astype(bool), nll, brier)
        if "curves" in self._columns:
            each = np.where(counts[..., None], gathered[..., self._columns["curves"]], 0.0)
            self._crossed.update(each.reshape(len(each), -1, CURVES).sum(axis=1))
        inverse = columns.get("inverse_classes")
        self._inverse_classes += len(nll) / self._classes if inverse is None else float(inverse.sum())
        self.examples += int(counts.reshape(len(counts), -1).any(1).sum())
        for name in SOFT_SCORES:
            if name in columns:
                self._soft[name] = self._soft.get(name, 0.0) + float(columns[name].sum())
        if "prediction" in columns:
            pair = columns["prediction"].astype(np.int64), columns["label"].astype(np.int64)
            found = ClassCounts.of(*pair, self._classes)
            self.by_class = found if self.by_class is None else self.by_class.plus(found)
        if gathered.ndim == 3 and not self._spans:
            if self.tokens is None:
                self.tokens = TokenCalibration(
                    eos_token_id=self._eos_token_id, token_counts=self._token_counts, **words_of(self._names)
                )
            whole = {
                name: np.nan_to_num(gathered[..., self._columns[name]].squeeze(-1), nan=IGNORE_INDEX).astype(np.int64)
                for name in ("label", "prediction")
                if name in self._columns
            }
            gaps = gathered[..., self._columns["gaps"]] if "gaps" in self._columns else None
            self.tokens.update(gathered[..., self._columns["items"]], whole["label"], whole.get("prediction"), gaps)

    def metrics(self) -> dict[str, float]:
        """The metrics as far as they were measured; empty without a label which counts.

        `calibrated_nll` is the NLL at a temperature fitted on other examples of this very split (`CrossFittedTemperature`): of
        single labels, and of tokens where `metric_for_best_model` names it.
        Classifiers also give `f1_macro`, `f1_weighted` and `balanced_accuracy`, and batches with soft labels `soft_nll` and
        `soft_brier` (`metrics.classes`). Labels [B, T] also give `full_ece` and `perplexity`, and those of language
        models `eos_nll` and `eos_ece` of the end-of-sequence token.
        """
        if not len(self.sums):
            return {}
        found = self.sums.compute()
        if (calibrated := self._crossed.nll()) is not None:
            found["calibrated_nll"] = calibrated
        if self.tokens is not None and len(self.tokens):
            if (full := self.tokens.full_ece()) is not None:
                found["full_ece"] = full
            found["perplexity"] = math.exp(found["nll"]) if found["nll"] < 709 else math.inf
            if (entities := self.tokens.entity_f1()) is not None:
                found["entity_f1"] = entities["value"]
            for group in self.tokens.groups():
                if group["name"] == "end of sequence":
                    found |= {"eos_nll": group["nll"], "eos_ece": group["ece"]}
        found |= {name: total / len(self.sums) for name, total in self._soft.items()}
        if self.by_class is not None:
            found |= {name: float(score(self.by_class)) for name, score in CLASS_SCORES.items()}
        return {name: found[name] for name in (*_METRICS, *CLASS_SCORES, "entity_f1", *SOFT_SCORES) if name in found}

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
def item_statistics(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0, gaps: bool = False
) -> Tensor:
    """Confidence, correctness, NLL and Brier score of each prediction, float64 [..., 4]; NaN rows where ignored.

    With z = logits / temperature and p = softmax z: confidence = max p (0 to 1); correct = 1 if arg max p = y (the first of
    equals); nll = lse(z) − z_y in nats; brier = 1 − 2·p_y + Σ p² (0 to 2, lower is better).
    Shapes: logits [..., K], labels [...]. With `gaps` [..., 18]: behind these, for each of 15 bins but the first, the sum of all
    p in it less 1 for p_y, of which `TokenCalibration` makes `full_ece`.
    Rows are reduced in chunks, so memory does not grow with the number of tokens.

    Raises: ValueError for labels outside [0, K) other than `ignore_index`, and for NaN logits.
    """
    dtype = torch.float64 if logits.device.type != "mps" else torch.float32
    out = torch.full((labels.numel(), 4 + gaps * _GAPS), float("nan"), dtype=dtype, device=logits.device)
    for chunk, rows, y in kept_rows(logits, labels, ignore_index, _CHUNK_ELEMENTS):
        z = rows / temperature
        log_normaliser = z.logsumexp(-1)
        if bool(log_normaliser.isnan().any()):
            raise ValueError("expected finite logits, got NaN; the model diverged: lower the learning rate")
        top, prediction = z.max(-1)
        nll = log_normaliser - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        squares = ((2 * z).logsumexp(-1) - 2 * log_normaliser).exp()
        confidence = (top - log_normaliser).exp()
        numbers = torch.stack([confidence, (prediction == y).to(dtype), nll, 1 - 2 * (-nll).exp() + squares], -1)
        out[chunk] = torch.cat([numbers, _gaps_of_bins(z, log_normaliser, nll)], -1) if gaps else numbers
    return out.reshape(*labels.shape, -1)


def _gaps_of_bins(z: Tensor, log_normaliser: Tensor, nll: Tensor) -> Tensor:
    """Σ p − [p_y] over the p in each bin (a, b] but the first, [n, 14].

    Of probabilities which sum to 1 no more than 14 exceed 1/15: the largest 15 are enough, rounding included.
    """
    edges = torch.from_numpy(bin_edges(N_BINS)).to(z)
    top = (z.topk(min(N_BINS, z.shape[-1])).values - log_normaliser.unsqueeze(-1)).exp()
    label = (-nll).exp().unsqueeze(-1)
    found = z.new_zeros(len(z), N_BINS)
    for values, added in ((top, top), (label, -torch.ones_like(label))):
        found.scatter_add_(1, (torch.bucketize(values, edges) - 1).clamp(0, N_BINS - 1), added)
    return found[:, 1:]


@torch.no_grad()
def soft_statistics(logits: Tensor, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """`metrics.classes.soft_scores` of the batch, shaped as its labels, NaN where ignored."""
    dtype = torch.float64 if logits.device.type != "mps" else torch.float32
    z, q = logits[batch.kept].to(dtype) / temperature, batch.soft[batch.kept].to(dtype)  # type: ignore[index]
    check_soft_targets(q, Smoothing(0.0))
    log_p = z.log_softmax(-1)
    nll, brier = -(q * log_p.masked_fill(q == 0, 0)).sum(-1), (log_p.exp() - q).square().sum(-1)
    empty = torch.full(batch.labels.shape, math.nan, dtype=dtype, device=logits.device)
    return {name: empty.masked_scatter(batch.kept, found) for name, found in zip(SOFT_SCORES, (nll, brier), strict=True)}


def class_names_of(model: nn.Module) -> list[str]:
    """The names of the classes, where a class means the same in every example: not of the tokens of a vocabulary, nor of the
    choices of multiple choice."""
    names = getattr(getattr(base_model(model), "config", None), "id2label", None)
    if not names or output_embedding(model) is not None or chooses(model):
        return []
    return [str(name) for _, name in sorted(names.items())]


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
