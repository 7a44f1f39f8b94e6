"""The settings of label smoothing beside the Trainer's own.

Owns: `LabelSmoothingArguments` and what follows from arguments alone: the `Smoothing`, the direction of a metric.
Does not own: training (`trainer`) or the command line (`config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import TrainingArguments

from hf_ls.criterion import Criterion, parse_params
from hf_ls.smoothing import Schedule, Smoothing

LogitsFree = Literal["auto", "on", "off"]

# Stock Transformers takes every name which does not end in "loss" as greater-is-better and so keeps the worst checkpoint.
LOWER_IS_BETTER = ("loss", "nll", "perplexity", "brier", "ece", "mce", "aurc")


@dataclass
class LabelSmoothingArguments(TrainingArguments):
    """`TrainingArguments` in which `label_smoothing_factor` is ε, with its convention and schedule beside it.

    Raises: ValueError for ε outside [0, 1), an unknown convention, schedule or logits-free mode, or a lower-is-better
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

    def __post_init__(self) -> None:
        Criterion(smoothing_of(self), self.label_smoothing_objective, parse_params(self.label_smoothing_objective_params))
        if self.label_smoothing_logits_free not in get_args(LogitsFree):
            raise ValueError(
                f"expected label_smoothing_logits_free in {get_args(LogitsFree)}, got {self.label_smoothing_logits_free!r}; "
                "'auto' is the default"
            )
        if self.greater_is_better is None and is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False
        super().__post_init__()
        check_direction(self)


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


def is_lower_better(metric: str | None) -> bool:
    """Whether the last word of a metric name is a loss or a calibration error, as in `eval_test_ece`."""
    if metric is None:
        return False
    return any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)


def check_direction(args: TrainingArguments) -> None:
    """Refuse to keep the checkpoint with the greatest error.

    Raises: ValueError when `metric_for_best_model` is lower-is-better and `greater_is_better` is True.
    """
    if args.greater_is_better and is_lower_better(args.metric_for_best_model):
        raise ValueError(
            f"expected greater_is_better=False for metric_for_best_model={args.metric_for_best_model!r}, got True (plain "
            "TrainingArguments guess it from the name); use LabelSmoothingArguments or set greater_is_better=False"
        )
