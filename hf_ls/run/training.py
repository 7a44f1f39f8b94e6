"""One model of a run: its Trainer, a rehearsal of the first step, the training or its resumption, and the files of the model."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_ls.answers.callback import AnswerCallback
from hf_ls.answers.scoring import check_scorable
from hf_ls.common.errors import settling
from hf_ls.common.files import TEMPORARY_FOLDER, move, tell, temporary_name, write_atomically
from hf_ls.data.sequences import token_counts
from hf_ls.data.splitting import longest_first
from hf_ls.losses.priors import count_labels
from hf_ls.report.pictures import PENULTIMATE, drawn_rows, penultimate
from hf_ls.run.checkpoint import CheckpointMark, check_resumable, last_complete_checkpoint
from hf_ls.run.config import Config
from hf_ls.run.launch import announce, silenced
from hf_ls.run.loading import Loaded, check_tokens, load_distillation_teacher, load_model
from hf_ls.run.manifest import Manifest
from hf_ls.run.outcome import LastEvaluation, write_metrics
from hf_ls.run.publish import folder_of, list_logs
from hf_ls.run.stopping import EarlyStopping, StopOnSignal, check_trained
from hf_ls.run.tasks import TASKS
from hf_ls.trainer.arguments import smoothing_of


def with_training(config: Config, **changes: Any) -> Config:
    """The settings with other ones of the Trainer; the given ones are not changed."""
    training = copy.copy(config.training)
    for name, value in changes.items():
        setattr(training, name, value)
    return replace(config, training=training)


def make_trainer(config: Config, loaded: Loaded, callbacks: Sequence[Any] = (), *, quiet: bool = False) -> Any:
    """The Trainer of the task with a fresh model, always the same for the same seed; quiet: it was loaded and reported before.

    It does not delete checkpoints, which `CheckpointMark` does once the new one is complete; not take SIGTERM, which
    `StopOnSignal` does; and not push all that is in the folder, whosever it is: `push` sends what may leave.
    """
    task, tokens, tokenizer = TASKS[config.run.task], loaded.tokens, loaded.tokenizer
    set_seed(config.training.seed)
    with silenced() if quiet else nullcontext():
        model = load_model(config, loaded.data, tokenizer)
    balanced = config.run.class_weight == "balanced"
    last = None if task.per_token else LastEvaluation()
    settings = with_training(config, save_total_limit=None, enable_jit_checkpoint=False, push_to_hub=False).training
    trainer = task.trainer(
        model=model,
        args=task.arguments(settings, config.data),
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"].select(longest_first(tokens["validation"])),  # the metrics know no order
        data_collator=task.collator(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=last,
        callbacks=[*callbacks, *([] if last is None else [last])],
        teacher=load_distillation_teacher(config, tokenizer),
        class_weight=balanced_weights(tokens["train"], model.config.num_labels) if balanced else None,
    )
    if task.per_token and not task.has_classes:
        trainer.token_counts = token_counts(tokens["train"], model.config.get_text_config().vocab_size)
    return trainer


def balanced_weights(train: Dataset, num_classes: int) -> torch.Tensor:
    """n / (K·n_k) for each of the K classes with labels, float32 [K], so that each weighs alike; 1 for one without."""
    counts = count_labels(train.select_columns(["labels"]).with_format("numpy"), num_classes)
    weights = counts.sum() / ((counts > 0).sum() * counts.clamp_min(1))
    return torch.where(counts > 0, weights, 1.0).float()


def rehearse(config: Config, loaded: Loaded) -> Any:
    """Do all that comes before the first step, and write nothing; the model.

    Raises: ValueError for models which cannot be had or made, tokens which are not the model's, rows of which no batch can be
    made, and settings which the optimizer, the scheduler or a reporter refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = with_training(config, output_dir=folder)
        with settling("see what it says, and change the model, the tokenizer or the setting"):
            trainer = make_trainer(elsewhere, loaded)
            check_tokens(loaded.tokens, loaded.tokenizer, trainer.model)
            for questions in loaded.questions.splits.values() if loaded.questions is not None else ():
                check_scorable(questions, loaded.tokenizer, config.questions.option_prefix)
            rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
            trainer.data_collator([rows[i] for i in range(min(2, len(rows)))])
            if config.training.do_train and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
                trainer.create_optimizer_and_scheduler(num_training_steps=1)
    return trainer.model


def train(config: Config, loaded: Loaded, manifest: Manifest, more: Sequence[Any] = ()) -> Any:
    """The Trainer with the trained model: from the first step, from a checkpoint, or as it was loaded without do_train.

    Raises: Stopped after SIGTERM or SIGINT; ValueError for a checkpoint which cannot be resumed, and for an end which is neither
    that of the planned steps nor of early stopping.
    """
    training, folder, patience = config.training, folder_of(config), config.run.early_stopping_patience
    stop = StopOnSignal()
    callbacks = [stop, CheckpointMark(smoothing_of(training), training.save_total_limit, manifest), *more]
    trainer = make_trainer(config, loaded, callbacks, quiet=True)  # the rehearsal has loaded it
    if loaded.questions is not None and "validation" in loaded.questions.splits:
        settings = config.questions
        answers = AnswerCallback(
            trainer, loaded.questions.splits["validation"], option_prefix=settings.option_prefix,
            length_normalisation=settings.length_normalisation, batch_size=training.per_device_eval_batch_size,
        )  # fmt: skip
        trainer.add_callback(answers)
    if patience is not None:
        trainer.add_callback(EarlyStopping(patience))  # behind all which add metrics
    if training.do_train:
        list_logs(training, manifest)
        result = trainer.train(resume_from_checkpoint=checkpoint_of(config, trainer.model))
        check_trained(trainer, stop)
        write_metrics(trainer, "train", result.metrics)
        if trainer.is_world_process_zero():
            write_atomically(folder / TRAINER_STATE_NAME, json.dumps(_state(trainer), indent=2, sort_keys=True) + "\n")
    return trainer


def checkpoint_of(config: Config, model: Any) -> str | None:
    """What to resume from; a checkpoint given by name was checked before anything was written.

    Raises: ValueError for a last checkpoint which cannot be resumed.
    """
    checkpoint, folder = config.training.resume_from_checkpoint, folder_of(config)
    if checkpoint == "last":
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is None:
            announce(f"no complete checkpoint in {folder}: training starts from the first step")
            return None
        check_resumable(checkpoint, smoothing_of(config.training), model)
    if checkpoint is not None:
        announce(f"resuming from {checkpoint}")
    return checkpoint


def _state(trainer: Any) -> dict[str, Any]:
    """The Trainer's state, the best checkpoint by its name."""
    best = trainer.state.best_model_checkpoint
    return asdict(trainer.state) | {"best_model_checkpoint": Path(best).name if best else None}


def save_model(trainer: Any, folder: Path) -> None:
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


def save_penultimate(trainer: Any, tokens: Dataset, folder: Path) -> None:
    """What the pictures of the classifier need, of the examples which they draw; sharded models and adapted heads have none."""
    drawn = drawn_rows(tokens["labels"])
    if not len(drawn):
        return
    wanted = ("input_ids", "attention_mask", "token_type_ids", "labels")
    rows = tokens.select(drawn).select_columns([name for name in wanted if name in tokens.column_names])
    rows = rows.select(longest_first(rows))
    try:
        found = penultimate(trainer.model, DataLoader(rows, trainer.args.eval_batch_size, collate_fn=trainer.data_collator))
        found.save(folder / PENULTIMATE)
    except ValueError as error:
        announce(f"no picture of the classes: {error}")
