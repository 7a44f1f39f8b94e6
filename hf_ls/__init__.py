"""Label smoothing done right for Hugging Face training.

Every public name is imported on first use, so that `import hf_ls` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ls import metrics as metrics
    from hf_ls import report as report
    from hf_ls.answers.callback import AnswerCallback as AnswerCallback
    from hf_ls.answers.preferences import compare_pairs as compare_pairs
    from hf_ls.answers.preferences import preference_pairs as preference_pairs
    from hf_ls.answers.scoring import answer_logits as answer_logits
    from hf_ls.calibration import temperature as temperature
    from hf_ls.losses import objectives as objectives
    from hf_ls.losses import priors as priors
    from hf_ls.losses.adaptive import OnlineLabelSmoothing as OnlineLabelSmoothing
    from hf_ls.losses.cross_entropy import SmoothedCrossEntropy as SmoothedCrossEntropy
    from hf_ls.losses.cross_entropy import smoothed_cross_entropy as smoothed_cross_entropy
    from hf_ls.losses.linear import linear_smoothed_cross_entropy as linear_smoothed_cross_entropy
    from hf_ls.losses.linear import linear_soft_target_cross_entropy as linear_soft_target_cross_entropy
    from hf_ls.losses.objectives import Objective as Objective
    from hf_ls.losses.smoothing import Schedule as Schedule
    from hf_ls.losses.smoothing import Smoothing as Smoothing
    from hf_ls.metrics.probabilities import probabilities as probabilities
    from hf_ls.report import card as card
    from hf_ls.report.build import calibration_report as calibration_report
    from hf_ls.trainer import distillation as distillation
    from hf_ls.trainer.arguments import LabelSmoothingArguments as LabelSmoothingArguments
    from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments as LabelSmoothingSeq2SeqArguments
    from hf_ls.trainer.mixin import LabelSmoothingMixin as LabelSmoothingMixin
    from hf_ls.trainer.mixin import LabelSmoothingTrainer as LabelSmoothingTrainer
    from hf_ls.trainer.seq2seq import LabelSmoothingSeq2SeqTrainer as LabelSmoothingSeq2SeqTrainer
    from hf_ls.trainer.sft import LabelSmoothingSFTConfig as LabelSmoothingSFTConfig
    from hf_ls.trainer.sft import LabelSmoothingSFTTrainer as LabelSmoothingSFTTrainer

__version__ = "0.1.0"

_HOME = {
    "AnswerCallback": "answers.callback",
    "answer_logits": "answers.scoring",
    "probabilities": "metrics.probabilities",
    "calibration_report": "report.build",
    "Schedule": "losses.smoothing",
    "Smoothing": "losses.smoothing",
    "Objective": "losses.objectives",
    "OnlineLabelSmoothing": "losses.adaptive",
    "linear_smoothed_cross_entropy": "losses.linear",
    "linear_soft_target_cross_entropy": "losses.linear",
    "SmoothedCrossEntropy": "losses.cross_entropy",
    "smoothed_cross_entropy": "losses.cross_entropy",
    "LabelSmoothingArguments": "trainer.arguments",
    "LabelSmoothingSeq2SeqArguments": "trainer.arguments",
    "LabelSmoothingMixin": "trainer.mixin",
    "LabelSmoothingTrainer": "trainer.mixin",
    "LabelSmoothingSeq2SeqTrainer": "trainer.seq2seq",
    "LabelSmoothingSFTConfig": "trainer.sft",
    "LabelSmoothingSFTTrainer": "trainer.sft",
    "compare_pairs": "answers.preferences",
    "preference_pairs": "answers.preferences",
}
_MODULES = {
    "card": "report.card",
    "distillation": "trainer.distillation",
    "metrics": "metrics",
    "objectives": "losses.objectives",
    "priors": "losses.priors",
    "report": "report",
    "temperature": "calibration.temperature",
}
__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hf_ls.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"hf_ls.{_MODULES[name]}")
    raise AttributeError(f"module 'hf_ls' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
