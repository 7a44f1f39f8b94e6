"""From the outcomes of runs to what a reader sees: the report, its plots and its card, what is uploaded, a baked temperature."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from rich.console import Console
from transformers import SchedulerType
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_ls.answers.reading import QuestionData
from hf_ls.calibration.temperature import bake_folder
from hf_ls.common.errors import uploading
from hf_ls.common.files import write_atomically
from hf_ls.common.privacy import TEXTS, local_name, paths_here, without_paths
from hf_ls.common.text import hub_id, one_line
from hf_ls.data.classification import EMBEDDED_DATASET, ClassificationData
from hf_ls.data.conversations import ChatFormat
from hf_ls.data.g2p import EMBEDDED_G2P
from hf_ls.data.sequences import SequenceData
from hf_ls.metrics.paired import differences
from hf_ls.report.build import posthoc, write_report_files
from hf_ls.report.calibration_report import SETTINGS, CalibrationReport, package_versions
from hf_ls.report.card_metadata import BENCHMARKS
from hf_ls.report.facts import DatasetFacts, SmoothingFacts, TrainingFacts
from hf_ls.report.pictures import PENULTIMATE, Penultimate, write_pictures
from hf_ls.report.plots import write_plots
from hf_ls.report.sentences import regime, verdict, warnings
from hf_ls.report.table import more_tables, table
from hf_ls.run.config import Config
from hf_ls.run.launch import announce
from hf_ls.run.manifest import CHECKPOINT, Manifest
from hf_ls.run.outcome import ANSWERS, DRAWS, GENERATIONS, OUTCOME, PREDICTIONS, Outcome, kept_predictions
from hf_ls.run.tasks import TASKS
from hf_ls.trainer.arguments import LabelSmoothingArguments, criterion_of, smoothing_of, techniques_of
from hf_ls.trainer.criterion import ADAPTIVE

_LOGS = "runs"  # where TensorBoard's callback of the Trainer writes


def folder_of(config: Config) -> Path:
    """The folder of a run."""
    return Path(config.training.output_dir or "trainer_output")


def publish(
    config: Config,
    data: ClassificationData | SequenceData,
    runs: dict[str, Outcome],
    folders: Mapping[str, Path],
    form: ChatFormat | None = None,
    questions: QuestionData | None = None,
) -> CalibrationReport | None:
    """One report of all runs and all files made of it; None when nothing was evaluated. folders: of each run; form: of
    conversations; questions: whose answers the runs have left.

    Raises: ValueError for adapters with `bake_temperature`, and as `write_card`.
    """
    training, task, base = config.training, TASKS[config.run.task], config.model.model_name_or_path
    published, main = list(runs.items())[-1]
    if main.split is None:
        return None
    tempered = next((row for row in main.rows if row.tempered), None)
    if config.run.bake_temperature and tempered is not None:
        published = tempered.name
        _bake(config, tempered.temperature)
    report = CalibrationReport(
        task=task.hub_task,
        model_name=training.hub_model_id or folder_of(config).name,
        base_model=None if config.model.model_type else base if hub_id(base) else local_name(base),
        dataset=_dataset_facts(config, data, form, main),
        label_names=list(data.label_names),
        smoothing=_smoothing_facts(training, main.num_classes, over="classes" if task.has_classes else "vocabulary"),
        rows=[row for run in runs.values() for row in run.rows],
        training=_training_facts(config, runs) if training.do_train else None,
        history={name: run.history for name, run in runs.items()},
        versions=package_versions(),
        published=published,
        differences=differences({name: draws for run in runs.values() for name, draws in run.draws.items()}),
        hub=config.card.hub,
    )
    folder = folder_of(config)
    if questions is not None and (answered := _answered(config, report, questions, folders)) is not None:
        report = replace(report, answered=answered)
        write_plots(answered, folder / ANSWERS / "plots")
    pictures = pictures_of(report, folders, folder / "plots")
    report = replace(report, pictures=[path.name for path in pictures])
    written = write_report_files(report, folder)
    show_plots(training, sorted({*pictures, *(path for path in written if path.suffix == ".png")}))
    console = Console()
    console.print(table(report, console.width))
    for found in more_tables(report):
        console.print(found)
    console.print(regime(report), verdict(report), sep="\n", markup=False, highlight=False)
    for text in warnings(report):
        console.print(f"Warning: {text}", markup=False, highlight=False)
    console.print(f"Report, plots and card: {folder}", markup=False, highlight=False, soft_wrap=True)
    return report


def _answered(
    config: Config, report: CalibrationReport, questions: QuestionData, folders: Mapping[str, Path]
) -> CalibrationReport | None:
    """A report on the answers of the same runs, as `evaluate` makes it of one model; None where none were asked for."""
    if not config.training.do_predict:
        return None
    runs = {name: Outcome.load(folder / ANSWERS) for name, folder in folders.items()}
    main, scored = list(runs.values())[-1], kept_predictions(list(folders.values())[-1] / ANSWERS)
    files = config.questions.files
    data = DatasetFacts(Path(files["test"]).name) if files else replace(report.dataset, n_sequences=None, counted=None)
    n_validation = len(scored["validation"].labels) if "validation" in scored else None
    return replace(
        report,
        task="multiple-choice",
        dataset=replace(data, n=main.n, split=main.split, class_counts=main.class_counts, n_validation=n_validation),
        label_names=[one_line(name) for name in questions.label_names],
        rows=[row for run in runs.values() for row in run.rows],
        history={},
        differences=differences({name: draws for run in runs.values() for name, draws in run.draws.items()}),
        posthoc=posthoc(scored["test"], scored["validation"]) if "validation" in scored else {},
        answers=main.answers,
    )


def pictures_of(report: CalibrationReport, folders: Mapping[str, Path], folder: Path) -> list[Path]:
    """Draw into `folder` those pictures for which the runs left predictions and features; folders: name of a row -> its run."""
    predictions, features = {}, {}
    for name, path in folders.items():
        if (path / PREDICTIONS).is_file():
            with np.load(path / PREDICTIONS, allow_pickle=False) as arrays:
                split = report.dataset.split
                predictions[name] = (arrays[f"logits_{split}"], arrays[f"labels_{split}"])
        if (path / PENULTIMATE).is_file():
            features[name] = Penultimate.load(path / PENULTIMATE)
    return write_pictures(report, folder, predictions=predictions, features=features)


def check_push(config: Config) -> None:
    """Make the repository to be pushed to, so that a token which may not is noticed before the training.

    Raises: ValueError for no token, a refused one, no connection, and for checkpoints to be pushed.
    """
    training, name = config.training, config.training.hub_model_id or folder_of(config).absolute().name
    strategy = HubStrategy(training.hub_strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"expected hub_strategy end or every_save, got {strategy.value}: checkpoints hold paths of this machine "
            "and pickles; drop it, what a run leaves is pushed at its end"
        )
    with uploading("the model", name):
        HfApi(token=get_token()).create_repo(name, private=training.hub_private_repo, exist_ok=True)


def push(config: Config, names: Sequence[str], folders: Collection[Path]) -> None:
    """Upload those of the run's files which are for others, in one commit, without paths of this machine.

    names: of files in the run's folder. folders: of all runs. Predictions, settings, checkpoints, the other runs and pickles
    stay here, as does a text from which a path cannot be taken.

    Raises: ValueError for no token, a refused one, no connection.
    """
    training, folder = config.training, folder_of(config)
    name = training.hub_model_id or folder.absolute().name
    paths = paths_here(folder, *config.sources)
    operations, beside = [], {run.name for run in folders if run != folder}
    for found in sorted(name for name in names if name.split("/")[0] not in beside and _is_public(name)):
        content = (folder / found).read_bytes() if (folder / found).suffix in TEXTS else None
        text = None if content is None else without_paths(content.decode(), paths)
        if content is not None and text is None:
            announce(f"{found} is not pushed: it names a path of this machine")
            continue
        operations.append(CommitOperationAdd(found, str(folder / found) if text is None else text.encode()))
    api = HfApi(token=get_token())
    with uploading(f"{folder}, where everything is,", name):
        repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        message = "Model, calibration report and model card"
        api.create_commit(repo.repo_id, operations, commit_message=message, revision=training.hub_revision)


def _is_public(name: str) -> bool:
    top, last = name.split("/")[0], name.rsplit("/", 1)[-1]
    if name == BENCHMARKS:
        return True
    here = top.startswith((f"{PREFIX_CHECKPOINT_DIR}-", "_", ".")) or last.endswith(f"_{GENERATIONS}")
    return not here and last not in (PREDICTIONS, DRAWS, OUTCOME, PENULTIMATE, SETTINGS, TRAINING_ARGS_NAME)


def _bake(config: Config, temperature: float) -> None:
    folder = folder_of(config)
    if config.model.peft != "none":
        raise ValueError("expected peft: none with bake_temperature, got adapters; merge them first, then bake")
    # Weights and config are two files: killed between them, the run must not look complete, or it would bake twice.
    outcome = (folder / OUTCOME).read_bytes()
    (folder / OUTCOME).unlink()
    try:
        bake_folder(folder, temperature)
    except ValueError:  # its checks: the folder is as it was
        write_atomically(folder / OUTCOME, outcome)
        raise
    write_atomically(folder / OUTCOME, outcome)


def _dataset_facts(
    config: Config, data: ClassificationData | SequenceData, form: ChatFormat | None, main: Outcome
) -> DatasetFacts:
    sizes: dict[str, Any] = {f"n_{name}": len(part) for name, part in data.splits.items() if name != "test"}
    example = None if data.example is None else config.data.source_prefix + data.example + config.data.source_suffix
    card, embedded = config.card, config.data.dataset_name in (EMBEDDED_DATASET, EMBEDDED_G2P)
    return DatasetFacts(
        name=card.dataset_title or data.name, named=bool(card.dataset_title) or embedded, hub_id=card.dataset_id or data.hub_id,
        split=main.split, n=main.n, n_sequences=main.n_sequences,
        class_counts=main.class_counts, licence=data.licence, example=example,
        counted=None if form is None else form.counted, **sizes,
    )  # fmt: skip


def _smoothing_facts(
    training: LabelSmoothingArguments, num_classes: int, over: Literal["classes", "vocabulary"]
) -> SmoothingFacts:
    if not training.do_train:
        return SmoothingFacts(None)
    smoothing = smoothing_of(training)
    criterion = criterion_of(training, smoothing)
    adaptive = criterion.name in ADAPTIVE
    return SmoothingFacts.of(smoothing, num_classes, plain=criterion.plain, over=over, item_by_item=adaptive)


def _training_facts(config: Config, runs: dict[str, Outcome]) -> TrainingFacts:
    training = config.training
    last = [run.history[-1] for run in runs.values() if run.history]
    seconds = [entry["train_runtime"] for entry in last if "train_runtime" in entry]
    return TrainingFacts(
        seeds=[training.seed],
        steps=last[-1].get("step") if last else None,
        epochs=round(last[-1]["epoch"], 2) if last and "epoch" in last[-1] else None,
        global_batch=training.per_device_train_batch_size * training.gradient_accumulation_steps * PartialState().num_processes,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SchedulerType(training.lr_scheduler_type).value,
        weight_decay=training.weight_decay,
        gradient_tolerance=training.gradient_tolerance,
        objective=training.label_smoothing_objective,
        objective_params=criterion_of(training, smoothing_of(training)).params,
        techniques=techniques_of(training),
        class_weight="balanced: n / (K n_k)" if config.run.class_weight == "balanced" else None,
        teacher=Path(training.distillation_teacher).name if training.distillation_teacher else None,  # not a path here
        max_length=config.data.max_length,
        model_config_overrides=config.model.overrides,
        peft=config.model.peft,
        num_processes=PartialState().num_processes,
        train_runtime_s=round(sum(seconds), 1) if len(seconds) == len(runs) else None,
    )


def show_plots(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    """Log each picture as `plots/NAME` to TensorBoard, Weights & Biases and Trackio, as far as `report_to` names them."""
    for name in training.report_to or []:
        if name in _TRACKERS and plots:
            _TRACKERS[name](training, plots)


def list_logs(training: LabelSmoothingArguments, manifest: Manifest) -> None:
    """List the folder which TensorBoard's callback is about to make in that of a run: it is the run's, to delete with it."""
    if training.should_save and "tensorboard" in (training.report_to or []) and not os.getenv("TENSORBOARD_LOGGING_DIR"):
        manifest.add(Path(training.output_dir or "trainer_output", _LOGS), CHECKPOINT)


def _tensorboard(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    from matplotlib.image import imread

    module = "torch.utils.tensorboard" if importlib.util.find_spec("tensorboard") else "tensorboardX"  # as the Trainer
    folder = os.getenv("TENSORBOARD_LOGGING_DIR") or str(Path(training.output_dir or "trainer_output", _LOGS, "plots"))
    with importlib.import_module(module).SummaryWriter(log_dir=os.path.expanduser(folder)) as writer:
        for plot in plots:
            writer.add_image(f"plots/{plot.stem}", imread(plot)[..., :3], dataformats="HWC")


def _wandb(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:  # the Trainer's callback leaves it open
        wandb.run.log({f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots})


def _trackio(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(  # as the Trainer's callback, which has finished it
        project=training.project, name=training.run_name, space_id=training.trackio_space_id, resume="allow",
        private=training.hub_private_repo, bucket_id=training.trackio_bucket_id,
    )  # fmt: skip
    trackio.log({f"plots/{plot.stem}": trackio.Image(str(plot)) for plot in plots})
    trackio.finish()


_TRACKERS: dict[str, Callable[[LabelSmoothingArguments, Sequence[Path]], None]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio,
}  # fmt: skip
