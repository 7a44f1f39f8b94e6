"""What `create_model_card` and `push_to_hub` of the trainers write: the report's card, else what the Trainer itself knows.

Here the facts are gathered from a Trainer; the card is made of them by `hf_ls.report.card`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers.modelcard import TASK_MAPPING

from hf_ls.common.files import write_atomically
from hf_ls.common.models import chooses, output_embedding
from hf_ls.common.privacy import TEXTS, paths_here
from hf_ls.report.calibration_report import REPORT, CalibrationReport, package_versions
from hf_ls.report.card import CardFacts, is_generated, model_card, render
from hf_ls.report.facts import DatasetFacts, HubFacts, SmoothingFacts, TrainingFacts
from hf_ls.trainer.criterion import ADAPTIVE, techniques

logger = logging.getLogger(__name__)

_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


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
    write_atomically(
        path, render(card_facts(trainer, given)) if report is None else model_card(report, _hub_facts(given, report.hub))
    )


def warn_of_paths(trainer: Any, folder: str | os.PathLike[str] | None) -> None:
    """Name the texts of a folder which is uploaded in which a path of this machine stands, each once.

    PEFT writes the folder of its base model into `adapter_config.json`, the Trainer that of the best checkpoint into
    `trainer_state.json`: where those are resumed from or loaded here they must stay as they are.
    """
    if folder is None or not trainer.is_world_process_zero():
        return
    paths, told = paths_here(folder, trainer.args.output_dir, _base(trainer, {})), trainer._told_of_paths
    for path in sorted(Path(folder).iterdir()):
        text = path.read_text(encoding="utf-8", errors="replace") if path.suffix in TEXTS and path.name not in told else ""
        found = [here for here in paths if here in text]
        if found:
            told.add(path.name)
            logger.warning(
                "%s is uploaded with a path of this machine, %s, which says nothing to others; load the model by an id of the "
                "Hub, or give output_dir relative to the current folder",
                path,
                found[0],
            )


def card_facts(trainer: Any, given: Mapping[str, Any]) -> CardFacts:
    """What a Trainer without a report knows: the last evaluation, the smoothing as it was trained, the settings.

    `given`: what the caller of `create_model_card` says by name.
    """
    metrics, evaluated = last_evaluation(trainer)
    training, smoothing = _training(trainer), _smoothing(trainer)
    library = [*(getattr(trainer, "_tag_names", None) or []), *(getattr(trainer.model, "model_tags", None) or [])]  # of TRL
    own = _hub_facts(given)
    positions = "accuracy, nll, brier and ece are of start and end positions, each counted for itself, not of whole answers."
    return CardFacts(
        model_name=given.get("model_name") or Path(trainer.args.output_dir).absolute().name,
        kind=type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
        task=_task(trainer, given),
        base_model=_base(trainer, given),
        label_names=[],
        dataset=_dataset(trainer, given),
        smoothing=smoothing,
        training=training,
        versions=package_versions(),
        evaluated=evaluated,
        metrics=metrics,
        limits=[positions] if metrics and trainer._spans else [],
        header=HubFacts(own.license, own.language, ["generated_from_trainer", *library, *own.tags]),
    )


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
    steps = report.training.steps if report.training else None
    return report if trainer.state.global_step in (0, steps) else None


def _hub_facts(given: Mapping[str, Any], known: HubFacts | None = None) -> HubFacts:
    """What the caller says, else what the report knows."""
    own, known = [_listed(given.get(name)) for name in ("language", "tags")], known or HubFacts()
    return HubFacts(given.get("license") or known.license, own[0] or known.language, own[1] or known.tags, known.library)


def _dataset(trainer: Any, given: Mapping[str, Any]) -> DatasetFacts | None:
    """The data which the caller names; None without a name."""
    titles, ids = _listed(given.get("dataset")), _listed(given.get("dataset_tags")) or _listed(given.get("dataset_name"))
    if not titles and not ids:
        return None
    configs, split = _listed(given.get("dataset_args")), getattr(trainer.eval_dataset, "split", None)
    return DatasetFacts(
        name=titles[0] if titles else ids[0],
        hub_id=ids[0] if ids else None,
        config=configs[0] if configs else None,
        split=None if split is None else str(split),
        named=bool(titles),
    )


def _smoothing(trainer: Any) -> SmoothingFacts:
    """The smoothing as it was trained; not known without a step."""
    state, smoothing, criterion, spans = trainer.state, trainer.smoothing, trainer.criterion, trainer._spans
    if not state.global_step:
        return SmoothingFacts(None)
    vocabulary = output_embedding(trainer.model) is not None
    config = trainer.model.config.get_text_config()
    more: dict[str, Any] = {"over": "text" if spans else "vocabulary" if vocabulary else "classes"}
    if spans:  # the classes are the tokens of one text, not of a vocabulary nor the config's two outputs
        more["prior"] = "uniform over the tokens of each text, none for padding"
    elif smoothing.prior is not None:
        more["prior"] = _prior(smoothing.prior)
    return SmoothingFacts.of(
        smoothing,
        None if spans or chooses(trainer.model) else config.vocab_size if vocabulary else config.num_labels,
        plain=criterion.plain,
        steps=(state.global_step, state.max_steps),
        item_by_item=criterion.name in ADAPTIVE,
        excluded="answers outside of the text given to the model"
        if spans
        else "positions with the label −100 (padding, prompts)",
        **more,
    )


def _prior(prior: Tensor) -> str:
    size = prior.shape[-1]
    empty = int((prior == 0).sum()) if prior.dim() == 1 else 0
    kind = "one row for each label" if prior.dim() == 2 else f"one distribution over {size:,} classes"
    return f"given by the user, {kind}" + (f"; {empty:,} classes get no mass" if empty else "")


def _training(trainer: Any) -> TrainingFacts | None:
    """The settings of the training; None without a step."""
    args, state, criterion = trainer.args, trainer.state, trainer.criterion
    if not state.global_step:
        return None
    objective = criterion.objective
    params = criterion.params if objective is None else dict(objective.params)
    weights = "each example counts by the weight of its label, the smoothed targets are left as they are"
    return TrainingFacts(
        seeds=[args.seed],
        steps=state.global_step,
        epochs=state.epoch,
        global_batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type=getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        weight_decay=args.weight_decay,
        optim=getattr(args.optim, "value", args.optim),
        mixed_precision="fp16" if args.fp16 else "bf16" if args.bf16 else None,
        gradient_tolerance=getattr(args, "gradient_tolerance", None),
        objective=criterion.name,
        objective_params=params | ({"z loss": objective.z_loss} if objective is not None and objective.z_loss else {}),
        techniques=techniques(trainer.smoothing, criterion, trainer.distillation, trainer.mixup),
        class_weight=None if trainer.class_weight is None else weights,
        peft="adapters" if hasattr(trainer.model, "peft_config") else None,
        num_processes=args.world_size,
    )


def _base(trainer: Any, given: Mapping[str, Any]) -> str | None:
    adapters = getattr(trainer.model, "peft_config", None)
    if given.get("finetuned_from"):
        return str(given["finetuned_from"])
    if adapters:
        return next(iter(adapters.values())).base_model_name_or_path
    return getattr(trainer.model.config, "_name_or_path", None) or None


def _task(trainer: Any, given: Mapping[str, Any]) -> str | None:
    if given.get("tasks"):
        return _listed(given["tasks"])[0]
    model = trainer.accelerator.unwrap_model(trainer.model)
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    mappings: dict[str, Any] = TASK_MAPPING
    return next((task for task, models in mappings.items() if name in models.values()), None)


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple | set) else [str(value)]
