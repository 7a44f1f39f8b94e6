"""The settings of label smoothing beside the Trainer's own.

Owns: `LabelSmoothingArguments`, its seq2seq form, and what follows from them alone: the `Smoothing`, a metric's direction.
Does not own: training (`trainer`) or the command line (`config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_ls.losses.smoothing import Schedule, Smoothing
from hf_ls.metrics.core import direction
from hf_ls.trainer.criterion import Criterion, parse_params
from hf_ls.trainer.distillation import Distillation
from hf_ls.trainer.mixup import Mixup
from hf_ls.trainer.softening import check_combined, techniques

LogitsFree = Literal["auto", "on", "off"]


@dataclass
class LabelSmoothingArguments(TrainingArguments):
    """`TrainingArguments` in which `label_smoothing_factor` is ε, with its convention and schedule beside it.

    Raises: ValueError for ε outside [0, 1), an unknown convention, schedule or logits-free mode, settings of distillation or
    mixup out of range, two target-softening techniques without `allow_combined_softening`, or a lower-is-better
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
        metadata={"help": "Allow two of label smoothing, confidence objectives, distillation and mixup at once."},
    )

    def __post_init__(self) -> None:
        Distillation(self.distillation_alpha, self.distillation_temperature)
        check_combined(techniques_of(self), self.allow_combined_softening)
        if self.label_smoothing_logits_free not in get_args(LogitsFree):
            raise ValueError(
                f"expected label_smoothing_logits_free in {get_args(LogitsFree)}, got {self.label_smoothing_logits_free!r}; "
                "'auto' is the default"
            )
        if self.greater_is_better is None and direction(self.metric_for_best_model or "") == "lower":
            self.greater_is_better = False
        super().__post_init__()
        check_direction(self)


@dataclass
class LabelSmoothingSeq2SeqArguments(LabelSmoothingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the settings of `LabelSmoothingArguments`."""


def smoothing_of(args: TrainingArguments) -> Smoothing:
    """The `Smoothing` which the arguments describe; plain `TrainingArguments` give the "all" convention and a constant ε.

    Raises: as `Smoothing`.
    """
    epsilon = args.label_smoothing_factor
    if not isinstance(args, LabelSmoothingArguments):
        return Smoothing(epsilon)
    kind, warmup = args.label_smoothing_schedule, args.label_smoothing_warmup_steps
    constant = kind == "constant" and not warmup
    schedule = None if constant else Schedule(kind, args.label_smoothing_final_factor, warmup)  # type: ignore[arg-type]
    return Smoothing(epsilon, args.label_smoothing_convention, schedule=schedule)  # type: ignore[arg-type]


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


def techniques_of(args: LabelSmoothingArguments) -> list[str]:
    """The target-softening techniques which the arguments put in effect, in words, for a card.

    Raises: ValueError as `Smoothing`, `Criterion`, `Distillation` and `Mixup`.
    """
    smoothing = smoothing_of(args)
    criterion = Criterion(smoothing, args.label_smoothing_objective, parse_params(args.label_smoothing_objective_params))
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
