"""The settings of label smoothing beside the Trainer's own, and what follows from them alone: what a training minimises."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_ls.losses.adaptive import OnlineLabelSmoothing
from hf_ls.losses.linear import tolerance_in
from hf_ls.losses.objectives import Objective
from hf_ls.losses.smoothing import Schedule, Smoothing
from hf_ls.metrics.core import direction
from hf_ls.trainer.criterion import Criterion, check_combined, parse_params, techniques
from hf_ls.trainer.distillation import Distillation
from hf_ls.trainer.mixup import Mixup

LogitsFree = Literal["auto", "on", "off"]
Arguments = TypeVar("Arguments", bound=TrainingArguments)
# The beginnings of the names of all settings which decide the training loss.
_LOSS = ("label_smoothing_", "distillation_", "mixup_")
# How the loss is computed, not which: a run without smoothing goes the way of the run beside it.
_WAY_OF_COMPUTING = ("label_smoothing_logits_free",)


@dataclass
class LabelSmoothingArguments(TrainingArguments):
    """`TrainingArguments` in which `label_smoothing_factor` is ε, with its convention and schedule beside it.

    Raises: ValueError for ε outside [0, 1), an unknown convention, schedule or logits-free mode, settings of distillation or
    mixup out of range, two techniques at once without `allow_combined_softening`, or a lower-is-better
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
    label_smoothing_objective: str = field(
        default="smoothed_ce",
        metadata={"help": "What training minimises: smoothed_ce, another objective, graduated, instance or online smoothing."},
    )
    label_smoothing_objective_params: str | None = field(
        default=None, metadata={"help": "Parameters of the objective as JSON or a YAML mapping, e.g. {gamma: 3}."}
    )
    label_smoothing_logits_free: str = field(
        default="auto",
        metadata={"help": "Train language models without building logits: 'auto' where it is exact, 'on' or fail, 'off'."},
    )
    label_smoothing_soft_labels: bool = field(
        default=False,
        metadata={"help": "Train on the distributions in the column soft_labels (raters, teachers) instead of the labels."},
    )
    gradient_tolerance: str | None = field(
        default=None,
        metadata={
            "help": "Relative error which the gradients of a head without logits may have on a CPU, e.g. 5e-3; 'auto': below the "
            "rounding of bfloat16; none for exact ones."
        },
    )
    distillation_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model whose soft targets are learned beside the labels.",
            "aliases": ["--teacher"],
        },
    )
    distillation_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the teacher, above 0 to 1; the labels get the rest."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of teacher and student before they are compared."}
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Classifiers only: mix the embeddings of pairs with ratios from Beta(alpha, alpha); 0 for none."},
    )
    mixup_per: str = field(default="batch", metadata={"help": "One mixing ratio per 'batch' or per 'example'."})
    allow_combined_softening: bool = field(
        default=False,
        metadata={"help": "Allow two of label smoothing, other objectives, distillation and mixup at once."},
    )

    def __post_init__(self) -> None:
        Distillation(self.distillation_alpha, self.distillation_temperature)
        check_combined(techniques_of(self), self.allow_combined_softening)
        if self.label_smoothing_logits_free not in get_args(LogitsFree):
            raise ValueError(
                f"expected label_smoothing_logits_free in {get_args(LogitsFree)}, got {self.label_smoothing_logits_free!r}; "
                "'auto' is the default"
            )
        with suppress(TypeError, ValueError):  # a number from the command line; what is none is refused below
            self.gradient_tolerance = None if self.gradient_tolerance is None else float(self.gradient_tolerance)  # type: ignore[assignment]
        tolerance_in(self.gradient_tolerance, torch.float32)  # type: ignore[arg-type]
        if self.greater_is_better is None and direction(self.metric_for_best_model or "") == "lower":
            self.greater_is_better = False
        super().__post_init__()
        check_direction(self)


@dataclass
class LabelSmoothingSeq2SeqArguments(LabelSmoothingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the settings of `LabelSmoothingArguments`."""


def smoothing_of(args: TrainingArguments) -> Smoothing:
    """The `Smoothing` which the arguments describe; plain `TrainingArguments` give the "all" convention and a constant ε.

    Raises: as `Smoothing`; ValueError for a final epsilon without a schedule which would reach it.
    """
    epsilon = args.label_smoothing_factor
    if not isinstance(args, LabelSmoothingArguments):
        return Smoothing(epsilon)
    kind, warmup = args.label_smoothing_schedule, args.label_smoothing_warmup_steps
    if kind == "constant" and args.label_smoothing_final_factor:
        raise ValueError(
            "expected label_smoothing_schedule 'linear' or 'cosine' with label_smoothing_final_factor="
            f"{args.label_smoothing_final_factor}, got 'constant', which never reaches it; set one, or drop the final factor"
        )
    constant = kind == "constant" and not warmup
    schedule = None if constant else Schedule(kind, args.label_smoothing_final_factor, warmup)  # type: ignore[arg-type]
    return Smoothing(epsilon, args.label_smoothing_convention, schedule=schedule)  # type: ignore[arg-type]


def without_smoothing(args: Arguments) -> Arguments:
    """A copy of the arguments which trains on the labels as they are: no smoothing of any kind, no teacher, no mixup.

    Every `label_smoothing_*` field goes back to its default, one which is added later too. Only `label_smoothing_logits_free`
    stays: it says how the loss is computed, not which. What else the arguments hold stays; the given ones are not changed.
    """
    plain = copy.copy(args)
    for setting in fields(plain):
        if setting.name.startswith(_LOSS) and setting.name not in _WAY_OF_COMPUTING:
            setattr(plain, setting.name, setting.default)
    return plain


def loss_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings which decide the training loss, by name; two trainings with the same ones minimise the same."""
    return {setting.name: getattr(args, setting.name) for setting in fields(args) if setting.name.startswith(_LOSS)}


def criterion_of(
    args: TrainingArguments, smoothing: Smoothing, objective: Objective | OnlineLabelSmoothing | None = None
) -> Criterion:
    """The objective which the arguments name, or the given one.

    Raises: ValueError as `Criterion`, and for a given objective beside another one, or beside parameters, in the arguments.
    """
    name = getattr(args, "label_smoothing_objective", "smoothed_ce")
    params = parse_params(getattr(args, "label_smoothing_objective_params", None))
    soft = getattr(args, "label_smoothing_soft_labels", False)
    if objective is None:
        return Criterion(smoothing, name, params, soft=soft)
    found = Criterion(smoothing, objective, soft=soft)
    if params or name not in ("smoothed_ce", found.name):
        raise ValueError(
            f"expected one objective, got objective={objective!r} and label_smoothing_objective={name!r}"
            f"{f' with {params}' if params else ''}; set only one of them"
        )
    return found


def distillation_of(args: TrainingArguments) -> Distillation:
    """How much a teacher counts by the arguments; the defaults with plain `TrainingArguments`.

    Raises: as `Distillation`.
    """
    if not isinstance(args, LabelSmoothingArguments):
        return Distillation()
    return Distillation(args.distillation_alpha, args.distillation_temperature)


def mixup_of(args: TrainingArguments) -> Mixup | None:
    """The mixup which the arguments describe, None for none.

    Raises: as `Mixup`.
    """
    if not isinstance(args, LabelSmoothingArguments):
        return None
    if args.mixup_alpha == 0:
        Mixup(per=args.mixup_per)  # type: ignore[arg-type]
        return None
    return Mixup(args.mixup_alpha, args.mixup_per)  # type: ignore[arg-type]


class Loss(NamedTuple):
    """What the arguments describe: what a training minimises."""

    smoothing: Smoothing
    criterion: Criterion
    distillation: Distillation | None
    mixup: Mixup | None


def loss_of(
    args: TrainingArguments,
    smoothing: Smoothing | None = None,
    objective: Objective | OnlineLabelSmoothing | None = None,
    teacher: bool = False,
) -> Loss:
    """What the arguments describe now; ε from the arguments, the rest of a given smoothing as it is.

    Raises: ValueError as `Smoothing`, `criterion_of` and `Mixup`, for a teacher which is named and not there, and for two
    techniques at once.
    """
    smoothing = smoothing_of(args) if smoothing is None else replace(smoothing, epsilon=args.label_smoothing_factor)
    named = getattr(args, "distillation_teacher", None)
    if named and not teacher:
        raise ValueError(
            f"expected teacher=model with distillation_teacher={named!r}, got none; load it with "
            "hf_ls.trainer.distillation.load_teacher and pass it to the trainer"
        )
    distillation = distillation_of(args) if teacher else None
    found = Loss(smoothing, criterion_of(args, smoothing, objective), distillation, mixup_of(args))
    check_combined(techniques(*found), getattr(args, "allow_combined_softening", False))
    return found


def techniques_of(args: LabelSmoothingArguments) -> list[str]:
    """What the arguments put in effect beside the plain cross entropy, in words, for a card.

    Raises: ValueError as `Smoothing`, `Criterion`, `Distillation` and `Mixup`.
    """
    smoothing = smoothing_of(args)
    criterion = criterion_of(args, smoothing)
    return techniques(smoothing, criterion, distillation_of(args) if args.distillation_teacher else None, mixup_of(args))


def check_direction(args: TrainingArguments) -> None:
    """Refuse to keep the checkpoint with the greatest error, as stock names do: all but "...loss" are greater-is-better there.

    Raises: ValueError when `metric_for_best_model` is lower-is-better and `greater_is_better` is True, and for the signed gap, of
    which neither the largest nor the least value is the best.
    """
    way = direction(args.metric_for_best_model or "")
    if way == "zero":
        raise ValueError(
            f"expected metric_for_best_model with a best end, got {args.metric_for_best_model!r}: a signed gap is best at 0, and "
            "its ends are the most over- and the most under-confident model; use ece, nll or brier"
        )
    if args.greater_is_better and way == "lower":
        raise ValueError(
            f"expected greater_is_better=False for metric_for_best_model={args.metric_for_best_model!r}, got True (plain "
            "TrainingArguments guess it from the name); use LabelSmoothingArguments or set greater_is_better=False"
        )


def check_given(args: TrainingArguments, smoothing: Any, compute_loss_func: Any) -> None:
    """Refuse what contradicts itself among the arguments of a Trainer.

    Raises: ValueError for a loss function, two epsilons, and as `check_direction`; TypeError for another kind of smoothing.
    """
    if compute_loss_func is not None:
        raise ValueError(
            "expected no compute_loss_func, got one: a stock Trainer lets it silently replace label smoothing; remove it, "
            "or use it with transformers.Trainer and hf_ls.SmoothedCrossEntropy"
        )
    check_direction(args)
    if smoothing is None:
        return
    if not isinstance(smoothing, Smoothing):
        raise TypeError(f"expected smoothing as a hf_ls.Smoothing, got {type(smoothing).__name__}; pass Smoothing(0.1)")
    if args.label_smoothing_factor not in (0.0, smoothing.epsilon):
        raise ValueError(
            f"expected one epsilon, got label_smoothing_factor={args.label_smoothing_factor} and smoothing={smoothing}; "
            "set only one"
        )


def check_search(compute_objective: Any, direction: Any) -> None:
    """Refuse to maximise what a search minimises unless it is told otherwise, the unsmoothed `eval_loss`.

    Raises: ValueError for another direction than "minimize" without an objective.
    """
    if compute_objective is None and direction != "minimize":
        raise ValueError(
            f"expected compute_objective with direction={direction!r}, got none: eval_loss is lower-is-better; pass e.g. "
            "compute_objective=lambda metrics: metrics['eval_accuracy']"
        )
