"""Training with gradients from few entries: it learns what exact gradients learn, says its error, and stops where that is large."""

from __future__ import annotations

import logging

import pytest
import torch
from head_models import VOCAB, build
from helpers import Rows, arguments, collate
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.losses._skipping import GradientCertificate
from hf_ls.trainer.logits_free import GradientWatch


def trained(folder, tolerance, steps=60):
    """The training log of a tiny Llama on tokens of which few are frequent, and its NLL afterwards."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1.0, VOCAB + 1) ** 2
    ids = torch.multinomial(frequency.expand(96, -1), 48, replacement=True, generator=generator)
    rows = Rows([{"input_ids": row, "labels": row.clone()} for row in ids])
    args = arguments(
        folder, LabelSmoothingArguments, label_smoothing_factor=0.1, max_steps=steps, learning_rate=2e-2, logging_steps=10,
        per_device_train_batch_size=8, gradient_tolerance=tolerance, label_smoothing_logits_free="on",
    )  # fmt: skip
    trainer = LabelSmoothingTrainer(
        model=build("llama")[0], args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.create_model_card()
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_nll"]


def test_it_learns_what_exact_gradients_learn_and_says_what_it_drops(tmp_path):
    exact, nll = trained(tmp_path / "a", None)
    log, found = trained(tmp_path / "b", "0.05")
    assert not [name for entry in exact for name in entry if "gradient" in name]
    assert log[0]["nll"] > 1.5 * nll and found == pytest.approx(nll, rel=0.02)
    assert all(entry["kept_entries"] < 0.1 for entry in log)
    assert 0 < log[-1]["gradient_error"] < 0.1
    assert 0 < log[-1]["dropped_mass"] < log[-1]["largest_dropped_mass"] < 1
    assert ["gradient_tolerance: 0.05" in (tmp_path / name / "README.md").read_text() for name in "ab"] == [False, True]


def test_after_too_large_an_error_gradients_are_exact(caplog):
    watch = GradientWatch(0.01)
    good, bad = (GradientCertificate(0.1, 0.3, 0.02, error, error / 2) for error in (0.009, 0.05))
    watch.see(good, torch.float32)
    watch.see(None, torch.float32)
    assert watch.tolerance == 0.01
    with caplog.at_level(logging.WARNING):
        watch.see(bad, torch.float32)
        watch.see(bad, torch.float32)
    assert watch.tolerance is None and len(caplog.records) == 1
    assert "their error was 0.05 where gradient_tolerance asks for 0.01" in caplog.text
    logs = {"loss": 1.0}
    watch.add_to(logs)
    assert logs == {"loss": 1.0, "gradient_error": 0.05, "kept_entries": pytest.approx(0.1), "dropped_mass": pytest.approx(0.02),
                    "largest_dropped_mass": 0.3}  # fmt: skip
    watch.add_to(other := {"loss": 1.0})
    assert other == {"loss": 1.0}


def test_a_model_which_needs_all_entries_is_looked_at_ever_more_rarely_until_it_does_not():
    watch, looks = GradientWatch(0.01), []
    for step in range(400):
        if watch.of_next_step() is not None:
            looks.append(step)
            watch.see(GradientCertificate(1.0 if step < 300 else 0.1, 0.0, 0.0, 0.0, 0.0), torch.float32)
    assert looks[:8] == [0, 2, 5, 10, 19, 36, 69, 134]  # pauses of 1, 2, 4, ... and at most 64 steps
    assert looks[8:11] == [199, 264, 329] and looks[11:] == list(range(330, 400))


@pytest.mark.parametrize("wrong", ["much", "0", "1.5", "nan", -0.1])
def test_a_wrong_tolerance_is_refused_by_the_arguments(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected gradient_tolerance above 0 and below 1, 'auto' or None, got"):
        arguments(tmp_path, LabelSmoothingArguments, gradient_tolerance=wrong)
