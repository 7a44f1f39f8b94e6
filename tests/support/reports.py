"""Reports of toy predictions: of whole examples, and of tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from hf_ls.metrics import PredictionStatistics, TokenCalibration
from hf_ls.metrics.paired import Difference, differences, draws_of_examples, draws_of_tokens
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.facts import DatasetFacts, SmoothingFacts, TrainingFacts


def toy_logits(n: int = 200, num_classes: int = 3, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1.5
    return scale * logits, labels


def toy_history(rows: list[CalibrationRow]) -> dict[str, list[dict[str, float]]]:
    steps = range(10, 60, 10)
    return {
        row.run: [
            {"step": s, "loss": 1.0 - s / 100 + row.epsilon, "nll": 1.0 - s / 100, "smoothing_term": row.epsilon} for s in steps
        ]
        + [{"step": 50, "eval_nll": 0.8, "eval_ece": 0.1}]
        for row in rows
        if not row.tempered
    }


def make_report(n: int = 200, num_classes: int = 3, rows: int = 4, **changes: Any) -> CalibrationReport:
    """Rows over one toy split: an over-confident baseline, an under-confident smoothed run, both tempered."""
    logits, labels = toy_logits(n, num_classes)
    settings = [("baseline", 0.0, None, 1.0), ("baseline", 0.0, 1.6, 1.0)]
    settings += [("smoothed", 0.1, None, 0.4), ("smoothed", 0.1, 0.7, 0.4)]
    made = [
        CalibrationRow.from_logits(run, epsilon, temperature, factor * logits, labels, repetitions=50)
        for run, epsilon, temperature, factor in settings[:rows]
    ]
    draws = {
        row.name: [
            draws_of_examples(PredictionStatistics.from_logits(factor / row.temperature * logits, labels), labels, repetitions=50)
        ]
        for row, (*_, factor) in zip(made, settings[:rows], strict=True)
    }
    fields: dict[str, Any] = {
        "task": "text-classification",
        "model_name": "toy-model",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "dataset": DatasetFacts(
            "snippets",
            "test",
            n,
            class_counts=np.bincount(labels, minlength=num_classes),
            licence="MIT",
            n_train=1000,
            n_validation=100,
        ),
        "label_names": [f"label {i}" for i in range(num_classes)],
        "smoothing": SmoothingFacts(
            0.1, "all", "uniform", num_classes=num_classes, optimal_logit_gap=3.332, max_confidence=0.933
        ),
        "rows": made,
        "training": TrainingFacts(seeds=[0], steps=50, learning_rate=5e-5, max_length=16, peft="none"),
        "history": toy_history(made),
        "versions": {"transformers": "5.23.0"},
        "published": made[-1].name if rows != 3 else "smoothed",
        "differences": differences(draws),
    }
    return CalibrationReport(**fields | changes)


def toy_tokens(
    scale: float = 1.0, sequences: int = 80, vocabulary: int = 9, temperature: float = 1.0, repetitions: int = 50
) -> TokenCalibration:
    """Sequences of 1 to 9 tokens, padded with NaN; token 1 ends each; harder with the position; token 8 is unseen."""
    rng = np.random.default_rng(3)
    lengths, steps = rng.integers(1, 10, sequences), 10
    labels = rng.integers(2, vocabulary, (sequences, steps))
    labels[np.arange(sequences), lengths - 1] = 1
    position = np.arange(steps)
    logits = rng.normal(size=(sequences, steps, vocabulary))
    np.put_along_axis(
        logits, labels[..., None], (3.5 - 0.25 * position)[None, :, None] + 2 * rng.normal(size=(sequences, steps, 1)), -1
    )
    stats = PredictionStatistics.from_logits((scale / temperature * logits).reshape(-1, vocabulary), labels.ravel())
    items = np.stack([stats.confidence, stats.correct, stats.nll, stats.brier], -1).reshape(sequences, steps, 4)
    items[position >= lengths[:, None]] = np.nan
    counts = [0, sequences, *(10 ** np.arange(vocabulary - 3)), 0]
    tokens = TokenCalibration(eos_token_id=1, token_counts=counts, repetitions=repetitions)
    tokens.update(items, labels)
    return tokens


def make_token_report(
    task: str = "text2text-generation", rows: int = 4, sequences: int = 80, **changes: Any
) -> CalibrationReport:
    """Rows over toy sequences: an over-confident baseline, an under-confident smoothed run, both tempered."""
    settings = [("baseline", 0.0, None, 2.2), ("baseline", 0.0, 1.4, 2.2)]
    settings += [("smoothed", 0.1, None, 0.9), ("smoothed", 0.1, 0.6, 0.9)]
    made, draws = [], {}
    for run, epsilon, temperature, scale in settings[:rows]:
        tokens = toy_tokens(scale, sequences, temperature=temperature or 1.0)
        extra: dict[str, dict[str, float]] = {}
        if task == "text2text-generation":
            extra["phoneme_error_rate"] = interval(0.221, 0.215, 0.227) if epsilon else interval(0.239, 0.233, 0.245)
            extra["exact_match"] = interval(0.52, 0.49, 0.55) if epsilon else interval(0.48, 0.45, 0.51)
            extra |= {} if temperature else {"sequence_ece": {"value": 0.05}}
        made.append(CalibrationRow.from_tokens(run, epsilon, temperature, tokens, extra))
        draws[made[-1].name] = [draws_of_tokens(tokens)]
    names = [f"class {i}" for i in range(9)] if task == "token-classification" else []
    fields: dict[str, Any] = {
        "task": task,
        "rows": made,
        "label_names": names,
        "dataset": DatasetFacts(
            "words",
            "test",
            made[0].n,
            class_counts=[made[0].n, *[0] * 8] if names else None,
            licence="BSD",
            n_sequences=sequences,
            n_train=1000,
        ),
        "smoothing": SmoothingFacts(
            0.1,
            "all",
            "uniform",
            num_classes=9,
            over="classes" if names else "vocabulary",
            optimal_logit_gap=3.332,
            max_confidence=0.933,
        ),
        "published": None if rows == 2 else made[min(rows, 3) - 1].name,
        "differences": differences(draws),
    }
    return replace(make_report(rows=1), **{**fields, "history": toy_history(made), **changes})


def with_metrics(row: CalibrationRow, **metrics: dict[str, float]) -> CalibrationRow:
    return replace(row, metrics={**row.metrics, **metrics})


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def with_difference(report: CalibrationReport, **metrics: dict[str, float] | None) -> CalibrationReport:
    """The same report with these paired differences in every pair of rows, whatever the rows say; None for not known."""
    kept = [d for d in report.differences if d.metric not in metrics]
    pairs = [(row.name, against.name) for against, row in combinations(report.rows, 2)]
    new = [Difference(metric, *pair, **found) for metric, found in metrics.items() if found for pair in pairs]
    return replace(report, differences=[*kept, *new])
