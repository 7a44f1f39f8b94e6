"""The metadata of a model card: what the Hub reads from its YAML header, and how results get into a header which is there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from hf_ls.common.text import hub_id, one_line
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow
from hf_ls.report.facts import DatasetFacts, HubFacts

# Name here -> type on the Hub, title, unit. Not "wer" for the phoneme error rate: in this field that counts wrong words.
_HUB_METRICS = {
    "accuracy": ("accuracy", "Accuracy", ""),
    "nll": ("nll", "Negative log-likelihood", "nats"),
    "perplexity": ("perplexity", "Perplexity", ""),
    "brier": ("brier_score", "Brier score", "sum over classes, 0 to 2"),
    "ece": ("expected_calibration_error", "Expected calibration error", ""),
    "sequence_ece": ("expected_calibration_error", "Expected calibration error of sequences", ""),
    "phoneme_error_rate": ("per", "Phoneme error rate", ""),
    "exact_match": ("exact_match", "Exact match", ""),
    "bleu": ("bleu", "BLEU", "0 to 100"),
    "chrf": ("chrf", "chrF", "0 to 100"),
}
_OF_TOKENS = ("accuracy", "nll", "perplexity", "brier", "ece")  # averages over tokens, where predictions are tokens
_PIPELINES = {"multiple-choice": "text-generation"}  # what the Hub runs such a model as
_LOCAL = "local"  # the type of data which is on no Hub
BENCHMARKS = ".eval_results/hf_ls.yaml"
_N_BINS = 15  # of every ECE which a Trainer logs


def metadata(
    task: str | None,
    model_name: str,
    base_model: str | None,
    dataset: DatasetFacts | None,
    metrics: Mapping[str, float],
    given: HubFacts,
    *,
    is_smoothed: bool,
    is_adapter: bool,
    row: CalibrationRow | None = None,
) -> ModelCardData:
    """The header of a card; without a task and data with an id on the Hub or a name of its user it claims no results.

    Args: metrics: of the published weights; row: what they were read from, for bins and signatures.
    """
    dataset_id = hub_id(dataset.hub_id) if dataset else None
    results = hub_results(task, dataset, metrics, row) if dataset else []
    own = ["label-smoothing"] if is_smoothed else []
    tags = [*own, "calibration", *given.tags]
    types = [hub_type for metric, (hub_type, *_) in _HUB_METRICS.items() if metric in metrics]
    return ModelCardData(
        library_name="peft" if is_adapter else given.library and one_line(given.library),
        pipeline_tag=None if task is None else one_line(_PIPELINES.get(task, task)),
        language=[one_line(found) for found in given.language] or None,
        license=one_line(given.license) if given.license else None,
        tags=list(dict.fromkeys(map(one_line, tags))),
        base_model=hub_id(base_model),
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(types)) or None,
        model_name=one_line(model_name) if results else None,
        eval_results=results or None,
    )


def per_token(task: str | None) -> bool:
    """Whether a prediction of the task is a token."""
    return task in ("token-classification", "text2text-generation", "text-generation")


def published_metrics(row: CalibrationRow) -> dict[str, float]:
    """The metrics of a row which are worth publishing, the first ones those of the task; without undefined ones."""
    wanted: tuple[str, ...] = ("accuracy", "nll", "brier", "ece")
    if row.is_token:
        wanted = (*row.quality, "accuracy", "nll", "perplexity", "brier", "ece", "sequence_ece")
    return {metric: float(row.value(metric)) for metric in wanted if not math.isnan(row.value(metric))}


def eval_results(report: CalibrationReport) -> list[EvalResult]:
    """The results of the published row for the Hub's model-index; empty without that row, a task or a name of the data."""
    row = report.published_row
    return [] if row is None else hub_results(report.task, report.dataset, published_metrics(row), row)


def benchmark_results(report: CalibrationReport) -> str | None:
    """The accuracy on test for the leaderboard of a benchmark on the Hub, YAML of `.eval_results`; None without one.

    Nothing else: leaderboards take one number a task, and calibration is in the model-index. (huggingface_hub 1.4, 2026.)
    """
    row, dataset, task_id = report.published_row, report.dataset, report.hub.benchmark_task
    dataset_id = hub_id(dataset.hub_id) if dataset else None
    if task_id is None or dataset_id is None or row is None or dataset is None or dataset.split != "test":
        return None
    entry = EvalResultEntry(dataset_id, task_id, row.metrics["accuracy"]["value"], notes=f"n = {dataset.n:,}")
    return str(yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def hub_results(
    task: str | None, dataset: DatasetFacts, metrics: Mapping[str, float], row: CalibrationRow | None = None
) -> list[EvalResult]:
    """Metrics as the Hub's results; empty without a task, or for data without an id on the Hub which nobody named.

    The type of data is its id on the Hub; of data which is on no Hub `local`, told apart by the name which its user gives it.

    Hub types `accuracy`, `nll`, `brier_score`, `expected_calibration_error`, of tokens also `perplexity` and those of
    the task, `per` being the phoneme error rate; another metric keeps its name. Values are finite Python floats.
    """
    dataset_type = hub_id(dataset.hub_id) or (_LOCAL if dataset.named else None)
    if task is None or dataset_type is None:
        return []
    found, tokens = [], row.is_token if row else "perplexity" in metrics
    bins: dict[str, Any] = {"n_bins": len(row.reliability["count"]) if row else _N_BINS, "norm": "l1", "binning": "equal_width"}
    levels = {"ece": {"level": "token"} if tokens else {}, "sequence_ece": {"level": "sequence"}}
    for metric, value in metrics.items():
        if metric == "loss":  # of a Trainer of ours the nll
            continue
        hub_type, title, unit = _HUB_METRICS.get(metric, (one_line(metric), one_line(metric).replace("_", " "), ""))
        title += " per token" if tokens and metric in _OF_TOKENS else ""
        signature = row.metrics.get(metric, {}).get("signature") if row else None
        args = bins | levels[metric] if metric in levels else {"signature": signature} if signature else None
        found.append(
            EvalResult(
                task_type=one_line(task),
                dataset_type=dataset_type,
                dataset_name=one_line(dataset.name),
                dataset_config=None if dataset.config is None else one_line(dataset.config),
                dataset_split=dataset.split,
                dataset_revision=dataset.revision,
                metric_type=hub_type,
                metric_name=title + (f" ({unit})" if unit else ""),
                metric_value=float(value),
                metric_args=args,
            )
        )
    return found


def with_results(card: str, model_name: str, results: Sequence[EvalResult]) -> str:
    """A card, that is the text of a README.md, with some results in its model-index; everything else stays as it is.

    A result of the same task, data, metric and settings gets the new value; any other is added. Outside of `model-index` not a
    character changes. (huggingface_hub's own update groups results by type, configuration, split and revision of the data, and
    keeps only the first name of the data and of the model.)

    Raises: ValueError for a header which is no mapping, a model-index of another shape, or one of several other models.
    """
    mark, text = ("\ufeff", card[1:]) if card.startswith("\ufeff") else ("", card)
    block = REGEX_YAML_BLOCK.search(text)
    line = "\r\n" if "\r\n" in text[: text.find("\n") + 1] else "\n"
    opening, header, rest = (
        (block[1], block[2], text[block.end(2) :]) if block else (f"---{line}", "", f"{line}---{line}{line}{text}")
    )
    try:
        found, node = yaml.safe_load(header), yaml.compose(header, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"expected a card with a valid YAML header, got: {one_line(str(error))}; mend it by hand") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"expected a card whose YAML header is a mapping, got a {type(found).__name__}; mend it by hand")
    wanted = dict(found or {})
    wanted["model-index"] = _merged(wanted.get("model-index"), one_line(model_name), results)
    places = [(key.start_mark.index, _end(value)) for key, value in (node.value if node else []) if key.value == "model-index"]
    if len(places) > 1:
        raise ValueError(f"expected one model-index in the card, got {len(places)}; keep one of them")
    written = str(yaml_dump({"model-index": wanted["model-index"]}, sort_keys=False, line_break=line)).rstrip("\r\n")
    if places:
        (start, stop), old = places[0], header[slice(*places[0])]
        made = header[:start] + written + old[len(old.rstrip()) :] + header[stop:]
    else:
        made = header + (line if header.strip() else "") + written
    try:
        kept = repr(yaml.safe_load(made)) == repr(wanted)  # unlike ==, of NaN too
    except yaml.YAMLError:
        kept = False
    if not kept:
        raise ValueError(
            "expected a card whose model-index can be replaced alone, got a header in one line, or one which refers to it; write "
            "each key of the header on lines of its own"
        )
    return f"{mark}{opening}{made}{rest}"


def _end(node: yaml.Node) -> int:
    """Where the last character of a value is: the mark of a block ends only at the next key, behind comments."""
    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index


def _merged(index: Any, model_name: str, results: Sequence[EvalResult]) -> list[Any]:
    """The model-index with the results in it, as new objects.

    Raises: ValueError for an index of another shape, or of several models none of which has the name.
    """
    new = _without_none(eval_results_to_model_index(model_name, list(results)))
    if index in (None, []):
        return new
    shaped = isinstance(index, list) and all(
        isinstance(model, dict) and isinstance(model.get("results"), list) and all(isinstance(r, dict) for r in model["results"])
        for model in index
    )
    if not shaped:
        raise ValueError("expected a model-index which lists models with their results, got another shape; mend it by hand")
    names = [model.get("name") for model in index]
    places = [i for i, name in enumerate(names) if name == model_name] if len(index) > 1 else [0]
    if len(places) != 1:
        raise ValueError(
            f"expected one model or one named {model_name!r} in the model-index of the card, got {names}; name one of them so"
        )
    kept = [*index[places[0]]["results"]]
    for group in new[0]["results"]:
        same = [i for i, old in enumerate(kept) if _same(old, group, "metrics") and isinstance(old.get("metrics"), list)]
        added = []
        for metric in group["metrics"]:
            at = [(i, j) for i in same for j, old in enumerate(kept[i]["metrics"]) if _same(old, metric, "value")]
            for i, j in at:
                metrics = [*kept[i]["metrics"]]
                metrics[j] = metrics[j] | {"value": metric["value"]}
                kept[i] = kept[i] | {"metrics": metrics}
            added += [] if at else [metric]
        if added and same:
            kept[same[0]] = kept[same[0]] | {"metrics": [*kept[same[0]]["metrics"], *added]}
        elif added:
            kept.append(group | {"metrics": added})
    return [model | {"results": kept} if i == places[0] else model for i, model in enumerate(index)]


def _same(old: Any, new: Mapping[str, Any], but: str) -> bool:
    """Whether two mappings say the same beside one key; a key without a value says nothing."""
    if not isinstance(old, dict):
        return False
    return _without_none({k: v for k, v in old.items() if k != but}) == {k: v for k, v in new.items() if k != but}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
