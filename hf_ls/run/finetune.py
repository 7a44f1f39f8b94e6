"""The main job: load, train with and without smoothing, calibrate, report, publish. `finetune` is the order of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_ls.common.privacy import token_in_environment
from hf_ls.report.calibration_report import BASELINE, CalibrationReport
from hf_ls.report.facts import SmoothingFacts
from hf_ls.run.config import Config
from hf_ls.run.launch import announce
from hf_ls.run.loading import Loaded, load, looked_at
from hf_ls.run.manifest import FOLDER, Manifest
from hf_ls.run.outcome import ANSWERS, OUTCOME, Outcome, answer, evaluate_classes, evaluate_tokens, run_name
from hf_ls.run.output import check_output, recorded
from hf_ls.run.publish import folder_of, publish, push
from hf_ls.run.tasks import TASKS
from hf_ls.run.training import checkpoint_of, rehearse, save_model, save_penultimate, train, with_training
from hf_ls.trainer.arguments import techniques_of, without_smoothing

After = Callable[[Any, Loaded, Outcome], None]


def finetune(config: Config, callbacks: Sequence[Any] = (), after: After | None = None) -> CalibrationReport | None:
    """Run one configuration and leave checkpoints, metrics, `calibration.json`, plots and a model card in its output_dir.

    callbacks: of the Trainer. after: called with the Trainer, the data and the outcome of each run once it is evaluated.

    Returns the report on the main process, None on the others and after a dry run.

    Raises: ValueError for settings, data or checkpoints which cannot give an honest result; Stopped after SIGTERM or SIGINT in
    training.
    """
    _check_asked(config)
    with token_in_environment(config.training):
        loaded = load(config)
        # Before anything is written: what cannot be had or made must not cost an earlier run, or leave a folder behind.
        model = rehearse(config, loaded)
        manifest = check_output(config, model)
        if config.run.dry_run:
            for line in looked_at(config, loaded):
                announce(line)
            for one in _planned(config):
                if _finished(one) is None and one.training.do_train:
                    checkpoint_of(one, model)
            announce(f"dry run: {loaded.sizes}; {type(model).__name__}, {model.num_parameters():,} weights; settings are sound")
            return None
        del model
        with recorded(config, manifest):
            runs, planned = {}, list(_planned(config))
            for i, one in enumerate(planned, 1):
                name = run_name(one.training)
                if len(planned) > 1:
                    announce(
                        f"\n{i}/{len(planned)} {name} (ε = {SmoothingFacts(one.training.label_smoothing_factor).epsilon_text})"
                    )
                runs[name] = _train_and_calibrate(one, loaded, manifest, callbacks, after)
            if not config.training.should_save:
                return None
            folders = {run_name(one.training): folder_of(one) for one in planned}
            report = publish(planned[-1], loaded.data, runs, folders, loaded.form, loaded.questions)
            if config.training.push_to_hub:
                push(config, manifest.files(), folders.values())
            return report


def _check_asked(config: Config) -> None:
    training = config.training
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError(
            "expected do_train, do_eval or do_predict, got none of them; say what to do, e.g. --do_train --do_eval --do_predict"
        )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is no device to pin for, and torch warns at every loader


def _planned(config: Config) -> Iterator[Config]:
    """The settings of each run, the baseline first; before one on soft labels, label smoothing on the hard ones."""
    training = config.training
    if config.run.with_baseline:
        plain = replace(config, training=without_smoothing(training))
        yield with_training(plain, output_dir=str(folder_of(config) / BASELINE), push_to_hub=False)
    if not config.trains_on_soft_labels:
        yield config
        return
    if config.run.with_baseline and techniques_of(training):
        yield with_training(config, output_dir=str(folder_of(config) / run_name(training)), push_to_hub=False)
    both = training.allow_combined_softening
    kept = training if both else without_smoothing(training)
    yield with_training(replace(config, training=kept), label_smoothing_soft_labels=True)


def _finished(config: Config) -> Outcome | None:
    """What this run left when it was complete, where a resumed one asks."""
    folder = folder_of(config)
    found = Outcome.load(folder) if config.training.resume_from_checkpoint and (folder / OUTCOME).is_file() else None
    PartialState().wait_for_everyone()  # all have looked before the main one publishes, which takes the file away to bake
    return found


def _train_and_calibrate(
    config: Config, loaded: Loaded, manifest: Manifest, callbacks: Sequence[Any], after: After | None
) -> Outcome:
    """Train one model (or take up where it stopped), evaluate it with and without temperature, save it."""
    training, folder, task = config.training, folder_of(config), TASKS[config.run.task]
    if (finished := _finished(config)) is not None:
        announce(f"{folder} is complete: its outcome is used as it is")
        return finished
    if training.should_save and folder != manifest.folder and not folder.exists():
        manifest.add(folder, FOLDER)  # the Trainer makes it in silence
    trainer = train(config, loaded, manifest, callbacks)
    if task.per_token:
        texts = loaded.data.splits
        outcome = evaluate_tokens(trainer, loaded.tokens, texts, config.run.text_metrics, has_classes=task.has_classes)
    else:
        outcome = evaluate_classes(trainer, loaded.tokens)
    if loaded.questions is not None and training.do_predict:
        apart = folder / ANSWERS
        with trainer.compute_loss_context_manager():
            answered = answer(
                trainer.model, loaded.tokenizer, loaded.questions, config.questions, apart if training.should_save else None,
                run=run_name(training), epsilon=training.label_smoothing_factor if training.do_train else None,
                batch_size=training.per_device_eval_batch_size,
            )  # fmt: skip
        if training.should_save:
            answered.save(apart)
    if after is not None:
        after(trainer, loaded, outcome)
    save_model(trainer, folder)
    if training.push_to_hub and outcome.split is None:
        trainer.create_model_card(model_name=Path(training.hub_model_id or folder.absolute()).name)
    if training.should_save:
        if task.has_classes and not task.per_token and outcome.split is not None:
            save_penultimate(trainer, loaded.tokens[outcome.split], folder)
        outcome.save(folder)
    return outcome
