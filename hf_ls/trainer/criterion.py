"""What one training item costs: the smoothed cross entropy, another objective, or an adaptive epsilon.

Beside it: the state of online label smoothing in checkpoints, the terms of the loss as the log shows them, and which techniques
make the training target softer. Label smoothing, its adaptive forms, the objectives which press confidence down, distillation and
mixup all do the same thing to the target: together they overshoot, and no result can be credited to one of them.
"""

from __future__ import annotations

import json
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
from hf_ls.losses.adaptive import OnlineLabelSmoothing, adaptive_smoothed_terms, graduated_epsilon, instance_epsilon
from hf_ls.losses.cross_entropy import SmoothedTerms, smoothed_terms
from hf_ls.losses.objectives import OBJECTIVES, Objective, check_smoothing, masked_objective
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.distillation import Distillation
from hf_ls.trainer.mixup import Mixup

ADAPTIVE = ("graduated", "instance", "online")
NAMES = (*OBJECTIVES, *ADAPTIVE)
_ONLINE_STATE = "online_label_smoothing.safetensors"
_SMOOTHED = ("smoothed_ce", "generalised_smoothing")  # objectives which are label smoothing, no second technique
_TERMS = ("nll", "smoothing_term", "distillation_term")  # the last only with a teacher


class Criterion:
    """The terms of each training item: loss = nll + smoothing_term, the second being whatever is not the plain NLL.

    Args:
        objective: a name in `NAMES`, an `Objective`, or an `OnlineLabelSmoothing`.
        params: parameters of a named objective, e.g. {"gamma": 3}.

    Raises: ValueError for an unknown name or parameter, and for an ε which the objective does not use.
    """

    def __init__(
        self,
        smoothing: Smoothing,
        objective: str | Objective | OnlineLabelSmoothing = "smoothed_ce",
        params: dict[str, Any] | None = None,
    ) -> None:
        self._given_online = self.online = objective if isinstance(objective, OnlineLabelSmoothing) else None
        self.name = "online" if self.online else objective.name if isinstance(objective, Objective) else str(objective)
        self.params = dict(params or {})
        self.objective = objective if isinstance(objective, Objective) else None
        if self.name in OBJECTIVES:
            check_smoothing(self.name, smoothing)
            self.objective = self.objective or Objective(self.name, **self.params)
        elif self.name not in ADAPTIVE:
            raise ValueError(f"expected an objective in {sorted(NAMES)}, got {self.name!r}; choose one of them")
        elif smoothing.epsilon:
            raise ValueError(
                f"expected epsilon = 0 with {self.name}, which makes its own, got {smoothing.epsilon}; drop one of the two"
            )
        if self.name in ("graduated", "instance"):
            Smoothing(max(self.params.get("values", (0.0,)), default=0.0))
            self._epsilon_of(graduated_epsilon if self.name == "graduated" else instance_epsilon)

    def _epsilon_of(self, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda confidence: function(confidence, **self.params)

    @property
    def plain(self) -> bool:
        """Whether this is the smoothed cross entropy and nothing else."""
        return self.objective is not None and self.name == "smoothed_ce" and not self.objective.z_loss

    def for_rows(self, smoothing: Smoothing) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The objective as (logits [n, K], labels [n]) -> losses [n] for the logits-free loop; None if `plain`."""
        objective = self.objective
        if self.plain or objective is None:
            return None
        return lambda logits, labels: objective(logits, labels, smoothing)

    def restart(self) -> None:
        """Forget the state of a training before: online label smoothing by name starts afresh, an object goes on."""
        self.online = self._given_online

    def build(self, num_classes: int) -> None:
        """Make the state of online label smoothing once the number of classes is known.

        Raises: ValueError above 4096 classes.
        """
        if self.name == "online" and self.online is None:
            self.online = OnlineLabelSmoothing(num_classes, **self.params)

    def terms(self, logits: Tensor, labels: Tensor, smoothing: Smoothing, *, ignore_index: int = -100) -> SmoothedTerms:
        """NLL and the rest per item, shaped as the labels, nats.

        Raises: as `smoothed_terms`.
        """
        if self.name == "online":
            self.build(logits.shape[-1])
            online = self.online
            if online is None:  # build made it
                raise TypeError("expected online label smoothing to be built, got none; call build(num_classes)")
            return online.to(logits.device).terms(logits, labels)
        if self.name == "graduated":
            return adaptive_smoothed_terms(
                logits, labels, smoothing, self._epsilon_of(graduated_epsilon), ignore_index=ignore_index
            )
        if self.name == "instance":
            return adaptive_smoothed_terms(
                logits, labels, smoothing, self._epsilon_of(instance_epsilon), confidence="entropy", ignore_index=ignore_index
            )
        if self.plain or self.objective is None:
            return smoothed_terms(logits, labels, smoothing, ignore_index=ignore_index)
        nll = smoothed_terms(logits, labels, Smoothing(0.0), ignore_index=ignore_index).nll
        losses = masked_objective(self.objective, logits, labels, smoothing, ignore_index=ignore_index)
        return SmoothedTerms(nll, losses - nll)


class OnlineState(TrainerCallback):
    """End the epochs of online label smoothing, and carry its state through checkpoints.

    Saving is collective: the sums of all processes meet in process 0, which writes them beside the model.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.resume_from: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state of the checkpoint which training resumes from."""
        path = Path(self.resume_from or "") / _ONLINE_STATE
        if self.resume_from is None:
            return
        if not path.is_file():
            raise ValueError(f"expected {_ONLINE_STATE} in {self.resume_from}, got none; resume a run with the same objective")
        values = load(path.read_bytes())
        self.criterion.build(len(values["count"]))
        if self.criterion.online is not None:
            self.criterion.online.load_state_dict(values)

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
        self._since: Tensor | None = None  # the terms, and the items which they are of
        self._first_step = 0
        self._nll, self._steps, self._items = 0.0, 0, 0.0

    def add(self, terms: Tensor, items: Tensor, step: int) -> None:
        """Count a micro-batch, whose terms have their share of the step `step`; items: how many the step has, in all processes."""
        found = torch.cat([terms.detach(), items.sum().to(terms).reshape(1)])
        if self._since is None:  # the first since the last log
            self._since, self._first_step = torch.zeros_like(found), step
        self._since += found

    def take(self, step: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over the steps since the last call, by name; empty if there was none, NaN where no item was counted.

        All processes together.
        """
        if self._since is None:
            return {}
        steps = max(1, step - self._first_step)
        *means, items = (gather(self._since[None]).mean(0) / steps).tolist()
        self._nll, self._steps, self._since = self._nll + means[0] * steps, self._steps + steps, None
        self._items += items
        return dict(zip(_TERMS, means if items else [math.nan] * len(means), strict=False))

    def summary(self) -> dict[str, float]:
        """`train_nll`, the mean NLL over all steps taken so far, NaN without an item; of how many steps; empty without any."""
        if not self._steps:
            return {}
        return {"train_nll": self._nll / self._steps if self._items else math.nan, "steps": self._steps}


def techniques(
    smoothing: Smoothing,
    criterion: Criterion,
    distillation: Distillation | None = None,
    mixup: Mixup | None = None,
) -> list[str]:
    """The target-softening techniques in effect, each in a few words; empty for the plain cross entropy.

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
    if distillation is not None:
        found.append(f"distillation (α = {distillation.alpha:g}, T = {distillation.temperature:g})")
    if mixup is not None:
        found.append(f"embedding mixup (α = {mixup.alpha:g}, one λ per {mixup.per})")
    return found


def check_combined(found: list[str], allowed: bool) -> None:
    """Refuse two target-softening techniques at once.

    Raises: ValueError naming them and the switch.
    """
    if len(found) > 1 and not allowed:
        raise ValueError(
            f"expected one target-softening technique, got {' and '.join(found)}: each of them makes the model less confident; "
            "drop all but one, or set allow_combined_softening=True to train with both"
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
