"""What `create_model_card` and `push_to_hub` of the trainers write: the report's card, else what the Trainer itself knows.

Here are the card made of a Trainer's state alone, and which README.md in its folder stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from transformers.modelcard import TASK_MAPPING

from hf_ls.common.files import write_atomically
from hf_ls.common.models import output_embedding
from hf_ls.common.text import hub_id, in_words, link, markdown_table, one_line, plain
from hf_ls.report.calibration_report import REPORT, CalibrationReport, package_versions
from hf_ls.report.card import MARKER, NO_FREE_WIN, NOT_EXAMINED, is_generated, model_card, smoothing_lines
from hf_ls.report.card_metadata import HUB_METRICS
from hf_ls.trainer.criterion import techniques

logger = logging.getLogger(__name__)

_N_BINS = 15  # of the ECE which an evaluation logs
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_TEMPLATE = """---
{{ card_data }}
---

{{ marker }}

# {{ title }}

{{ summary }}

## Evaluation

{{ evaluated }}
{% if table %}
{{ table }}

accuracy, ece (15 equal-width bins) and brier (sum over classes, 0 to 2) are of the unsmoothed probabilities, nll and loss in nats; loss is the nll. No intervals were measured.
{% endif %}
## Label smoothing

{% for line in smoothing -%}
- {{ line }}
{% endfor %}
## Training

{% for line in settings -%}
- {{ line }}
{% endfor %}
## Limitations

{% for line in limitations -%}
- {{ line }}
{% endfor %}
## Versions

{% for line in versions -%}
- {{ line }}
{% endfor -%}
"""  # noqa: E501, one paragraph of Markdown is one line


def write_trainer_card(trainer: Any, given: Mapping[str, Any]) -> None:
    """Write `README.md` into the output folder; nothing is looked up on the network.

    The stock card drops every metric which is no accuracy, F1, BLEU or ROUGE, writes NumPy scalars as Python objects which
    the Hub cannot read, states `label_smoothing_factor` also where nothing was trained, and replaces cards written by hand.
    """
    path = Path(trainer.args.output_dir or "trainer_output", "README.md")
    if path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s was written by hand and stays as it is; move it away for a generated card", path)
        return
    report = _report_of(trainer)
    write_atomically(path, trainer_card(trainer, given) if report is None else _with_given(model_card(report), given))


def trainer_card(trainer: Any, given: Mapping[str, Any]) -> str:
    """The card of a Trainer without a report: last evaluation, smoothing as it was trained, settings.

    `given`: what the caller of `create_model_card` says by name. Every name in it is shown, not obeyed.
    """
    metrics, where = last_evaluation(trainer)
    trained, smoothed, smoothing = _smoothing(trainer)
    base, task, adapter = _base(trainer, given), _task(trainer, given), hasattr(trainer.model, "peft_config")
    name = one_line(given.get("model_name") or Path(trainer.args.output_dir).absolute().name)
    dataset = next(iter(_listed(given.get("dataset_tags")) or _listed(given.get("dataset_name"))), None)
    results = _results(trainer, given, metrics, task, hub_id(dataset))
    card_data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        language=[one_line(found) for found in _listed(given.get("language"))] or None,
        license=one_line(given["license"]) if given.get("license") else None,
        tags=_tags(trainer, given, smoothed),
        base_model=hub_id(base),
        datasets=[dataset] if dataset and hub_id(dataset) else None,
        metrics=[hub_type for metric, (hub_type, _) in HUB_METRICS.items() if metric in metrics] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    how = "" if not trained else " with label smoothing" if smoothed else " without label smoothing"
    origin = "not trained by this Trainer" if not trained else f"trained{how}" + (f" from {_origin(base)}" if base else "")
    titles = [plain(one_line(found)) for found in _listed(given.get("dataset"))] or (
        [link(dataset, dataset, "datasets/")] if dataset else []
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        marker=MARKER,
        title=plain(name),
        summary=f"A {plain(type(trainer.accelerator.unwrap_model(trainer.model)).__name__)}, {origin}."
        + (f" Data: {', '.join(titles)}." if titles else ""),
        evaluated=where,
        table=markdown_table(
            [["metric", "value"], *([key.replace("_", " "), f"{number:.4f}"] for key, number in metrics.items())], 1
        )
        if metrics
        else None,
        smoothing=smoothing,
        settings=_settings(trainer, base),
        limitations=_limitations(metrics, smoothed, trainer._spans),
        versions=[f"{plain(key)} {plain(number)}" for key, number in package_versions().items()],
    )
    return str(card).rstrip() + "\n"


def last_evaluation(trainer: Any) -> tuple[dict[str, float], str]:
    """The finite numbers of the last evaluation as Python floats, without their prefix, and in words where they come from.

    Under `load_best_model_at_end` the evaluation of the best checkpoint, whose weights the model has; the stock card states
    that of the last step.
    """
    log = trainer.state.log_history
    trained = max((i for i, entry in enumerate(log) if "train_runtime" in entry), default=-1)
    during, after = (
        [e for e in part if any(key.startswith("eval_") for key in e)] for part in (log[: trained + 1], log[trained + 1 :])
    )
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    found = after or [entry for entry in during if best in (None, entry.get("step"))]
    if not found:
        return {}, "The Trainer has not evaluated this model."
    step = found[-1].get("step")
    merged = {key: value for entry in found if entry.get("step") == step for key, value in entry.items()}
    wanted = [key for key in merged if key.startswith("eval_") and not key.endswith(_NO_METRICS)]
    metrics = {key.removeprefix("eval_"): number for key in wanted if (number := _number(merged[key])) is not None}
    data = trainer.eval_dataset
    size = f", n = {len(data):,} examples" if hasattr(data, "__len__") and not isinstance(data, Mapping) else ""
    return metrics, f"The evaluation of step {step}{size}."


def _number(value: Any) -> float | None:
    """A finite Python float of any scalar; None for what is no number."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        value = value.item() if math.prod(value.shape) == 1 else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def _report_of(trainer: Any) -> CalibrationReport | None:
    """The report in the output folder, if it is of as many steps as the model was trained; None otherwise."""
    path = Path(trainer.args.output_dir, REPORT)
    if not path.is_file():
        return None
    try:
        report = CalibrationReport.load(path)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return report if trainer.state.global_step in (0, report.training.get("steps")) else None


def _with_given(text: str, given: Mapping[str, Any]) -> str:
    """The card of a report with the licence, language and tags which the caller names."""
    card = ModelCard(text)
    data: Any = card.data
    if given.get("license"):
        data.license = one_line(given["license"])
    if given.get("language"):
        data.language = [one_line(found) for found in _listed(given["language"])]
    data.tags = list(dict.fromkeys([*(data.tags or []), *map(one_line, _listed(given.get("tags")))]))
    return str(card).rstrip() + "\n"


def _smoothing(trainer: Any) -> tuple[bool, bool, list[str]]:
    """Whether this Trainer trained at all, whether with smoothing, and the facts about it, one a line."""
    state, smoothing, criterion = trainer.state, trainer.smoothing, trainer.criterion
    if not state.global_step:
        return False, False, ["not known: this Trainer has not trained the model"]
    steps = sorted({0, (state.global_step - 1) // 2, state.global_step - 1})
    epsilons = [smoothing.at(step, state.max_steps).epsilon for step in steps]
    smoothed = any(epsilons) or criterion.name in ("graduated", "instance", "online")
    lines = [f"training objective: {plain(criterion.name.replace('_', ' '))}"]
    objective = criterion.objective
    params = (
        criterion.params
        if objective is None
        else dict(objective.params) | ({"z loss": objective.z_loss} if objective.z_loss else {})
    )
    if params:
        lines.append(f"its parameters: {in_words(params)}")
    if criterion.name in ("graduated", "instance", "online"):
        lines.append("epsilon: made by the objective, item by item")
    elif not smoothed:
        lines.append("effective epsilon: 0, no label smoothing was used")
    else:
        vocabulary = output_embedding(trainer.model) is not None
        config = trainer.model.config.get_text_config()
        k = config.vocab_size if vocabulary else config.num_labels
        spans = trainer._spans  # the classes are the tokens of one text, not of a vocabulary nor the config's two outputs
        uniform = smoothing.prior is None
        fixed = uniform and not spans and smoothing.schedule is None and criterion.plain
        gap = smoothing.optimal_logit_gap(k) if fixed and smoothing.epsilon > 0 else None
        facts = {
            "epsilon": smoothing.epsilon,
            "convention": smoothing.convention,
            "prior": "uniform over the tokens of each text, none for padding"
            if spans
            else "uniform"
            if uniform
            else _prior(smoothing.prior),
            "schedule": None
            if smoothing.schedule is None
            else vars(smoothing.schedule) | {"epsilon of the first, middle and last step": [round(e, 6) for e in epsilons]},
            "excluded": "answers outside of the text given to the model"
            if spans
            else "positions with the label −100 (padding, prompts)",
            "optimal_logit_gap": gap,
            "max_confidence": smoothing.max_confidence(k) if gap is not None else None,
        }
        lines += smoothing_lines(facts, 0 if vocabulary or spans else k, "tokens of the text" if spans else "")
    found = techniques(smoothing, criterion, trainer.distillation, trainer.mixup)
    if trainer.distillation is not None or trainer.mixup is not None:
        lines.append(f"what softens the targets, all together: {plain(', '.join(found))}")
    if trainer.class_weight is not None:
        lines.append("class weights: each example counts by the weight of its label, the smoothed targets are left as they are")
    return True, smoothed, lines


def _prior(prior: Tensor) -> str:
    size = prior.shape[-1]
    empty = int((prior == 0).sum()) if prior.dim() == 1 else 0
    kind = "one row for each label" if prior.dim() == 2 else f"one distribution over {size:,} classes"
    return f"given by the user, {kind}" + (f"; {empty:,} classes get no mass" if empty else "")


def _base(trainer: Any, given: Mapping[str, Any]) -> str | None:
    adapters = getattr(trainer.model, "peft_config", None)
    if given.get("finetuned_from"):
        return str(given["finetuned_from"])
    if adapters:
        return next(iter(adapters.values())).base_model_name_or_path
    return getattr(trainer.model.config, "_name_or_path", None) or None


def _origin(base: str) -> str:
    """The base model as a link, or the last part of a local path: the rest is nobody else's business."""
    return link(base, base) if hub_id(base) else plain(Path(base).name or base)


def _task(trainer: Any, given: Mapping[str, Any]) -> str | None:
    if given.get("tasks"):
        return one_line(_listed(given["tasks"])[0])
    model = trainer.accelerator.unwrap_model(trainer.model)
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    mappings: dict[str, Any] = TASK_MAPPING
    return next((task for task, models in mappings.items() if name in models.values()), None)


def _tags(trainer: Any, given: Mapping[str, Any], smoothed: bool) -> list[str]:
    own = ["label-smoothing"] if smoothed else []
    library = getattr(trainer, "_tag_names", None) or []  # of TRL
    model = getattr(trainer.model, "model_tags", None) or []
    return list(
        dict.fromkeys(
            map(one_line, [*own, "calibration", "generated_from_trainer", *library, *model, *_listed(given.get("tags"))])
        )
    )


def _results(
    trainer: Any, given: Mapping[str, Any], metrics: Mapping[str, float], task: str | None, dataset: str | None
) -> list[EvalResult]:
    """The metrics for the Hub's model-index; none without a task and a dataset id on the Hub."""
    if task is None or dataset is None:
        return []
    titles, settings = _listed(given.get("dataset")), _listed(given.get("dataset_args"))
    split, level = getattr(trainer.eval_dataset, "split", None), "token" if "perplexity" in metrics else None
    bins = {"n_bins": _N_BINS, "norm": "l1", "binning": "equal_width"} | ({"level": level} if level else {})
    types = {metric: (one_line(metric), one_line(metric).replace("_", " ")) for metric in metrics if metric != "loss"}
    types |= {metric: known for metric, known in HUB_METRICS.items() if metric in metrics}
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=one_line(titles[0] if titles else dataset),
            dataset_config=one_line(settings[0]) if settings else None,
            dataset_split=None if split is None else str(split),
            metric_type=hub_type,
            metric_name=f"{title} per token" if level and metric in HUB_METRICS else title,
            metric_value=metrics[metric],
            metric_args=bins if metric == "ece" else None,
        )
        for metric, (hub_type, title) in types.items()
    ]


def _settings(trainer: Any, base: str | None) -> list[str]:
    args, state = trainer.args, trainer.state
    if not state.global_step:
        return ["this Trainer has not trained the model"]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "global batch": batch,
        "learning rate": args.learning_rate,
        "scheduler": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "weight decay": args.weight_decay,
        "optimizer": getattr(args.optim, "value", args.optim),
        "mixed precision": "fp16" if args.fp16 else "bf16" if args.bf16 else None,
        "processes": args.world_size,
        "seed": args.seed,
    }
    origin = "none, trained from scratch" if base is None else _origin(base)
    return [f"base model: {origin}", *(f"{key}: {in_words(value)}" for key, value in facts.items() if value is not None)]


def _limitations(metrics: Mapping[str, float], smoothed: bool, spans: bool) -> list[str]:
    lines = ["No intervals, baseline or temperature were measured: no claim is made that smoothing helped or harmed."]
    if metrics and spans:
        lines.append(
            "accuracy, nll, brier and ece are of start and end positions, each counted for itself, not of whole answers."
        )
    if "ece" in metrics:
        lines.append(
            "A perfectly calibrated model would not show an ECE of 0 on a sample. ECE depends on the bins; NLL and Brier do not."
        )
    if metrics:
        lines.append(
            "The evaluation data may have served to choose the model; neither accuracy nor calibration is verified out of domain."
        )
    if smoothed:
        lines.append(NO_FREE_WIN)
    return [*lines, NOT_EXAMINED]


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else [str(value)]
