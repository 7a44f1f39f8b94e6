"""The metadata of a model card: what the Hub reads from its YAML header.

Owns: tags, ids and the model-index, through huggingface_hub's own classes.
Does not own: the text of the card (`card`) or any number (`report`).
"""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_ls.common.text import hub_id, one_line
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow

# Of one label per example: name here -> type on the Hub and title.
HUB_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "nll": ("nll", "Negative log-likelihood (nats)"),
    "brier": ("brier_score", "Brier score (sum over classes, 0 to 2)"),
    "ece": ("expected_calibration_error", "Expected calibration error"),
}


def metadata(report: CalibrationReport) -> ModelCardData:
    """The header of the card; without a dataset id on the Hub it claims no results."""
    results = eval_results(report)
    dataset_id = hub_id(report.dataset["hub_id"])
    return ModelCardData(
        library_name="peft" if is_adapter(report) else "transformers",
        pipeline_tag=report.task,
        tags=["label-smoothing", "calibration", report.task],
        base_model=hub_id(report.base_model),
        datasets=[dataset_id] if dataset_id else None,
        model_name=one_line(report.model_name) if results else None,
        eval_results=results or None,
    )


def eval_results(report: CalibrationReport) -> list[EvalResult]:
    """The results of the published row for the Hub's model-index; empty without that row or a dataset id.

    Hub types `accuracy`, `nll`, `brier_score`, `expected_calibration_error`, of tokens also `perplexity` and those of
    the task, `per` being the phoneme error rate; values are finite Python floats.
    """
    dataset, row = report.dataset, report.published_row
    dataset_id = hub_id(dataset["hub_id"])
    if dataset_id is None or row is None:
        return []
    return [
        EvalResult(
            task_type=report.task,
            dataset_type=dataset_id,
            dataset_name=one_line(dataset["name"]),
            dataset_config=dataset.get("config"),
            dataset_split=dataset["split"],
            dataset_revision=dataset.get("revision"),
            metric_type=hub_type,
            metric_name=title,
            metric_value=float(row.value(name)),
            metric_args=args,
        )
        for name, hub_type, title, args in _hub_metrics(row)
        if not math.isnan(row.value(name))
    ]


def is_adapter(report: CalibrationReport) -> bool:
    """Whether adapters are saved rather than a whole model."""
    return report.training.get("peft") not in (None, "none")


def _hub_metrics(row: CalibrationRow) -> list[tuple[str, str, str, dict[str, Any] | None]]:
    """Name here, type on the Hub, title and settings of each result, the first ones those of the task."""
    bins: dict[str, Any] = {"n_bins": len(row.reliability["count"]), "norm": "l1", "binning": "equal_width"}
    if not row.is_token:
        return [(name, *known, bins if name == "ece" else None) for name, known in HUB_METRICS.items()]
    # Not "wer": in this field that counts wrong words, which is 1 − exact match.
    known = {"phoneme_error_rate": ("per", "Phoneme error rate"), "exact_match": ("exact_match", "Exact match")}
    known |= {"bleu": ("bleu", "BLEU (0 to 100)"), "chrf": ("chrf", "chrF (0 to 100)")}
    return [
        *((name, *known.get(name, (one_line(name), one_line(name).replace("_", " "))), None) for name in row.quality),
        ("accuracy", "accuracy", "Accuracy per token", None),
        ("nll", "nll", "Negative log-likelihood per token (nats)", None),
        ("perplexity", "perplexity", "Perplexity per token", None),
        ("brier", "brier_score", "Brier score per token (sum over classes, 0 to 2)", None),
        ("ece", "expected_calibration_error", "Expected calibration error of tokens", bins | {"level": "token"}),
        ("sequence_ece", "expected_calibration_error", "Expected calibration error of sequences", bins | {"level": "sequence"}),
    ]
