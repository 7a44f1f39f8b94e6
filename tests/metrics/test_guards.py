"""Guards that teach: ε above its ceiling, under-confidence, and losses which do not compare."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import arguments, classification_rows, collate, tiny_bert
from reports import interval, make_report, with_metrics

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Schedule, Smoothing
from hf_ls.metrics.ceiling import ceiling_warning, epsilon_ceiling, last_epsilon
from hf_ls.report.plots import loss_curve
from hf_ls.report.sentences import regime, warnings
from hf_ls.trainer.criterion import LoggedTerms


@pytest.mark.parametrize("convention", ["all", "wrong"])
def test_at_the_ceiling_the_best_confidence_is_the_accuracy(convention: Any) -> None:
    epsilon = epsilon_ceiling(0.12, 7, convention)
    assert Smoothing(epsilon, convention).max_confidence(7) == pytest.approx(0.88)


def test_the_warning_waits_until_the_sample_is_clear() -> None:
    """ε = 0.1 at K = 2 caps the confidence at 0.95: too low for an accuracy of 0.99, if n shows it."""
    assert ceiling_warning(0.1, "all", 0.99, 20, 2) is None
    text = ceiling_warning(0.1, "all", 0.99, 2000, 2)
    assert (
        text is not None
        and "above the confidence ceiling 0.020 [0.013, 0.031] (error 0.010 of the model, n = 2,000, K = 2)" in text
    )
    assert "at most 0.950 sure" in text
    assert ceiling_warning(0.1, "all", 0.90, 2000, 2) is None
    assert ceiling_warning(0.0, "all", 1.0, 2000, 2) is None


@pytest.mark.parametrize(
    "schedule", [None, Schedule("constant", 0.4, 3), Schedule("linear", 0.4), Schedule("cosine", 0.0, warmup_steps=2)]
)
def test_the_ceiling_is_for_the_epsilon_of_the_last_step(schedule: Schedule | None) -> None:
    expected = Smoothing(0.1, schedule=schedule).at(9, 10).epsilon
    assert last_epsilon(0.1, schedule) == pytest.approx(expected)


def test_one_sentence_names_every_epsilon_above() -> None:
    text = ceiling_warning([0.01, 0.3, 0.2, 0.0], "wrong", 0.9, 2000, 4)
    assert text is not None and text.startswith("epsilon 0.2, 0.3 lie above the confidence ceiling 0.100 [")
    assert "for the least of them at most 0.800 sure" in text
    assert ceiling_warning([0.01, 0.0], "wrong", 0.9, 2000, 4) is None


class _Choices(torch.nn.Module):
    """A multiple-choice model whose config says nothing of its four choices; right in 93 of 100 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.unused = tiny_bert(2).config, torch.nn.Linear(1, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = 8.0 * torch.nn.functional.one_hot(input_ids[:, 0], 4)
        return {"logits": logits} | ({} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize(("epsilon", "schedule", "final"), [(0.15, "constant", 0.0), (0.0, "linear", 0.15)])
def test_the_trainer_counts_the_logits_and_takes_the_last_epsilon(
    epsilon: float, schedule: str, final: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Accuracy 0.93: the ceiling is 0.093 at K = 4 and would be 0.14 at the K = 2 of the config."""
    rows = [{"input_ids": torch.tensor([i % 4]), "labels": (i + (i % 100 < 7)) % 4} for i in range(600)]
    more = dict(label_smoothing_schedule=schedule, label_smoothing_final_factor=final, per_device_eval_batch_size=100)
    args = arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=epsilon, **more)
    with caplog.at_level(logging.WARNING, "hf_ls.trainer.evaluation"):
        LabelSmoothingTrainer(model=_Choices(), args=args, eval_dataset=rows).evaluate()
    expected = ceiling_warning(0.15, "all", 0.93, 600, 4)
    assert expected is not None and expected in caplog.text


def _right(n: int) -> list[dict[str, torch.Tensor]]:
    """Rows whose labels are what the untrained model predicts."""
    rows, model = classification_rows(n).rows, tiny_bert().eval()
    with torch.no_grad():
        return [row | {"labels": model(input_ids=row["input_ids"][None]).logits[0].argmax()} for row in rows]


def _evaluated(folder: Path, rows: Any, **kwargs: Any) -> LabelSmoothingTrainer:
    args = arguments(folder, LabelSmoothingArguments, **kwargs)
    trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, eval_dataset=rows, data_collator=collate)
    trainer.evaluate()
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize(("epsilon", "times"), [(0.3, 1), (0.0, 0)])
def test_the_trainer_warns_once(epsilon: float, times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_ls.trainer.evaluation"):
        _evaluated(tmp_path, _right(64), label_smoothing_factor=epsilon)
    assert caplog.text.count("above the confidence ceiling 0.000") == times


def test_the_trainer_says_nothing_of_a_model_that_errs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_ls.trainer.evaluation"):
        _evaluated(tmp_path, classification_rows(64), label_smoothing_factor=0.3)
    assert "ceiling" not in caplog.text


def _smoothed(**changes: Any) -> Any:
    """A report whose baseline is right in 198 of 200 cases, smoothed with ε = 0.3."""
    report = make_report()
    facts = replace(report.smoothing, epsilon=0.3)
    sure = interval(0.99, 0.97, 1.0)
    rows = [replace(with_metrics(row, accuracy=sure), epsilon=0.3 if row.epsilon else 0.0) for row in report.rows]
    return replace(report, rows=rows, smoothing=replace(facts, **changes))


def test_the_report_warns_by_the_error_of_the_baseline() -> None:
    found = [text for text in warnings(_smoothed()) if "ceiling" in text]
    assert (
        len(found) == 1 and "epsilon 0.3 lies above" in found[0] and "error 0.010 of row 'baseline', n = 200, K = 3" in found[0]
    )
    to_two, to_zero = (_smoothed(schedule="linear", final_epsilon=value) for value in (0.2, 0.0))
    assert "epsilon 0.2 lies above" in next(text for text in warnings(to_two) if "ceiling" in text)
    assert not [text for text in warnings(to_zero) if "ceiling" in text]
    assert not [text for text in warnings(_smoothed(prior="unigram")) if "ceiling" in text]  # it has no single ceiling


def test_an_under_confident_smoothed_row_is_named_beside_the_baseline() -> None:
    report = make_report()
    rows = [
        with_metrics(row, signed_gap=interval(-0.1, -0.15, -0.05) if row.epsilon else interval(0.1, 0.05, 0.15))
        for row in report.rows
    ]
    report = replace(report, rows=rows)
    found = [text for text in warnings(report) if "under-confident" in text]
    assert len(found) == 1 and "row 'smoothed'" in found[0] and "temperature scaling" in found[0]
    assert "over-confident" in regime(report)
    calm = [with_metrics(row, signed_gap=interval(-0.1, -0.25, 0.05)) for row in report.rows]
    assert not [text for text in warnings(replace(report, rows=calm)) if "under-confident" in text]


def test_a_smoothed_model_alone_gets_its_advice_from_the_regime() -> None:
    report = make_report()
    row = with_metrics(report.rows[2], signed_gap=interval(-0.1, -0.15, -0.05))
    alone = replace(report, rows=[row], history={}, published=None)
    assert "is under-confident" in regime(alone) and "try a smaller epsilon, or temperature scaling" in regime(alone)
    assert not [text for text in warnings(alone) if "under-confident" in text]


def test_losses_of_two_runs_are_never_drawn_without_their_nll() -> None:
    """A log of another Trainer has `loss` alone: beside a second run it could only be compared with what it is not."""
    known = [{"step": s, "loss": 1.0 / s + 0.3, "nll": 1.0 / s} for s in (1, 2)]
    stock = [{"step": s, "loss": 1.0 / s} for s in (1, 2)]
    figure = loss_curve(make_report(history={"baseline": stock, "smoothed": known}))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["smoothed (ε = 0.1): nll", "smoothed (ε = 0.1): objective"]
    with pytest.raises(ValueError, match="in history, got none"):
        loss_curve(make_report(history={"baseline": stock, "smoothed": stock}))


def test_the_summary_of_a_training_has_a_loss_which_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_loss` holds the smoothing term; `train_nll` is the mean NLL of the same steps, also of those after the last log."""
    settings = dict(label_smoothing_factor=0.2, max_steps=5, logging_steps=2, per_device_train_batch_size=4, learning_rate=0.1)
    args = arguments(tmp_path, LabelSmoothingArguments, **settings)
    trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, train_dataset=classification_rows(20), data_collator=collate)
    seen: list[float] = []
    add = LoggedTerms.add

    def noted(self: LoggedTerms, terms: torch.Tensor, *more: Any) -> None:
        seen.append(float(terms[0].detach()))
        add(self, terms, *more)

    monkeypatch.setattr(LoggedTerms, "add", noted)
    metrics = trainer.train().metrics
    assert len(seen) == 5 and metrics["train_nll"] == pytest.approx(np.mean(seen), rel=1e-6)
    assert abs(metrics["train_loss"] - metrics["train_nll"]) > 1e-3
