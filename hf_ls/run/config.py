"""The command line: YAML files turned into arguments, the settings put together, every refusal of one before work starts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_ls import __version__
from hf_ls.common.errors import settling
from hf_ls.common.help import ShowAll, show_help
from hf_ls.common.settings_file import nearest, yaml_arguments
from hf_ls.data.classification import EMBEDDED_DATASET, EMBEDDED_MODEL
from hf_ls.data.g2p import EMBEDDED_G2P
from hf_ls.data.guessing import guess_soft_labels, guess_task
from hf_ls.data.reading import read_files
from hf_ls.metrics.classes import CLASS_SCORES
from hf_ls.metrics.text import TEXT_METRICS
from hf_ls.report.naming import CardArguments
from hf_ls.run.arguments import DataArguments, ModelArguments, RunArguments, TrainingQuestions
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments, techniques_of

# Settings which mean something for some tasks only: elsewhere they would do nothing, in silence.
_TASKS_OF = {
    "text_pair_column": ("text-classification",),
    "label_column": ("text-classification",),
    "soft_label_columns": ("text-classification",),
    "soft_label_names": ("text-classification",),
    "soft_labels": ("text-classification",),
    "snippet_sources": ("text-classification", "causal-lm", "sft"),
    "bake_temperature": ("text-classification",),
    "tokens_column": ("token-classification",),
    "tags_column": ("token-classification",),
    "source_column": ("seq2seq", "causal-lm", "sft"),
    "target_column": ("seq2seq", "causal-lm", "sft"),
    "source_prefix": ("seq2seq", "causal-lm", "sft"),
    "source_suffix": ("seq2seq", "causal-lm", "sft"),
    "max_target_length": ("seq2seq",),
    "text_metrics": ("seq2seq",),
    "predict_with_generate": ("seq2seq",),
    "generation_max_length": ("seq2seq",),
    "generation_num_beams": ("seq2seq",),
    "generation_config": ("seq2seq",),
    "sortish_sampler": ("seq2seq",),
}
LANGUAGE_MODELS = ("causal-lm", "sft")
_TASKS_OF |= dict.fromkeys(("messages_column", "chat_template_path", "assistant_only_loss", "packing"), ("sft",))
_TASKS_OF["completion_only_loss"] = LANGUAGE_MODELS
_TASKS_OF["class_weight"] = ("text-classification", "token-classification")
_TASKS_OF |= dict.fromkeys(("mixup_alpha", "mixup_per"), ("text-classification",))
# What an evaluation during training gives, by which the best checkpoint can be chosen; signed_gap is best at 0, at neither end.
_METRICS = ("loss", "nll", "calibrated_nll", "brier", "ece", "accuracy")
_SOFT_METRICS = ("soft_nll", "soft_brier")
_METRICS_OF: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("seq2seq", "causal-lm", "sft"), ("full_ece", "perplexity", "eos_nll", "eos_ece")
)
_ANSWER_METRICS = tuple(f"answer_{name}" for name in ("nll", "accuracy", "brier", "ece", "aurc"))
_METRICS_OF["token-classification"] = ("full_ece", "perplexity", *CLASS_SCORES, "entity_f1")
_METRICS_OF["text-classification"] = tuple(CLASS_SCORES)
_GENERATED_METRICS = ("exact_match", "sequence_ece")
# Smallest value, and the one which must not be reached; what is checked elsewhere is not here.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), (0, 1)),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs", "dataloader_num_workers"), (0, math.inf)
    ),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), (1, math.inf)),
    **dict.fromkeys(("eval_accumulation_steps", "save_total_limit", "lora_r", "lora_alpha"), (1, math.inf)),
    **dict.fromkeys(("generation_max_length", "generation_num_beams", "dataloader_prefetch_factor"), (1, math.inf)),
}
# What `--train_file x.csv --output_dir y` alone means: the settings of configs/own-data.yaml.
OWN_DATA = {
    "label_smoothing_factor": "0.1", "with_baseline": "true", "do_train": "true", "do_eval": "true", "do_predict": "true",
    "per_device_train_batch_size": "32", "per_device_eval_batch_size": "128", "num_train_epochs": "4", "learning_rate": "5e-5",
    "warmup_steps": "0.1", "weight_decay": "0.01", "train_sampling_strategy": "group_by_length", "logging_steps": "20",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": "1", "report_to": "none",
}  # fmt: skip
# Where conversations are otherwise than that: the rows are longer, the models larger. The learning rate is TRL's.
OWN_CONVERSATIONS = {"per_device_train_batch_size": "8", "per_device_eval_batch_size": "8", "learning_rate": "2e-5"}
_LONGEST_CONVERSATION = "1024"  # tokens, as in TRL
_DATASET_TASKS = {EMBEDDED_DATASET: ("text-classification", *LANGUAGE_MODELS), EMBEDDED_G2P: ("seq2seq", "causal-lm", "sft")}


@dataclass(frozen=True)
class Config:
    """All settings of one run; notes: which of them were filled in, a sentence each."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    training: LabelSmoothingSeq2SeqArguments
    card: CardArguments
    questions: TrainingQuestions
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Any, ...]:
        """What decides the weights and the numbers: all but the card."""
        return self.run, self.model, self.data, self.training, self.questions

    @property
    def sources(self) -> list[str | None]:
        """What the run reads: files, folders and Hub ids, None where one is left out."""
        model, data, questions = self.model, self.data, self.questions
        files = [*data.files.values(), *questions.files.values(), questions.few_shot_file]
        return [*files, model.model_name_or_path, model.tokenizer_name, data.dataset_name, self.training.distillation_teacher]

    @property
    def trains_on_soft_labels(self) -> bool:
        """Whether the published run learns distributions; the runs beside it learn labels."""
        return bool(self.data.soft_label_columns) and self.run.soft_labels == "train"

    @property
    def asks_sentences(self) -> bool:
        """Whether a language model learns the embedded sentences, which are questions: those of validation and test are asked."""
        return self.run.task in LANGUAGE_MODELS and self.data.dataset_name == EMBEDDED_DATASET

    @property
    def asks(self) -> set[str]:
        """The splits which have questions: none, test, or both validation and test."""
        return set(self.questions.files) or ({"validation", "test"} if self.asks_sentences else set())


class Parser(HfArgumentParser):
    """Errors are exceptions in one sentence: the script prints them, and tests and other callers can catch them."""

    def __init__(self, *kinds: Any, **options: Any) -> None:
        super().__init__(*kinds, **options)
        no = argparse.SUPPRESS  # it is no setting
        self.add_argument("--help_all", nargs=0, action=ShowAll, dest=no, default=no, help="Every setting, in whole sentences.")
        self.add_argument("--version", action="version", version=f"hf_ls {__version__}", help="Show the version.")
        for action in self._actions:
            if action.dest == "report_to":  # the Trainer takes a list, its parser one word
                action.nargs = "+"

    def format_help(self) -> str:
        """A line a setting; `--help_all` says more."""
        return show_help(self, everything=False)

    def parse_args_into_dataclasses(self, args: Any = None, *rest: Any, **options: Any) -> tuple[Any, ...]:
        """As transformers, whatever is refused on the way.

        Raises: ValueError.
        """
        for word in args or []:
            if word.endswith("=--"):  # argparse would make an empty list of it
                raise ValueError(f"expected a value for {word.removesuffix('=--')}, got '--'; see --help")
        with settling():
            return super().parse_args_into_dataclasses(args, *rest, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises: ValueError, always.
        """
        raise ValueError(f"expected settings as --help describes them, got: {message}; see --help")


def config_parser() -> Parser:
    """Of all settings of a run."""
    kinds = [RunArguments, ModelArguments, DataArguments, LabelSmoothingSeq2SeqArguments, CardArguments, TrainingQuestions]
    parser = Parser(kinds, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; the command line overrides it.")
    return parser


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Settings from `--config file.yaml` and the command line; the command line wins.

    Every YAML key is turned into its command-line argument, so both are read and typed by the same code: `2e-5` is a
    number and `no` a word.

    Raises: ValueError for an unknown key (with the nearest known one), a wrong type, a repeated key, and settings which
    contradict each other.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), config_parser()
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    from_file, argv = from_config(argv, known)
    filled, notes = _filled_in([*(from_file or []), *argv], configured=from_file is not None)
    from_file = [*filled, *(from_file or [])]
    *parsed, _, rest = parser.parse_args_into_dataclasses(
        [*from_file, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        name = rest[0].split("=")[0]  # without the value, which may be a secret
        raise ValueError(f"expected known settings, got {name}{nearest(name, known)}; see --help")
    run, model, data, training, card, questions = parsed
    config = Config(run, model, data, training, card, questions, tuple(notes))
    _check(config)
    return config


def _filled_in(words: list[str], *, configured: bool) -> tuple[list[str], list[str]]:
    """Settings which nobody has given, as arguments, and a sentence about each kind of them for a file of one's own.

    Its task is guessed by its columns. Where neither a config nor what to do is given, all is done that `OWN_DATA` says.
    """
    given = {word.lstrip("-").split("=")[0]: word for word in words if word.startswith("--")}
    file, task = _value(words, "train_file"), _value(words, "task")
    filled: list[str] = []
    notes: list[str] = []
    if file is not None and not given.keys() & {"task", "soft_label_columns"}:  # soft labels are of whole texts
        task, soft = _guessed(file)
        if task is not None:
            filled.append(f"--task={task}")
            notes.append(f"Task: {task}, guessed by the columns of {Path(file).name}; --task changes that")
        if soft and task == "text-classification" and "label_column" not in given:
            filled += ["--soft_label_columns", *soft]
            notes.append(f"No column of classes, but one of numbers for each class: soft_label_columns: {soft[0]!r}, guessed")
    if task == "sft" and "max_length" not in given:
        filled.append(f"--max_length={_LONGEST_CONVERSATION}")
    if file is not None and not configured and not given.keys() & {"do_train", "do_eval", "do_predict"}:
        usual = OWN_DATA | (OWN_CONVERSATIONS if task == "sft" else {})
        missing = {name: value for name, value in usual.items() if name not in given}
        filled += [f"--{name}={value}" for name, value in missing.items()]
        shown = ", ".join(f"{name}: {value}" for name, value in missing.items())
        notes.append(f"No config and no do_train: what configs/own-data.yaml says is done ({shown})")
    return filled, notes


def _value(words: Sequence[str], name: str) -> str | None:
    """The last value of a setting among arguments."""
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word.startswith(f"--{name}="):
            found = word.split("=", 1)[1]
        elif word == f"--{name}":
            found = following
    return found


def _guessed(file: str) -> tuple[str | None, list[str]]:
    """The task of a file and its soft labels; none where it does not tell, or cannot be read: the loader says why."""
    try:
        part = read_files({"train": file})["train"]
        return guess_task(part), guess_soft_labels(part)
    except (ValueError, OSError):
        return None, []


def from_config(argv: list[str], known: Collection[str]) -> tuple[list[str] | None, list[str]]:
    """The arguments of the file which `--config` names, None without one, and the rest, which come behind them and win.

    Raises: ValueError as `yaml_arguments`.
    """
    path, argv = _take_config(argv)
    nulls, argv = _take_nulls(argv)
    return yaml_arguments(Path(path), set(known) - {"config", "help", "help_all", "version"}, nulls) if path else None, argv


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--config="):
            return argument.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def _take_nulls(argv: list[str]) -> tuple[set[str], list[str]]:
    """The names which the command line sets to null, to take back what the file says, and the rest of it."""
    spaced = {i for i, word in enumerate(argv[:-1]) if word.startswith("--") and "=" not in word and argv[i + 1] == "null"}
    joined = {i for i, word in enumerate(argv) if word.startswith("--") and word.endswith("=null")}
    names = {argv[i].removesuffix("=null").lstrip("-") for i in spaced | joined}
    dropped = spaced | {i + 1 for i in spaced} | joined
    return names, [word for i, word in enumerate(argv) if i not in dropped]


def _check_values(config: Config) -> None:
    """Refuse single values which would end the run later, or make every number NaN."""
    for part in (config.run, config.model, config.data, config.training):
        for setting in fields(part):
            name, value = setting.name, getattr(part, setting.name)
            if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and name != "max_grad_norm")):
                raise ValueError(f"expected a finite number as {name}, got {value}; leave it out for the default")
            low, end = _RANGES.get(name, (-math.inf, math.inf))
            if isinstance(value, int | float) and not (low <= value and (value < end or end == math.inf)):
                wanted = f"{name} >= {low}" if end == math.inf else f"{low} <= {name} < {end}"
                raise ValueError(f"expected {wanted}, got {value}; leave it out for the default")
    training = config.training
    if not isinstance(training.lr_scheduler_kwargs, dict | None):
        raise ValueError(f'expected lr_scheduler_kwargs as JSON, got {training.lr_scheduler_kwargs!r}; write {{"a": 1}}')
    if any("=" not in pair for pair in (training.optim_args or "=").split(",")):
        raise ValueError(f"expected optim_args as name=value,name=value, got {training.optim_args!r}; see the optimizer's docs")
    loggers = set(training.report_to or ()) - {"all", "none"}
    if unknown := sorted(loggers - INTEGRATION_TO_CALLBACK.keys()):
        raise ValueError(
            f"expected report_to among {', '.join(sorted(INTEGRATION_TO_CALLBACK))} or none, got {unknown[0]!r}"
            f"{nearest(unknown[0], INTEGRATION_TO_CALLBACK)}; use none for no reports"
        )
    if training.torch_compile and training.torch_compile_backend:
        from torch import _dynamo  # takes a second

        if training.torch_compile_backend not in (known := _dynamo.list_backends(exclude_tags=())):
            raise ValueError(
                f"expected torch_compile_backend among {', '.join(known)}, got {training.torch_compile_backend!r}; "
                "inductor is usual"
            )
    generation = str(training.generation_config or "")
    if generation.endswith(".json") and not Path(generation).is_file():
        raise ValueError(
            f"expected generation_config as a file, a folder or a Hub id, got no file at {generation}; check the path"
        )


def _check(config: Config) -> None:
    training, run = config.training, config.run
    _check_values(config)
    _check_task(config)
    _check_questions(config)
    if str(training.resume_from_checkpoint).lower() in ("true", "false", "1", "yes"):
        raise ValueError(
            f"expected resume_from_checkpoint as 'last' or a checkpoint folder, got {training.resume_from_checkpoint!r}; use last"
        )
    if run.with_baseline and training.resume_from_checkpoint not in (None, "last"):
        raise ValueError(
            f"expected resume_from_checkpoint=last with with_baseline, got {training.resume_from_checkpoint!r}, which is "
            "of one run; use last"
        )
    metric = training.metric_for_best_model or ""
    known = [*_METRICS, *_METRICS_OF.get(run.task, ()), *(_GENERATED_METRICS if training.predict_with_generate else ())]
    known += _SOFT_METRICS if config.data.soft_label_columns else ()
    known += _ANSWER_METRICS if "validation" in config.asks else ()
    if "test" in metric.replace("eval_", "").split("_") or "predict" in metric:
        raise ValueError(f"expected metric_for_best_model on validation, got {metric!r}; the test split is only ever reported on")
    if metric and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"expected metric_for_best_model among {', '.join(known)}, which an evaluation during training gives for this task, "
            f"got {metric!r}{nearest(metric, known)}; change it"
        )
    if run.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise ValueError(
            "expected load_best_model_at_end with early_stopping_patience, got False; set it and metric_for_best_model"
        )
    _check_soft_labels(config)
    config.card.check_benchmark(run.task, config.data.dataset_name)
    if run.with_baseline and not techniques_of(training) and not config.trains_on_soft_labels:
        raise ValueError(
            "expected label_smoothing_factor > 0 with with_baseline, got 0, which is the baseline itself; set one of them"
        )
    if not training.distillation_teacher:
        for name in ("distillation_alpha", "distillation_temperature"):
            if getattr(training, name) != LabelSmoothingSeq2SeqArguments.__dataclass_fields__[name].default:
                raise ValueError(f"expected distillation_teacher with {name}, got none; add --teacher, or drop {name}")


def _check_soft_labels(config: Config) -> None:
    training, alone = config.training, not config.run.with_baseline and not config.training.allow_combined_softening
    if training.label_smoothing_soft_labels:
        raise ValueError(
            "expected soft_label_columns, which names the data too, got label_smoothing_soft_labels; use soft_label_columns"
        )
    if config.trains_on_soft_labels and alone and techniques_of(training):
        raise ValueError(
            f"expected one technique beside the plain cross entropy, got {techniques_of(training)[0]} and soft labels, which are "
            "soft already; set label_smoothing_factor: 0, or with_baseline for a row of each, or "
            "allow_combined_softening for both at once"
        )


def _check_questions(config: Config) -> None:
    """Refuse settings of questions where there are none, and questions which were learnt or chosen by."""
    settings, files = config.questions, config.questions.files
    if not config.asks:
        given = [s.name for s in fields(settings) if getattr(settings, s.name) != _default_of(s)]
        if given:
            raise ValueError(f"expected question_file with {given[0]}, got none; name a file of questions, or drop it")
        return
    paths = [Path(path).resolve() for path in (*files.values(), config.data.train_file) if path]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"expected different files for train and questions, got {files} beside {config.data.train_file}; a temperature is "
            "never judged where it was fitted, nor an answer where it was learnt"
        )
    settings.check()


def _default_of(setting: Any) -> Any:
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def _check_task(config: Config) -> None:
    """Refuse settings which the task does not read, and data or models which it cannot use."""
    task, model = config.run.task, config.model
    for part in (config.run, config.data, config.training, config.questions):
        for setting in fields(part):
            tasks = LANGUAGE_MODELS if part is config.questions else _TASKS_OF.get(setting.name)
            value = getattr(part, setting.name)
            if tasks and task not in tasks and value != _default_of(setting):
                raise ValueError(f"expected {setting.name} only with task {' or '.join(tasks)}, got task {task}; drop it")
    tasks = _DATASET_TASKS.get(config.data.dataset_name or "")
    if tasks and task not in tasks:
        raise ValueError(
            f"expected task {' or '.join(tasks)} with dataset_name: {config.data.dataset_name}, got task {task}; set the task"
        )
    unknown = sorted(set(config.run.text_metrics) - set(TEXT_METRICS))
    if unknown:
        raise ValueError(f"expected text_metrics among {TEXT_METRICS}, got {unknown}; leave them out")
    if model.model_type and model.model_name_or_path != EMBEDDED_MODEL:
        raise ValueError(
            f"expected model_type or model_name_or_path, got {model.model_type} and {model.model_name_or_path}; model_type "
            "starts from random weights"
        )
    if model.model_type and not model.tokenizer_name and config.data.dataset_name != EMBEDDED_G2P:
        raise ValueError("expected tokenizer_name with model_type, got none; name the tokenizer whose vocabulary the model has")
