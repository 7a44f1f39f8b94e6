"""From predictions to what a reader sees: the report, its plots and its card.

Owns: the predictions of a run on disk, which rows a report has, the facts which it states.
Does not own: training (`finetune`), numbers and pictures (`report`, `plots`, `card`).
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from huggingface_hub import HfApi
from rich.console import Console
from transformers import AutoModelForSequenceClassification, SchedulerType
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ls import __version__
from hf_ls.arguments import LabelSmoothingArguments, smoothing_of
from hf_ls.card import write_card
from hf_ls.config import Config
from hf_ls.criterion import parse_params
from hf_ls.data import ClassificationData
from hf_ls.files import write_atomically
from hf_ls.plots import write_plots
from hf_ls.report import CalibrationReport, CalibrationRow
from hf_ls.temperature import NoFiniteTemperature, bake_temperature, fit_temperature

REPORT = "calibration.json"
PREDICTIONS = "predictions.npz"  # written last: a run with it is complete


class Predictions(NamedTuple):
    """Logits [n, K] and hard labels [n] of each evaluated split, and the run's logs: all that the report is made of."""

    logits: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    history: list[dict[str, Any]]


def run_name(training: LabelSmoothingArguments) -> str:
    """The name of a run's row: what it trains on, "baseline" being the plain cross entropy."""
    if training.label_smoothing_objective != "smoothed_ce":
        return training.label_smoothing_objective
    return "smoothed" if training.label_smoothing_factor else "baseline"


def folder_of(config: Config) -> Path:
    """The folder of a run."""
    return Path(config.training.output_dir or "trainer_output")


def save_predictions(folder: Path, predictions: Predictions) -> None:
    """Write the predictions of a finished run, whole or not at all."""
    arrays = {f"logits_{split}": value for split, value in predictions.logits.items()}
    arrays |= {f"labels_{split}": value for split, value in predictions.labels.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, history=np.array(json.dumps(predictions.history)), **arrays)  # type: ignore[arg-type]
    write_atomically(folder / PREDICTIONS, buffer.getvalue())


def load_predictions(folder: Path) -> Predictions:
    """Read what `save_predictions` wrote."""
    with np.load(folder / PREDICTIONS, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    part = {kind: {n.removeprefix(kind): v for n, v in arrays.items() if n.startswith(kind)} for kind in ("logits_", "labels_")}
    return Predictions(part["logits_"], part["labels_"], json.loads(str(arrays["history"])))


def publish(config: Config, data: ClassificationData, runs: dict[str, Predictions]) -> CalibrationReport | None:
    """Rows with and without temperature on test (validation if there is no test), and all files made of them.

    Raises: ValueError for adapters with `bake_temperature`, and as `write_card`.
    """
    training = config.training
    main = runs[list(runs)[-1]]
    if not main.logits:
        return None
    split = "test" if "test" in main.logits else "validation"
    rows, published = [], list(runs)[-1]
    for name, run in runs.items():
        epsilon = 0.0 if name == "baseline" else training.label_smoothing_factor
        logits, labels = run.logits[split], run.labels[split]
        rows.append(CalibrationRow.from_logits(name, epsilon, 1.0, logits, labels))
        if split == "test" and "validation" in run.logits:  # a temperature is never judged on the data it was fitted on
            try:
                temperature = fit_temperature(run.logits["validation"], run.labels["validation"])
            except NoFiniteTemperature as error:
                announce(f"{name}: no row with temperature, {error}")
                continue
            rows.append(CalibrationRow.from_logits(f"{name} + temperature", epsilon, temperature, logits, labels))
            if config.run.bake_temperature and run is main:
                published = rows[-1].name
                _bake(config, temperature)
    report = CalibrationReport(
        task=config.run.task,
        model_name=training.hub_model_id or folder_of(config).name,
        base_model=config.model.model_name_or_path,
        dataset=_dataset_facts(data, split, main.labels[split]),
        label_names=list(data.label_names),
        smoothing=_smoothing_facts(training, len(data.label_names)),
        rows=rows,
        training=_training_facts(config, runs),
        history={name: run.history for name, run in runs.items()},
        versions=_versions(),
        published=published,
    )
    folder = folder_of(config)
    report.save(folder / REPORT)
    console = Console()
    console.print(report.table(console.width))
    console.print(report.regime(), report.verdict(), sep="\n", markup=False, highlight=False)
    write_plots(report, folder / "plots")
    write_card(report, folder)
    console.print(f"Report, plots and card: {folder}", markup=False, highlight=False, soft_wrap=True)
    if training.push_to_hub:
        _push(training, folder)
    return report


def _push(training: LabelSmoothingArguments, folder: Path) -> None:
    """Upload the folder once more: the Trainer's own pushes came before the report and carry its stock card."""
    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or folder.absolute().name
    repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        revision=training.hub_revision,
        commit_message="Calibration report and model card",
        ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", "baseline/*", "_*", ".*", PREDICTIONS, "training_args.bin"],
    )


def _bake(config: Config, temperature: float) -> None:
    folder = folder_of(config)
    if config.model.peft != "none":
        raise ValueError("expected peft: none with bake_temperature, got adapters; merge them first, then bake")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    bake_temperature(model, temperature)
    model.save_pretrained(folder)


def _dataset_facts(data: ClassificationData, split: str, labels: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(labels, minlength=len(data.label_names)).tolist()
    sizes = {f"n_{name}": len(part) for name, part in data.splits.items() if name != "test"}
    return {
        "name": data.name,
        "hub_id": data.hub_id,
        "split": split,
        "n": len(labels),
        "class_counts": counts,
        "licence": data.licence,
    } | sizes


def _smoothing_facts(training: LabelSmoothingArguments, num_classes: int) -> dict[str, Any]:
    smoothing = smoothing_of(training)
    gap = smoothing.optimal_logit_gap(num_classes)
    return {
        "epsilon": smoothing.epsilon,
        "convention": smoothing.convention,
        "prior": "uniform",
        "schedule": None if smoothing.schedule is None else asdict(smoothing.schedule),
        "optimal_logit_gap": gap if np.isfinite(gap) else None,
        "max_confidence": smoothing.max_confidence(num_classes),
    }


def _training_facts(config: Config, runs: dict[str, Predictions]) -> dict[str, Any]:
    training = config.training
    last = [run.history[-1] for run in runs.values() if run.history]
    seconds = [entry["train_runtime"] for entry in last if "train_runtime" in entry]
    return {
        "seeds": [training.seed],
        "steps": last[-1].get("step") if last else None,
        "epochs": training.num_train_epochs,
        "global_batch": training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * PartialState().num_processes,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SchedulerType(training.lr_scheduler_type).value,
        "weight_decay": training.weight_decay,
        "objective": training.label_smoothing_objective,
        "objective_params": parse_params(training.label_smoothing_objective_params),
        "max_length": config.data.max_length,
        "model_config_overrides": config.model.overrides,
        "peft": config.model.peft,
        "num_processes": PartialState().num_processes,
        "train_runtime_s": round(sum(seconds), 1) if len(seconds) == len(runs) else None,
    }


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "accelerate", "datasets")}
    return {"hf_ls": __version__, **packages, "python": platform.python_version()}


def announce(text: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)
