"""The main job: train with and without smoothing, calibrate, report.

Owns: the order of the steps of one run and which files it leaves.
Does not own: settings (`config`), data (`data`), the loss (`trainer`), numbers and pictures (`report`, `plots`, `card`).
"""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import platform
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import DatasetDict
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    SchedulerType,
    set_seed,
)
from transformers.training_args import OptimizerNames

from hf_ls import __version__
from hf_ls.arguments import LabelSmoothingArguments, smoothing_of
from hf_ls.card import write_card
from hf_ls.checkpoint import CheckpointMark, check_resumable, last_complete_checkpoint
from hf_ls.config import Config
from hf_ls.criterion import parse_params
from hf_ls.data import (
    EMBEDDED_DATASET,
    ClassificationData,
    check_overlap,
    load_classification,
    load_snippets,
    model_path,
    tokenise,
)
from hf_ls.files import write_atomically
from hf_ls.plots import write_plots
from hf_ls.report import CalibrationReport, CalibrationRow
from hf_ls.smoothing import Smoothing
from hf_ls.temperature import NoFiniteTemperature, bake_temperature, fit_temperature
from hf_ls.trainer import LabelSmoothingTrainer

REPORT = "calibration.json"
_SETTINGS = "settings.json"
_PREDICTIONS = "predictions.npz"  # written last: a run with it is complete
_TRAINING_SETTINGS = (
    *("label_smoothing_factor", "label_smoothing_convention", "label_smoothing_schedule", "label_smoothing_final_factor"),
    *(
        "label_smoothing_objective",
        "label_smoothing_objective_params",
        "label_smoothing_warmup_steps",
        "seed",
        "data_seed",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
    ),
    *("optim", "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("fp16", "bf16"),
)


class Predictions(NamedTuple):
    """Logits [n, K] and hard labels [n] of each evaluated split, and the run's logs: all that the report is made of."""

    logits: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    history: list[dict[str, Any]]


def finetune(config: Config) -> CalibrationReport | None:
    """Run one configuration and leave checkpoints, metrics, `calibration.json`, plots and a model card in its output_dir.

    Returns the report on the main process, None on the others and after a dry run.

    Raises: ValueError for settings, data or checkpoints which cannot give an honest result.
    """
    training = config.training
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError(
            "expected do_train, do_eval or do_predict, got none of them; say what to do, e.g. --do_train --do_eval --do_predict"
        )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is no device to pin for, and torch warns at every loader
    with training.main_process_first(desc="data"):
        data = load_data(config)
    tokenizer = AutoTokenizer.from_pretrained(
        model_path(config.model.model_name_or_path),
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    with training.main_process_first(desc="tokens"):
        tokens = tokenise(data.splits, tokenizer, config.data.max_length)
    if config.run.dry_run:
        model = load_model(config, data)
        _announce(f"dry run: {_sizes(tokens)}; {type(model).__name__}, {model.num_parameters():,} weights; settings are sound")
        return None
    _prepare_output(config)
    runs = {}
    if config.run.with_baseline:
        baseline = _with_training(
            config,
            label_smoothing_factor=0.0,
            label_smoothing_objective="smoothed_ce",
            label_smoothing_objective_params=None,
            output_dir=str(_folder(config) / "baseline"),
            push_to_hub=False,
        )
        runs["baseline"] = _run(baseline, data, tokens, tokenizer)
    runs[run_name(training)] = _run(config, data, tokens, tokenizer)
    return _report(config, data, runs) if training.should_save else None


def load_data(config: Config) -> ClassificationData:
    """The splits which the settings name, cut to `max_*_samples`, and a warning for test texts seen in training.

    Raises: ValueError as `load_classification`, and when most of the test split is the validation split.
    """
    settings = config.data
    if settings.dataset_name == EMBEDDED_DATASET:
        data = load_snippets(settings.snippet_sources)
    else:
        data = load_classification(
            settings.dataset_name,
            dataset_config=settings.dataset_config_name,
            files=settings.files,
            text_column=settings.text_column,
            text_pair_column=settings.text_pair_column,
            label_column=settings.label_column,
            validation_fraction=settings.validation_fraction,
            seed=config.training.data_seed or config.training.seed,
        )
    check_overlap(data.splits)
    limits = {"train": settings.max_train_samples, "validation": settings.max_eval_samples, "test": settings.max_predict_samples}
    cut = {split: part.select(range(min(len(part), limits.get(split) or len(part)))) for split, part in data.splits.items()}
    return replace(data, splits=DatasetDict(cut))


def load_model(config: Config, data: ClassificationData) -> Any:
    """The classifier with label names in its config, and adapters if asked for."""
    settings = config.model
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path(settings.model_name_or_path),
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        ignore_mismatched_sizes=settings.ignore_mismatched_sizes,
        id2label=dict(enumerate(data.label_names)),
        label2id={name: i for i, name in enumerate(data.label_names)},
        **settings.overrides,
    )
    if settings.peft == "none":
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout
    )
    return get_peft_model(model, lora)


def run_name(training: LabelSmoothingArguments) -> str:
    """The name of a run's row: what it trains on, "baseline" being the plain cross entropy."""
    if training.label_smoothing_objective != "smoothed_ce":
        return training.label_smoothing_objective
    return "smoothed" if training.label_smoothing_factor else "baseline"


def _with_training(config: Config, **changes: Any) -> Config:
    training = copy.copy(config.training)
    for name, value in changes.items():
        setattr(training, name, value)
    return replace(config, training=training)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings which decide the weights: a run resumes only with the same ones."""
    training = {name: getattr(config.training, name) for name in _TRAINING_SETTINGS}
    training["lr_scheduler_type"], training["optim"] = (
        SchedulerType(config.training.lr_scheduler_type).value,
        OptimizerNames(config.training.optim).value,
    )
    fields = {**asdict(config.model), **asdict(config.data), **training, "num_processes": PartialState().num_processes}
    return json.loads(json.dumps(fields, default=str))


def _prepare_output(config: Config) -> None:
    """Refuse to mix two runs in one folder, and note the settings of this one.

    Raises: ValueError for an earlier run in the folder, or for resuming one with other settings.
    """
    training, folder = config.training, _folder(config)
    earlier = sorted(str(path) for name in (_SETTINGS, REPORT, "checkpoint-*") for path in folder.glob(name))
    settings = settings_of(config)
    if earlier and not training.resume_from_checkpoint:
        if not config.run.overwrite_output_dir:
            raise ValueError(
                f"expected an output_dir without an earlier run, got {earlier[0]}; use --resume_from_checkpoint last, "
                "--overwrite_output_dir, or another output_dir"
            )
        PartialState().wait_for_everyone()  # every process has looked before the first one deletes
        if training.should_save:
            shutil.rmtree(folder)
    elif (folder / _SETTINGS).is_file():
        saved = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        different = [
            f"{name}: {saved.get(name)} then, {value} now" for name, value in settings.items() if saved.get(name) != value
        ]
        if different:
            raise ValueError(
                f"expected the settings of the run in {folder}, got {'; '.join(different)}; restore them or start afresh"
            )
    PartialState().wait_for_everyone()
    if training.should_save:
        write_atomically(folder / _SETTINGS, json.dumps(settings, indent=1))


def _run(config: Config, data: ClassificationData, tokens: DatasetDict, tokenizer: Any) -> Predictions:
    """Train one model (or take up where it stopped), evaluate it, save it; its predictions on validation and test."""
    training, patience, folder = config.training, config.run.early_stopping_patience, _folder(config)
    if training.resume_from_checkpoint and (folder / _PREDICTIONS).is_file():
        _announce(f"{folder} is complete: its predictions are used as they are")
        return _load_predictions(folder)
    set_seed(training.seed)
    callbacks: list[Any] = [CheckpointMark(smoothing_of(training), training.save_total_limit)]
    training.save_total_limit = None  # the callback deletes old checkpoints once the new one is complete
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    trainer = LabelSmoothingTrainer(
        model=load_model(config, data),
        args=training,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if training.do_train:
        result = trainer.train(resume_from_checkpoint=_checkpoint(training, folder, trainer.smoothing))
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    logits, labels = {}, {}
    for split, prefix, wanted in (("validation", "eval", training.do_eval), ("test", "test", training.do_predict)):
        if wanted and split in tokens:
            output = trainer.predict(tokens[split], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, output.metrics)
            trainer.save_metrics(prefix, output.metrics)
            logits[split], labels[split] = np.asarray(output.predictions, np.float64), np.asarray(output.label_ids)
    trainer.save_model()
    predictions = Predictions(logits, labels, trainer.state.log_history)
    if training.should_save:
        _save_predictions(folder, predictions)
    return predictions


def _checkpoint(training: LabelSmoothingArguments, folder: Path, smoothing: Smoothing) -> str | None:
    wanted = training.resume_from_checkpoint
    checkpoint = last_complete_checkpoint(folder) if wanted == "last" else wanted
    if checkpoint is None and wanted == "last":
        _announce(f"no complete checkpoint in {folder}: training starts from the first step")
    if checkpoint is not None:
        check_resumable(checkpoint, smoothing)
        _announce(f"resuming from {checkpoint}")
    return checkpoint


def _save_predictions(folder: Path, predictions: Predictions) -> None:
    arrays = {f"logits_{split}": value for split, value in predictions.logits.items()}
    arrays |= {f"labels_{split}": value for split, value in predictions.labels.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, history=np.array(json.dumps(predictions.history)), **arrays)  # type: ignore[arg-type]
    write_atomically(folder / _PREDICTIONS, buffer.getvalue())


def _load_predictions(folder: Path) -> Predictions:
    with np.load(folder / _PREDICTIONS, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    part = {kind: {n.removeprefix(kind): v for n, v in arrays.items() if n.startswith(kind)} for kind in ("logits_", "labels_")}
    return Predictions(part["logits_"], part["labels_"], json.loads(str(arrays["history"])))


def _report(config: Config, data: ClassificationData, runs: dict[str, Predictions]) -> CalibrationReport | None:
    """Rows with and without temperature on test (validation if there is no test), and all files made of them."""
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
                _announce(f"{name}: no row with temperature, {error}")
                continue
            rows.append(CalibrationRow.from_logits(f"{name} + temperature", epsilon, temperature, logits, labels))
            if config.run.bake_temperature and run is main:
                published = rows[-1].name
                _bake(config, temperature)
    report = CalibrationReport(
        task=config.run.task,
        model_name=training.hub_model_id or _folder(config).name,
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
    folder = _folder(config)
    report.save(folder / REPORT)
    console = Console()
    console.print(report.table(console.width))
    console.print(report.regime(), report.verdict(), sep="\n", markup=False, highlight=False)
    write_plots(report, folder / "plots")
    write_card(report, folder)
    console.print(f"Report, plots and card: {folder}", markup=False, highlight=False, soft_wrap=True)
    return report


def _bake(config: Config, temperature: float) -> None:
    folder = _folder(config)
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


def _folder(config: Config) -> Path:
    return Path(config.training.output_dir or "trainer_output")


def _sizes(tokens: DatasetDict) -> str:
    return ", ".join(f"{len(part):,} {split}" for split, part in tokens.items())


def _announce(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)
