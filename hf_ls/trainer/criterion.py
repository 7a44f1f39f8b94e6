"""What one training item costs: the smoothed cross entropy, another objective, or an adaptive epsilon.

Beside it: the state of online label smoothing in checkpoints, the terms of the loss as the log shows them, and which techniques
take the place of the plain cross entropy. Label smoothing, its adaptive forms, the objectives which press confidence down,
distillation and mixup all do the same thing to the target and together overshoot; and of any two together no result can be
credited to one of them.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ls.common.files import write_atomically
from hf_ls.data.soft_labels import SOFT
from hf_ls.losses.adaptive import OnlineLabelSmoothing, OnlineSettings
from hf_ls.losses.cross_entropy import SmoothedTerms, smoothed_terms, soft_target_terms
from hf_ls.losses.objectives import Objective, check_smoothing, settle
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.batch import Batch
from hf_ls.trainer.distillation import Distillation
from hf_ls.trainer.mixup import Mixup
from hf_ls.trainer.spans import span_terms

logger = logging.getLogger(__name__)

ADAPTIVE = ("graduated", "instance", "online")
_ONLINE_STATE = "online_label_smoothing.safetensors"
_SMOOTHED = ("smoothed_ce", "generalised_smoothing")  # objectives which are label smoothing, no second technique
_TERMS = ("nll", "smoothing_term", "distillation_term")  # the last only with a teacher

# Modules of Trainers whose own loss is the cross entropy.
_CROSS_ENTROPY = ("hf_ls.", "transformers.", "trl.trainer.sft_trainer")


class Criterion:
    """The terms of each training item: loss = nll + smoothing_term, the second being whatever is not the plain NLL.

    Args:
        objective: a name in `objectives.NAMES`, an `Objective`, or an `OnlineLabelSmoothing`.
        params: parameters of a named objective, e.g. {"gamma": 3}.
        soft: the targets are the distributions of the batch instead of its labels.

    Raises: ValueError and TypeError as `settle`; ValueError for an ε which the objective does not use, and for soft targets with
    another objective than the smoothed cross entropy.
    """

    def __init__(
        self,
        smoothing: Smoothing,
        objective: str | Objective | OnlineLabelSmoothing = "smoothed_ce",
        params: dict[str, Any] | None = None,
        *,
        soft: bool = False,
    ) -> None:
        settled = settle(objective, params)
        self.objective = settled if isinstance(settled, Objective) else None
        self._settings = settled if isinstance(settled, OnlineSettings) else None
        self._given_online = self.online = settled if isinstance(settled, OnlineLabelSmoothing) else None
        self.name = "online" if self.objective is None else self.objective.name
        self.params = dict(params or {}) if self.objective is None else dict(self.objective.params)
        # Whether this is the smoothed cross entropy and nothing else.
        self.plain = self.objective is not None and self.objective.plain
        self.soft = soft
        check_smoothing(self.name, smoothing)
        if soft and not self.plain:
            raise ValueError(
                f"expected the objective 'smoothed_ce' with soft labels, got {self.name!r}, which needs a single label; drop one"
            )

    def for_rows(self, smoothing: Smoothing) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The objective as (logits [n, K], labels [n]) -> losses [n] for the logits-free loop; None if `plain`."""
        objective = self.objective
        if objective is None or self.plain:
            return None
        return lambda logits, labels: objective(logits, labels, smoothing)

    def restart(self) -> None:
        """Forget the state of a training before: online label smoothing by name starts afresh, an object goes on."""
        self.online = self._given_online

    def build(self, num_classes: int) -> OnlineLabelSmoothing:
        """The state of online label smoothing, made once the number of classes is known.

        Raises: ValueError above 4096 classes; TypeError for another objective.
        """
        if self.online is None:
            if self._settings is None:
                raise TypeError(f"expected the objective 'online', got {self.name!r}, which has no state; do not build it")
            self.online = self._settings.build(num_classes)
        return self.online

    def terms(self, logits: Tensor, labels: Tensor, smoothing: Smoothing, *, ignore_index: int = -100) -> SmoothedTerms:
        """NLL and the rest per item, shaped as the labels, nats.

        Raises: as `Objective.terms` and `OnlineLabelSmoothing.terms`.
        """
        if self.plain:  # the short way
            return smoothed_terms(logits, labels, smoothing, ignore_index=ignore_index)
        if self.objective is not None:
            return self.objective.terms(logits, labels, smoothing, ignore_index=ignore_index)
        return self.build(logits.shape[-1]).to(logits.device).terms(logits, labels)

    def parts(
        self, logits: Tensor, batch: Batch, smoothing: Smoothing, distillation: Distillation | None, teacher_logits: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The parts of the loss of each item in the order of the log, unweighted: two, or three with a teacher.

        Raises: as `terms`, `span_terms` and `Distillation.terms`.
        """
        labels = batch.labels
        if self.soft:
            if batch.soft is None:
                raise ValueError(
                    f"expected `{SOFT}` in the batch, got {sorted(batch.others)}; add that column, or train on labels"
                )
            found = soft_target_terms(logits, labels, batch.soft, smoothing)
        else:
            found = span_terms(logits, labels, smoothing, batch.others) if batch.spans else self.terms(logits, labels, smoothing)
        if distillation is None or teacher_logits is None:
            return found
        return distillation.terms(found, logits, teacher_logits, labels)


class OnlineState(TrainerCallback):
    """End the epochs of online label smoothing, and carry its state through checkpoints.

    Saving is collective: the sums of all processes meet in process 0, which writes them beside the model.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.resume_from: str | None = None

    def register(self, callbacks: list[Any], criterion: Criterion) -> None:
        """Be among the callbacks of a Trainer if the objective is "online", and only then."""
        self.criterion = criterion
        if self in callbacks:
            callbacks.remove(self)
        if criterion.name == "online":  # first: its file must be there before a checkpoint is marked complete
            callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state of the checkpoint which training resumes from."""
        path = Path(self.resume_from or "") / _ONLINE_STATE
        if self.resume_from is None:
            return
        if not path.is_file():
            raise ValueError(f"expected {_ONLINE_STATE} in {self.resume_from}, got none; resume a run with the same objective")
        values = load(path.read_bytes())
        self.criterion.build(len(values["count"])).load_state_dict(values)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make this epoch's sums the next epoch's targets."""
        if self.criterion.online is not None:
            self.criterion.online.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the checkpoint that was just made."""
        if self.criterion.online is None:
            return
        self.criterion.online.synchronise()
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_atomically(folder / _ONLINE_STATE, save(self.criterion.online.state_dict()))


class LoggedTerms:
    """Sums of the terms of one training, nats; every process adds the same steps."""

    def __init__(self) -> None:
        self._since: Tensor | None = None  # the terms, the items which they are of, and the steps with any
        self._first_step, self._last_step = 0, -1
        self._nll, self._steps, self._items = 0.0, 0, 0.0

    def add(self, terms: Tensor, items: Tensor, step: int) -> None:
        """Count a micro-batch, whose terms have their share of the step `step`; items: how many the whole step has."""
        count = items.sum().to(terms).reshape(1)
        some = (count > 0).to(count) if step != self._last_step else torch.zeros_like(count)
        found, self._last_step = torch.cat([terms.detach(), count, some]), step
        if self._since is None:  # the first since the last log
            self._since, self._first_step = torch.zeros_like(found), step
        self._since += found

    def add_to(self, logs: dict[str, float], step: int, gather: Callable[[Tensor], Tensor]) -> None:
        """Put the means over the steps since the last call into a training log, and `train_nll`, that over all steps, into its
        summary, with `train_nll_steps` where those are not all steps of a resumed training. All processes together.

        Where no label counted they are NaN, the losses beside them too, instead of 0; steps without one among others, which a
        mean holds as 0, are told.
        """
        if self._since is not None:
            steps = max(1, step - self._first_step)
            *means, items, share = (gather(self._since[None]).mean(0) / steps).tolist()
            empty = steps - math.ceil(share * steps - 1e-3)
            self._nll, self._steps, self._since = self._nll + means[0] * steps, self._steps + steps, None
            self._items += items
            if "loss" in logs:
                logs |= dict(zip(_TERMS, means if items else [math.nan] * len(means), strict=False))
                if not items:
                    logs["loss"] = math.nan
                    logger.warning("No label counted in the steps up to %d: all are ignored, nothing is learnt", step)
                elif empty:
                    logger.warning(
                        "No label counted in %d of the %d steps up to %d: they are 0 in the mean loss and nll", empty, steps, step
                    )
        if "train_loss" in logs and self._steps:
            logs["train_nll"] = self._nll / self._steps if self._items else math.nan
            logs |= {} if self._items else {"train_loss": math.nan}
            logs |= {"train_nll_steps": self._steps} if self._steps < step else {}


def techniques(
    smoothing: Smoothing,
    criterion: Criterion,
    distillation: Distillation | None = None,
    mixup: Mixup | None = None,
) -> list[str]:
    """What is in effect beside the plain cross entropy, each in a few words; empty for that alone.

    >>> techniques(Smoothing(0.1), Criterion(Smoothing(0.1)), mixup=Mixup(0.2))
    ['label smoothing (ε = 0.1)', 'embedding mixup (α = 0.2, one λ per batch)']
    """
    found = []
    final = smoothing.schedule.final_epsilon if smoothing.schedule else 0.0
    if smoothing.epsilon or final:
        schedule = f", {smoothing.schedule.kind} schedule" if smoothing.schedule else ""
        found.append(f"label smoothing (ε = {smoothing.epsilon:g}{schedule})")
    if criterion.name in ADAPTIVE:
        found.append(f"{criterion.name} label smoothing")
    elif criterion.name not in _SMOOTHED:
        found.append(criterion.name)
    if criterion.soft:
        found.append("soft labels")
    if distillation is not None:
        found.append(f"distillation (α = {distillation.alpha:g}, T = {distillation.temperature:g})")
    if mixup is not None:
        found.append(f"embedding mixup (α = {mixup.alpha:g}, one λ per {mixup.per})")
    return found


def check_combined(found: list[str], allowed: bool) -> None:
    """Refuse two techniques at once.

    Raises: ValueError naming them and the switch.
    """
    if len(found) > 1 and not allowed:
        raise ValueError(
            f"expected one technique beside the plain cross entropy, got {' and '.join(found)}: nobody could tell what each "
            "of them does to the confidence; drop all but one, or set allow_combined_softening=True to train with both"
        )


def check_one_loss(kind: type, mixin: type) -> None:
    """Refuse a Trainer class with a second `compute_loss`, which would be left out or take the place of ours in silence.

    One in front of the mixin (a subclass of ours too) may add to the loss: it has to call `super().compute_loss`. The Trainers of
    transformers and TRL's SFTTrainer take the cross entropy: ours is there to take its place.

    Raises: ValueError naming the class and the way out.
    """
    order = kind.__mro__
    ours = order.index(mixin)
    for place, parent in enumerate(order):
        function = vars(parent).get("compute_loss")
        if function is None or parent.__module__.startswith(_CROSS_ENTROPY):
            continue
        code = getattr(inspect.unwrap(function), "__code__", None)
        if place < ours and (code is None or "compute_loss" in code.co_names):
            continue
        what = "would never be called" if place > ours else "calls no super().compute_loss and so would replace label smoothing"
        raise ValueError(
            f"expected one loss, got a compute_loss in {parent.__name__} too, which {what}; drop it: class weights are "
            "class_weight=..., smoothing is label_smoothing_factor; for a term of your own put LabelSmoothingMixin behind that "
            "class and add the term to super().compute_loss(...)"
        )


def parse_params(text: str | None) -> dict[str, Any]:
    """Objective parameters from a JSON mapping.

    Raises: ValueError for anything else.
    """
    if not text:
        return {}
    try:
        params = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'expected objective parameters as JSON, got {text!r}; write {{"gamma": 3}}') from error
    if not isinstance(params, dict):
        raise ValueError(f'expected objective parameters as a mapping, got {text!r}; write {{"gamma": 3}}')
    return params
