"""One optimizer step over the same 32 rows, and their evaluation, in batches of 1, 7 and 32: the same numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    arguments,
    classification_rows,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    token_rows,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingSeq2SeqArguments, LabelSmoothingSeq2SeqTrainer, LabelSmoothingTrainer

LENGTHS = tuple(3 + 7 * i % 31 for i in range(32))
CASES = {
    "bert": (tiny_bert, classification_rows(32), LabelSmoothingTrainer),
    "llama": (tiny_llama, token_rows(LENGTHS), LabelSmoothingTrainer),
    "t5": (tiny_t5, seq2seq_rows(LENGTHS), LabelSmoothingSeq2SeqTrainer),
    "bart": (tiny_bart, seq2seq_rows(LENGTHS), LabelSmoothingSeq2SeqTrainer),
}
ARGUMENTS = {LabelSmoothingTrainer: LabelSmoothingArguments, LabelSmoothingSeq2SeqTrainer: LabelSmoothingSeq2SeqArguments}


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_gradient_do_not_depend_on_the_size_of_the_batches(tmp_path, name, epsilon):
    make, rows, trainer = CASES[name]
    found = [
        one_step(
            trainer, make(), rows, tmp_path, ARGUMENTS[trainer], label_smoothing_factor=epsilon,
            per_device_train_batch_size=size, gradient_accumulation_steps=-(-32 // size),
        )
        for size in (32, 7, 1)
    ]  # fmt: skip
    (record, gradient), *others = found
    for other, other_gradient in others:
        for key in ("loss", "nll", "smoothing_term"):
            assert other[key] == pytest.approx(record[key], rel=1e-6, abs=1e-9)
        assert float((other_gradient - gradient).norm() / gradient.norm()) < 1e-6


@pytest.mark.parametrize("name", list(CASES))
def test_evaluation_does_not_depend_on_the_size_of_the_batches(tmp_path, name):
    """In float64, so that only the sums over batches are compared, not the rounding of other matrix shapes."""
    make, rows, cls = CASES[name]
    found = []
    for size in (32, 7, 1):
        args = arguments(tmp_path, ARGUMENTS[cls], label_smoothing_factor=0.1, per_device_eval_batch_size=size)
        metrics = cls(model=make().to(torch.float64), args=args, eval_dataset=rows, data_collator=collate).evaluate()
        found.append({key: value for key, value in metrics.items() if not any(word in key for word in ("time", "per_second"))})
    assert {"eval_nll", "eval_brier", "eval_ece", "eval_accuracy", "eval_signed_gap"} <= set(found[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)
