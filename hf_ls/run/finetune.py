"""The main job: train with and without smoothing, calibrate, report.

Owns: the order of the steps of one run and which files it leaves.
Does not own: settings (`config`), data and models (`loading`), the loss (`trainer`), evaluation (`outcome`), files for readers
(`publish`).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, SchedulerType, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from hf_ls.common.errors import read_json
from hf_ls.common.files import TEMPORARY_FOLDER, move, tell, temporary_name, write_atomically
from hf_ls.common.privacy import token_in_environment
from hf_ls.data.sequences import token_counts
from hf_ls.losses.smoothing import Smoothing
from hf_ls.report.calibration_report import REPORT, SETTINGS, CalibrationReport
from hf_ls.report.card import check_card
from hf_ls.report.pictures import PENULTIMATE, penultimate
from hf_ls.run.checkpoint import CheckpointMark, check_resumable, checkpoints, last_complete_checkpoint
from hf_ls.run.config import Config
from hf_ls.run.launch import announce
from hf_ls.run.loading import Data, check_tokens, load_data, load_distillation_teacher, load_model, load_tokenizer, load_tokens
from hf_ls.run.manifest import Manifest
from hf_ls.run.outcome import OUTCOME, Outcome, evaluate_classes, evaluate_tokens, run_name, write_metrics
from hf_ls.run.publish import check_push, folder_of, publish, push
from hf_ls.run.tasks import TASKS
from hf_ls.trainer.arguments import LabelSmoothingArguments, smoothing_of

_TRAINING_SETTINGS = (
    *("label_smoothing_factor", "label_smoothing_convention", "label_smoothing_schedule", "label_smoothing_final_factor"),
    *("label_smoothing_warmup_steps", "label_smoothing_objective", "label_smoothing_objective_params", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "num_train_epochs"),
    *("distillation_teacher", "distillation_alpha", "distillation_temperature", "mixup_alpha", "mixup_per"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "fp16", "bf16"),
)


def finetune(config: Config, callbacks: Sequence[Any] = ()) -> CalibrationReport | None:
    """Run one configuration and leave checkpoints, metrics, `calibration.json`, plots and a model card in its output_dir.

    Returns the report on the main process, None on the others and after a dry run.

    Raises: ValueError for settings, data or checkpoints which cannot give an honest result.
    """
    with token_in_environment(config.training):
        return _finetune(config, callbacks)


def _finetune(config: Config, callbacks: Sequence[Any]) -> CalibrationReport | None:
    training = config.training
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError(
            "expected do_train, do_eval or do_predict, got none of them; say what to do, e.g. --do_train --do_eval --do_predict"
        )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is no device to pin for, and torch warns at every loader
    with training.main_process_first(desc="data"):
        data = load_data(config)
    tokenizer = load_tokenizer(config)
    with training.main_process_first(desc="tokens"):
        tokens = load_tokens(config, data, tokenizer)
    # Before anything is written: a model which cannot be had must not cost an earlier run, or leave a folder behind.
    model = load_model(config, data, tokenizer)
    check_tokens(tokens, tokenizer, model)
    load_distillation_teacher(config, tokenizer)
    if config.run.dry_run:
        announce(f"dry run: {_sizes(tokens)}; {type(model).__name__}, {model.num_parameters():,} weights; settings are sound")
        return None
    manifest = _check_output(config, model)
    del model
    with _recorded(config, manifest):
        runs = _runs(config, data, tokens, tokenizer, callbacks, manifest)
        if not training.should_save:
            return None
        report = publish(config, data, runs)
        if training.push_to_hub:
            push(config, manifest.files())
        return report


def _runs(
    config: Config, data: Data, tokens: DatasetDict, tokenizer: Any, callbacks: Sequence[Any], manifest: Manifest
) -> dict[str, Outcome]:
    runs = {}
    if config.run.with_baseline:
        baseline = _with_training(
            config,
            label_smoothing_factor=0.0,
            label_smoothing_objective="smoothed_ce",
            label_smoothing_objective_params=None,
            distillation_teacher=None,
            mixup_alpha=0.0,
            output_dir=str(folder_of(config) / "baseline"),
            push_to_hub=False,
        )
        runs["baseline"] = _run(baseline, data, tokens, tokenizer, manifest, callbacks)
    runs[run_name(config.training)] = _run(config, data, tokens, tokenizer, manifest, callbacks)
    return runs


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


def _check_output(config: Config, model: Any) -> Manifest:
    """Refuse to mix two runs in one folder, before anything is written; what an earlier run there has written.

    Raises: ValueError for an earlier run in the folder, for resuming one with other settings or of another model, for a README.md
    written by hand, and for deleting what is not the run's.
    """
    training, folder = config.training, folder_of(config)
    check_card(folder)
    manifest, settings = Manifest(folder), settings_of(config)
    known = [*(folder / name for name in (SETTINGS, REPORT)), *checkpoints(folder).values()]
    earlier = sorted({str(path) for path in known if path.exists()} | {str(folder / name) for name in manifest.files()})
    if training.push_to_hub and training.should_save:
        check_push(config)
    if config.run.overwrite_output_dir and not training.resume_from_checkpoint:
        _check_deletable(config, folder)
        manifest.check_alone()
    elif earlier and not training.resume_from_checkpoint:
        raise ValueError(
            f"expected an output_dir without an earlier run, got {earlier[0]}; use --resume_from_checkpoint last, "
            "--overwrite_output_dir, or another output_dir"
        )
    elif earlier and not (folder / SETTINGS).is_file():
        raise ValueError(
            f"expected {SETTINGS} beside {earlier[0]}, got none: that run was being deleted, or is of another program; use "
            "--overwrite_output_dir or another output_dir"
        )
    elif earlier:
        saved = read_json(folder / SETTINGS, "start afresh in another output_dir")
        different = [
            f"{name}: {saved.get(name)} then, {value} now" for name, value in settings.items() if saved.get(name) != value
        ]
        if different:
            raise ValueError(
                f"expected the settings of the run in {folder}, got {'; '.join(different)}; restore them or start afresh"
            )
    if training.resume_from_checkpoint not in (None, "last"):
        check_resumable(training.resume_from_checkpoint, smoothing_of(training), model)
    PartialState().wait_for_everyone()  # every process has looked before the first one writes
    return manifest


@contextmanager
def _recorded(config: Config, manifest: Manifest) -> Iterator[None]:
    """Hold the folder of the run, delete the earlier run if that is wanted, and note the settings of this one.

    Raises: ValueError on all processes while another run works in the folder.
    """
    training, refused = config.training, None
    with ExitStack() as stack:
        if training.should_save:
            try:
                stack.enter_context(manifest.recording())
                if config.run.overwrite_output_dir and not training.resume_from_checkpoint:
                    manifest.delete(first=SETTINGS)  # nobody may resume a half-deleted run
                write_atomically(manifest.folder / SETTINGS, json.dumps(settings_of(config), indent=1))
            except ValueError as error:
                refused = str(error)
        reasons = [reason for reason in gather_object([refused]) if reason]
        if reasons:
            raise ValueError(reasons[0])
        yield


def _check_deletable(config: Config, folder: Path) -> None:
    """Refuse to delete in a folder which is a link, in which somebody works, or from which this run reads.

    Raises: ValueError.
    """
    if folder.is_symlink():
        raise ValueError(f"expected a folder to delete an earlier run in, got the link {folder}; give the folder it leads to")
    names = [*config.data.files.values(), config.model.model_name_or_path, config.model.tokenizer_name, config.data.dataset_name]
    read = [Path(name) for name in [*names, config.training.distillation_teacher] if name and Path(name).exists()]
    for path in (Path.cwd(), Path.home(), *read):  # `/` and the folders above these too
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"expected a folder of a run alone to delete, got {folder} with {path} in it; give another output_dir"
            )


def _run(
    config: Config, data: Data, tokens: DatasetDict, tokenizer: Any, manifest: Manifest, more: Sequence[Any] = ()
) -> Outcome:
    """Train one model (or take up where it stopped), evaluate it, save it."""
    # The Trainer would push all that is in the folder, whosever it is; `push` sends what may leave, once all is written.
    training, patience, folder, task = (
        _with_training(config, push_to_hub=False).training,
        config.run.early_stopping_patience,
        folder_of(config),
        TASKS[config.run.task],
    )
    if training.resume_from_checkpoint and (folder / OUTCOME).is_file():
        announce(f"{folder} is complete: its outcome is used as it is")
        return Outcome.load(folder)
    set_seed(training.seed)
    callbacks: list[Any] = [CheckpointMark(smoothing_of(training), training.save_total_limit, manifest), *more]
    training.save_total_limit = None  # the callback deletes old checkpoints once the new one is complete
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    model = load_model(config, data, tokenizer)
    trainer = task.trainer(
        model=model,
        args=training,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=task.collator(tokenizer, model),
        processing_class=tokenizer,
        callbacks=callbacks,
        teacher=load_distillation_teacher(config, tokenizer),
    )
    if task.per_token and not task.has_classes:
        trainer.token_counts = token_counts(tokens["train"], model.config.get_text_config().vocab_size)
    if training.do_train:
        result = trainer.train(resume_from_checkpoint=_checkpoint(training, folder, trainer.smoothing, model))
        write_metrics(trainer, "train", result.metrics)
        if trainer.is_world_process_zero():
            write_atomically(folder / TRAINER_STATE_NAME, json.dumps(_state(trainer), indent=2, sort_keys=True) + "\n")
    if task.per_token:
        outcome = evaluate_tokens(trainer, tokens, data.splits, config.run.text_metrics, has_classes=task.has_classes)
    else:
        outcome = evaluate_classes(trainer, tokens)
    _save_model(trainer, folder)
    if config.training.push_to_hub and outcome.split is None:
        trainer.create_model_card(model_name=(training.hub_model_id or folder.absolute().name).split("/")[-1])
    if training.should_save:
        if task.has_classes and not task.per_token and outcome.split is not None:
            _save_penultimate(trainer, tokens[outcome.split], folder)
        outcome.save(folder)
    return outcome


def _state(trainer: Any) -> dict[str, Any]:
    """The Trainer's state, the best checkpoint by its name."""
    best = trainer.state.best_model_checkpoint
    return asdict(trainer.state) | {"best_model_checkpoint": Path(best).name if best else None}


def _save_model(trainer: Any, folder: Path) -> None:
    """As `Trainer.save_model`, but each file whole: the Trainer and peft write configs, tokenizers and a README.md in place."""
    names = [temporary_name(folder)]
    broadcast_object_list(names)
    made = names[0]
    if trainer.args.should_save:
        tell(made, TEMPORARY_FOLDER)
        made.mkdir()
    PartialState().wait_for_everyone()
    trainer.save_model(str(made), _internal_call=True)
    PartialState().wait_for_everyone()
    if trainer.args.should_save:
        if (folder / "README.md").exists():  # perhaps written by hand
            (made / "README.md").unlink(missing_ok=True)
        for file in sorted(path for path in made.rglob("*") if path.is_file()):
            move(file, folder / file.relative_to(made))
        shutil.rmtree(made)


def _save_penultimate(trainer: Any, tokens: Dataset, folder: Path) -> None:
    """What the pictures of the classifier need, from the first 2,000 examples; sharded models and adapted heads have none."""
    wanted = ("input_ids", "attention_mask", "token_type_ids", "labels", "label")
    columns = [name for name in wanted if name in tokens.column_names]
    rows = tokens.select(range(min(len(tokens), 2000))).select_columns(columns)
    try:
        found = penultimate(trainer.model, DataLoader(rows, trainer.args.eval_batch_size, collate_fn=trainer.data_collator))
        found.save(folder / PENULTIMATE)
    except ValueError as error:
        announce(f"no picture of the classes: {error}")


def _checkpoint(training: LabelSmoothingArguments, folder: Path, smoothing: Smoothing, model: Any) -> str | None:
    wanted = training.resume_from_checkpoint
    checkpoint = last_complete_checkpoint(folder) if wanted == "last" else wanted
    if checkpoint is None and wanted == "last":
        announce(f"no complete checkpoint in {folder}: training starts from the first step")
    if checkpoint is not None:
        check_resumable(checkpoint, smoothing, model)
        announce(f"resuming from {checkpoint}")
    return checkpoint


def _sizes(tokens: DatasetDict) -> str:
    return ", ".join(f"{len(part):,} {split}" for split, part in tokens.items())
