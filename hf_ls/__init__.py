"""Label smoothing done right for Hugging Face training.

Owns: the public names, each imported on first use, so that `import hf_ls` stays light.
Does not own: anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ls import metrics as metrics
    from hf_ls.adaptive import OnlineLabelSmoothing as OnlineLabelSmoothing
    from hf_ls.arguments import LabelSmoothingArguments as LabelSmoothingArguments
    from hf_ls.arguments import LabelSmoothingSeq2SeqArguments as LabelSmoothingSeq2SeqArguments
    from hf_ls.linear import linear_smoothed_cross_entropy as linear_smoothed_cross_entropy
    from hf_ls.losses import SmoothedCrossEntropy as SmoothedCrossEntropy
    from hf_ls.losses import smoothed_cross_entropy as smoothed_cross_entropy
    from hf_ls.objectives import Objective as Objective
    from hf_ls.pipelines import probabilities as probabilities
    from hf_ls.seq2seq import LabelSmoothingSeq2SeqTrainer as LabelSmoothingSeq2SeqTrainer
    from hf_ls.sft import LabelSmoothingSFTConfig as LabelSmoothingSFTConfig
    from hf_ls.sft import LabelSmoothingSFTTrainer as LabelSmoothingSFTTrainer
    from hf_ls.smoothing import Schedule as Schedule
    from hf_ls.smoothing import Smoothing as Smoothing
    from hf_ls.trainer import LabelSmoothingMixin as LabelSmoothingMixin
    from hf_ls.trainer import LabelSmoothingTrainer as LabelSmoothingTrainer

__version__ = "0.1.0"

_HOME = {
    "probabilities": "pipelines",
    "Schedule": "smoothing",
    "Smoothing": "smoothing",
    "Objective": "objectives",
    "OnlineLabelSmoothing": "adaptive",
    "linear_smoothed_cross_entropy": "linear",
    "SmoothedCrossEntropy": "losses",
    "smoothed_cross_entropy": "losses",
    "LabelSmoothingArguments": "arguments",
    "LabelSmoothingSeq2SeqArguments": "arguments",
    "LabelSmoothingMixin": "trainer",
    "LabelSmoothingTrainer": "trainer",
    "LabelSmoothingSeq2SeqTrainer": "seq2seq",
    "LabelSmoothingSFTConfig": "sft",
    "LabelSmoothingSFTTrainer": "sft",
}
_MODULES = ("card", "metrics", "objectives", "parallel", "priors", "report", "temperature")
__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hf_ls.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"hf_ls.{name}")
    raise AttributeError(f"module 'hf_ls' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
