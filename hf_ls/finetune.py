"""The main job: train with and without smoothing, calibrate, report.

Owns: the order of the steps of one run and which files it leaves.
Does not own: settings (`config`), data (`data`), the loss (`trainer`), what is made of the predictions (`publish`).
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    SchedulerType,
    set_seed,
)
from transformers.training_args import OptimizerNames

from hf_ls.arguments import LabelSmoothingArguments, smoothing_of
from hf_ls.checkpoint import CheckpointMark, check_resumable, last_complete_checkpoint
from hf_ls.config import Config
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
from hf_ls.publish import (
    PREDICTIONS,
    REPORT,
    Predictions,
    announce,
    folder_of,
    load_predictions,
    publish,
    run_name,
    save_predictions,
)
from hf_ls.report import CalibrationReport
from hf_ls.smoothing import Smoothing
from hf_ls.trainer import LabelSmoothingTrainer

_SETTINGS = "settings.json"
_TRAINING_SETTINGS = (
    *("label_smoothing_factor", "label_smoothing_convention", "label_smoothing_schedule", "label_smoothing_final_factor"),
    *("label_smoothing_warmup_steps", "label_smoothing_objective", "label_smoothing_objective_params", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "num_train_epochs"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "fp16", "bf16"),
)


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
        announce(f"dry run: {_sizes(tokens)}; {type(model).__name__}, {model.num_parameters():,} weights; settings are sound")
        return None
    _prepare_output(config)
    runs = {}
    if config.run.with_baseline:
        baseline = _with_training(
            config,
            label_smoothing_factor=0.0,
            label_smoothing_objective="smoothed_ce",
            label_smoothing_objective_params=None,
            output_dir=str(folder_of(config) / "baseline"),
            push_to_hub=False,
        )
        runs["baseline"] = _run(baseline, data, tokens, tokenizer)
    runs[run_name(training)] = _run(config, data, tokens, tokenizer)
    return publish(config, data, runs) if training.should_save else None


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
    training, folder = config.training, folder_of(config)
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
    training, patience, folder = config.training, config.run.early_stopping_patience, folder_of(config)
    if training.resume_from_checkpoint and (folder / PREDICTIONS).is_file():
        announce(f"{folder} is complete: its predictions are used as they are")
        return load_predictions(folder)
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
        save_predictions(folder, predictions)
    return predictions


def _checkpoint(training: LabelSmoothingArguments, folder: Path, smoothing: Smoothing) -> str | None:
    wanted = training.resume_from_checkpoint
    checkpoint = last_complete_checkpoint(folder) if wanted == "last" else wanted
    if checkpoint is None and wanted == "last":
        announce(f"no complete checkpoint in {folder}: training starts from the first step")
    if checkpoint is not None:
        check_resumable(checkpoint, smoothing)
        announce(f"resuming from {checkpoint}")
    return checkpoint


def _sizes(tokens: DatasetDict) -> str:
    return ", ".join(f"{len(part):,} {split}" for split, part in tokens.items())
