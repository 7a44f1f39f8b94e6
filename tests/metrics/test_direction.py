"""Facts about the direction of metrics: errors are found by the end of their name, scores are not."""

from __future__ import annotations

import pytest

from hf_ls.metrics.direction import is_lower_better


@pytest.mark.parametrize(
    "name", ["eval_nll", "eval_test_ece", "phoneme_error_rate", "eval_phoneme_error_rate", "wer", "perplexity"]
)
def test_errors_are_lower_is_better(name: str) -> None:
    assert is_lower_better(name)


@pytest.mark.parametrize("name", [None, "bleu", "eval_chrf", "exact_match", "accuracy", "f1", "twice", "snowler"])
def test_scores_are_greater_is_better(name: str | None) -> None:
    assert not is_lower_better(name)
