"""Which way is better, for every metric by name.

Owns: the one list of lower-is-better names. Does not own any definition (`core`) or comparison (`hf_ls.findings`).
"""

from __future__ import annotations

LOWER_IS_BETTER = (
    "loss", "nll", "perplexity", "brier", "ece", "ece_equal_mass", "ece_classwise", "mce", "rmsce_debiased", "aurc",
    "error_rate", "wer", "cer",
)  # fmt: skip


def is_lower_better(metric: str | None) -> bool:
    """Return whether the last words of a metric name are a loss or an error, as in `eval_test_ece` or `phoneme_error_rate`."""
    if metric is None:
        return False
    return any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)
