"""The loss which the arguments describe now, so that a search over epsilon or over objectives is not in vain.

Owns: `SearchableLoss`: reading the arguments before each training, and hyperparameter search by the unsmoothed loss.
Does not own: the arguments (`arguments`), the loss (`criterion`), training (`trainer`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_ls.losses.adaptive import OnlineLabelSmoothing
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.arguments import smoothing_of
from hf_ls.trainer.criterion import Criterion, OnlineState, parse_params

# The arguments which decide the training loss.
_LOSS_SETTINGS = (
    *("label_smoothing_factor", "label_smoothing_convention", "label_smoothing_schedule", "label_smoothing_final_factor"),
    *("label_smoothing_warmup_steps", "label_smoothing_objective", "label_smoothing_objective_params"),
    *("label_smoothing_logits_free", "distillation_alpha", "distillation_temperature", "mixup_alpha", "mixup_per"),
)


class SearchableLoss(Trainer):
    """What `LabelSmoothingMixin` does with its arguments.

    A stock Trainer makes its smoother once, so that `hyperparameter_search` over `label_smoothing_factor` trains every trial
    with the first epsilon. Here `train` reads the arguments again, also after the best trial was written into them.

    Attributes: smoothing, criterion: of the training under way or the last one.
    """

    smoothing: Smoothing
    criterion: Criterion
    _given_smoothing: Smoothing | None
    _given_objective: Objective | OnlineLabelSmoothing | None
    _online_state: OnlineState

    def _read_settings(self, args: TrainingArguments) -> None:
        """Make the smoothing and the objective which the arguments describe now.

        Raises: ValueError as `Smoothing` and `Criterion`.
        """
        self.smoothing = smoothing_of(args)
        if self._given_smoothing is not None:
            self.smoothing = replace(self._given_smoothing, epsilon=args.label_smoothing_factor)
        name = getattr(args, "label_smoothing_objective", "smoothed_ce")
        params = parse_params(getattr(args, "label_smoothing_objective_params", None))
        self.criterion = Criterion(self.smoothing, self._given_objective or name, params)
        self._logits_free = getattr(args, "label_smoothing_logits_free", "auto")
        self._settings = [getattr(args, setting, None) for setting in _LOSS_SETTINGS]

    def _register_online_state(self) -> None:
        state, callbacks = self._online_state, self.callback_handler.callbacks
        state.criterion = self.criterion
        if state in callbacks:
            callbacks.remove(state)
        if self.criterion.name == "online":  # first: its file must be there before a checkpoint is marked complete
            callbacks.insert(0, state)

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, which writes a trial into the arguments; this reads the loss from them again.

        Raises: ValueError for an `OnlineLabelSmoothing` object in a search, whose state would go from trial to trial.
        """
        super()._hp_search_setup(trial)
        if trial is not None and isinstance(self._given_objective, OnlineLabelSmoothing):
            raise ValueError(
                "expected online label smoothing by name in a search, got an object; objective='online' starts afresh"
            )
        if trial is not None or self._settings != [getattr(self.args, setting, None) for setting in _LOSS_SETTINGS]:
            self._read_settings(self.args)
            self._register_online_state()

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's, but without `compute_objective` the objective is the unsmoothed `eval_loss`, lower is better.

        (The stock one adds up all metrics, here NLL and accuracy. Smoothed losses of two epsilons do not compare.)

        Raises: ValueError for direction="maximize" without `compute_objective`.
        """
        direction = args[1] if len(args) > 1 else kwargs.get("direction", "minimize")
        if compute_objective is None:
            if direction != "minimize":
                raise ValueError(
                    f"expected compute_objective with direction={direction!r}, got none: eval_loss is lower-is-better; pass e.g. "
                    "compute_objective=lambda metrics: metrics['eval_accuracy']"
                )
            compute_objective = _eval_loss
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)


def _eval_loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]
