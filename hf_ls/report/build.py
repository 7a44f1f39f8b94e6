"""From predictions to a report, for a model of any library and for those of the scripts, and from a report to its files.

Whatever maps the predictions is fitted on validation data alone and measured on the reported ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from hf_ls.calibration.posthoc import compare_posthoc
from hf_ls.calibration.temperature import apply_temperature, fit_temperature
from hf_ls.common.files import write_atomically
from hf_ls.metrics.classes import class_scores, class_table
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.paired import Draws, differences, draws_of_examples
from hf_ls.metrics.validation import Floats, Integers, as_array, check_labels, check_logits, check_probabilities
from hf_ls.report.calibration_report import EVALUATED, REPORT, CalibrationReport, CalibrationRow, package_versions
from hf_ls.report.card import check_card, write_card
from hf_ls.report.card_metadata import BENCHMARKS, benchmark_results
from hf_ls.report.facts import DatasetFacts, HubFacts, SmoothingFacts
from hf_ls.report.plots import write_plots


@dataclass(frozen=True)
class Scored:
    """What a model says of one set of examples, and what is right: logits [n, K], labels [n].

    soft: distributions over the classes [n, K] beside the labels, such as the votes of raters; None without any.
    clip: None for logits of a model. For logarithms of probabilities, −inf where one is 0, the machine epsilon of the precision
    they came in, at which `log_loss` of scikit-learn clips them; nothing is clipped here.
    """

    logits: Floats
    labels: Integers
    clip: float | None = None
    soft: Floats | None = None

    @classmethod
    def of(cls, labels: Any, *, logits: Any = None, probabilities: Any = None, soft: Any = None) -> Self:
        """Check them; the logits of probabilities are their logarithms, so that a softmax gives them back.

        Raises: ValueError for neither or both; TypeError, ValueError as `check_logits`, `check_probabilities`, `check_labels`.
        """
        if (logits is None) == (probabilities is None):
            found = "neither" if logits is None else "both"
            raise ValueError(f"expected logits or probabilities, got {found}; give one of them, [n, K]")
        matrix = check_logits(logits) if probabilities is None else check_probabilities(probabilities)
        target = check_labels(labels, *matrix.shape)
        distributions = None if soft is None else check_probabilities(soft).astype(np.float64)
        if probabilities is None:
            return cls(matrix.astype(np.float64), target, soft=distributions)
        with np.errstate(divide="ignore"):
            return cls(np.log(matrix.astype(np.float64)), target, float(np.finfo(matrix.dtype).eps), distributions)


@dataclass(frozen=True)
class Measured:
    """The rows of one run: as it is, and at the temperature fitted on validation, if there is one.

    draws: name of a row -> what its metrics become when the examples are drawn anew. class_counts: of the labels.
    untempered: why a temperature could not be fitted; None where it was, or where there was no validation data.
    """

    rows: list[CalibrationRow]
    draws: dict[str, list[Draws]]
    class_counts: list[int]
    untempered: str | None = None


def measure(run: str, epsilon: float | None, reported: Scored, validation: Scored | None = None) -> Measured:
    """Measure the predictions of a run, and fit a temperature on those of validation, which are never reported.

    Raises: ValueError for validation predictions of other classes.
    """
    z, labels, clip = reported.logits, reported.labels, reported.clip
    temperatures: list[float | None] = [None]
    untempered = None
    if validation is not None:
        if validation.logits.shape[1] != z.shape[1]:
            raise ValueError(
                f"expected validation predictions of {z.shape[1]} classes, got {validation.logits.shape[1]}; use the same model"
            )
        try:
            temperatures.append(fit_temperature(validation.logits, validation.labels))
        except ValueError as error:
            untempered = str(error)
    rows, draws = [], {}
    for temperature in temperatures:
        row = CalibrationRow.from_logits(run, epsilon, temperature, z, labels, clip=clip)
        scaled = apply_temperature(z, row.temperature)
        stats = PredictionStatistics.from_logits(scaled, labels, impossible=clip is not None)
        scores, of_classes = class_scores(scaled, labels, reported.soft)
        rows.append(replace(row, metrics={**row.metrics, **scores}, classes=class_table(scaled, labels)))
        draws[row.name] = [draws_of_examples(stats, labels), of_classes]
    return Measured(rows, draws, np.bincount(labels, minlength=z.shape[1]).tolist(), untempered)


def posthoc(reported: Scored, validation: Scored) -> dict[str, dict[str, float | str | None]]:
    """`compare_posthoc` of two sets of predictions, for a report."""
    found = compare_posthoc(
        (validation.logits, validation.labels), (reported.logits, reported.labels), impossible=reported.clip is not None
    )
    return {name: dict(row) for name, row in found.items()}


def calibration_report(
    *,
    labels: Any,
    probabilities: Any = None,
    logits: Any = None,
    label_names: Sequence[Any] | None = None,
    validation: tuple[Any, Any] | None = None,
    label_map: Mapping[str, str] | None = None,
    model_name: str = "model",
    dataset_name: str | None = None,
    dataset_id: str | None = None,
    split: str | None = None,
    task: str | None = None,
    library: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    epsilon: float | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> CalibrationReport:
    """Everything which can be said of a classifier by its predictions alone: numbers, post-hoc rivals, plots and a card.

    The model may be of any library; it is not seen. With `output_dir` the folder gets `calibration.json`, plots and a model card
    (`README.md`).

    Args:
        labels: [n], class ids 0 … K−1, or with `label_names` the classes themselves, as in `y_test`.
        probabilities: [n, K], rows with sum 1, as `predict_proba` gives them. A label whose probability is exactly 0 makes the
            NLL infinite; the report says how many there are, and gives the NLL with clipping beside it.
        logits: [n, K], instead of probabilities and better where they exist: nothing is rounded to 0.
        label_names: of the columns, in order, such as `classes_` of scikit-learn.
        validation: (probabilities or logits, labels) of other examples. Temperature, vector scaling and isotonic regression
            are fitted on these alone; without them there is none.
        label_map: class of the model for each label, where the names differ.
        model_name, dataset_name: for readers. dataset_id: of the data on the Hub. split: "test" or another word.
        task, library: as the Hub calls them, e.g. "tabular-classification" and "sklearn". license, language: of the model.
            With a task and the name or id of the data, the header of the card has the results for the Hub.
        epsilon: label smoothing of the training, None where it is not known.

    >>> report = calibration_report(probabilities=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], labels=[0, 1, 1])
    >>> [row.name for row in report.rows], round(report.rows[0].value("accuracy"), 3)
    (['evaluated'], 0.667)

    Raises: TypeError, ValueError for predictions and labels which do not fit together; ValueError for a hand-written README.md
        in `output_dir`.
    """
    from hf_ls.data.labels import permutation_warning  # imports datasets

    kind: Literal["logits", "probabilities"] = "logits" if probabilities is None else "probabilities"
    matrix = as_array(logits if probabilities is None else probabilities)
    names = None if label_names is None else [str(name) for name in as_array(list(label_names)).tolist()]
    if names is not None and matrix.ndim == 2 and len(names) != matrix.shape[1]:
        raise ValueError(f"expected {matrix.shape[1]} label_names, one a column of {kind}, got {len(names)}; name every class")
    if output_dir is not None:
        check_card(output_dir)
    reported = Scored.of(_ids(labels, names, label_map), logits=logits, probabilities=probabilities)
    held_out = None
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise TypeError(f"expected validation as ({kind}, labels), got {type(validation).__name__}; give a pair")
        held_out = Scored.of(_ids(validation[1], names, label_map), **{kind: validation[0]})
        if np.array_equal(held_out.logits, reported.logits) and np.array_equal(held_out.labels, reported.labels):
            raise ValueError(
                "expected validation predictions of other examples, got the reported ones; a temperature is never judged where "
                "it was fitted: split the data, or leave validation out"
            )
    measured = measure(EVALUATED, epsilon, reported, held_out)
    report = CalibrationReport(
        task=task,
        model_name=model_name,
        base_model=None,
        dataset=DatasetFacts(
            name=dataset_name or dataset_id or "data of its user",
            named=dataset_name is not None,
            split=split,
            n=len(reported.labels),
            hub_id=dataset_id,
            class_counts=measured.class_counts,
            n_validation=None if held_out is None else len(held_out.labels),
        ),
        label_names=names or [f"class {k}" for k in range(reported.logits.shape[1])],
        smoothing=SmoothingFacts(epsilon),
        rows=measured.rows,
        training=None,
        history={},
        versions=package_versions("numpy", "scipy"),
        published=EVALUATED,
        differences=differences(measured.draws),
        posthoc={} if held_out is None else posthoc(reported, held_out),
        hub=HubFacts(license, [language] if isinstance(language, str) else list(language or []), library=library),
        predictions=kind,
    )
    permuted = permutation_warning(reported.logits.argmax(1), reported.labels, report.label_names)
    if permuted:
        warnings.warn(permuted, stacklevel=2)
    if output_dir is not None:
        write_report_files(report, output_dir)
    return report


def write_report_files(report: CalibrationReport, folder: str | os.PathLike[str], *, card: bool = True) -> list[Path]:
    """Write `calibration.json`, `plots/*.png` and, if wanted, the model card `README.md` with what else the Hub reads, each
    whole or not at all.

    Raises: ValueError for a README.md which somebody wrote, before anything is written; and as `model_card`.
    """
    if card:
        check_card(folder)
    written = [report.save(Path(folder, REPORT)), *write_plots(report, Path(folder, "plots"))]
    if not card:
        return written
    benchmark = benchmark_results(report)
    written += [] if benchmark is None else [write_atomically(Path(folder, BENCHMARKS), benchmark)]
    return [*written, write_card(report, folder)]


def _ids(labels: Any, names: list[str] | None, label_map: Mapping[str, str] | None) -> Any:
    """Class ids of labels: themselves without names, else as `match_labels` finds them."""
    if names is None:
        if as_array(labels).dtype.kind in "OSUT":
            raise ValueError(
                "expected label_names with labels which are names of classes, got none; give the classes in the order of the "
                "columns, such as classes_ of scikit-learn"
            )
        return labels
    from hf_ls.data.labels import match_labels  # imports datasets

    values = as_array(labels)
    if values.ndim != 1:
        raise ValueError(f"expected labels of shape [n], got shape {list(values.shape)}; give one class per row")
    listed = values.tolist()
    ids = match_labels(set(listed), names, given=label_map).ids
    return np.array([ids[label] for label in listed], dtype=np.int64)
