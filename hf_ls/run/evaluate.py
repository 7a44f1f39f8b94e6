"""Calibration of a model which is already there: no training, only numbers, plots and a card, new or brought up to date."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub import HfApi, hf_hub_download
from rich.console import Console
from transformers import AutoTokenizer

from hf_ls.answers.reading import QuestionArguments
from hf_ls.common.errors import loading, uploading
from hf_ls.common.files import write_atomically
from hf_ls.common.models import IGNORE_INDEX, load_weights
from hf_ls.common.settings_file import nearest
from hf_ls.common.text import hub_id, one_line
from hf_ls.data.classification import EMBEDDED_DATASET, load_snippets, model_path, tokenise
from hf_ls.data.labels import LabelMatch, match_labels, permutation_warning
from hf_ls.data.predictions import read_predictions, splits_in
from hf_ls.data.reading import check_texts, read_files, read_hub
from hf_ls.data.sequences import tokenise_words
from hf_ls.data.splitting import check_overlap, sample
from hf_ls.metrics.paired import differences
from hf_ls.report.build import calibration_report, posthoc, write_report_files
from hf_ls.report.calibration_report import EVALUATED, REPORT, SETTINGS, CalibrationReport, package_versions
from hf_ls.report.card import check_card
from hf_ls.report.card_metadata import eval_results, with_results
from hf_ls.report.facts import DatasetFacts, SmoothingFacts
from hf_ls.report.naming import CardArguments
from hf_ls.report.sentences import asking, regime, tempering, warnings
from hf_ls.report.table import more_tables, table
from hf_ls.run.arguments import about
from hf_ls.run.config import Parser, from_config
from hf_ls.run.launch import announce
from hf_ls.run.loading import first_prompt, read_asked
from hf_ls.run.outcome import OUTCOME, Outcome, answer, evaluate_classes, evaluate_tokens, kept_predictions
from hf_ls.run.tasks import TASKS
from hf_ls.trainer.arguments import LabelSmoothingArguments

_LONGEST = 512  # tokens, where the tokenizer names no limit or a larger one


@dataclass
class EvaluateArguments(QuestionArguments, CardArguments):
    """What `scripts/evaluate.py` can be told.

    Raises: ValueError for settings which contradict each other.
    """

    output_dir: str = field(metadata=about("Where report, plots and card go; not the folder of the model."))
    model_name_or_path: str | None = field(default=None, metadata=about("Hub id or folder of a trained model."))
    predictions: str | None = field(
        default=None,
        metadata=about(
            "In place of a model and data: probabilities or logits with their labels, of any library; npz, CSV, TSV, JSON, JSONL "
            "or Parquet. A predictions.npz of a run has both splits."
        ),
    )
    validation_predictions: str | None = field(
        default=None, metadata=about("As predictions, of other examples: all post-hoc methods are fitted on these alone.")
    )
    label_names: list[str] = field(default_factory=list, metadata=about("With predictions: the classes in the order of columns."))
    model_name: str | None = field(default=None, metadata=about("With predictions: the name of the model, for the card."))
    hub_task: str | None = field(
        default=None, metadata=about("With predictions: the task as the Hub calls it, e.g. image-classification, for the card.")
    )
    library: str | None = field(
        default=None, metadata=about("With predictions: the library of the model as the Hub calls it, e.g. sklearn.")
    )
    task: Literal["text-classification", "token-classification", "multiple-choice"] = field(
        default="text-classification",
        metadata=about(
            "The task; multiple-choice: the probabilities which a causal language model gives the options of questions."
        ),
    )
    model_revision: str = field(default="main", metadata=about("Branch, tag or commit on the Hub."))
    trust_remote_code: bool = field(default=False, metadata=about("Run code from the model's repository."))
    dataset_name: str | None = field(default=None, metadata=about(f"Hub id, or '{EMBEDDED_DATASET}' for the embedded data."))
    dataset_config_name: str | None = field(default=None, metadata=about("Configuration of the dataset on the Hub."))
    test_split: str = field(default="test", metadata=about("Split of dataset_name which is reported."))
    validation_split: str = field(default="validation", metadata=about("Split of dataset_name the temperature is fitted on."))
    test_file: str | None = field(default=None, metadata=about("Local CSV, TSV, JSON, JSONL or Parquet file to report."))
    validation_file: str | None = field(default=None, metadata=about("As test_file, to fit the temperature on."))
    text_column: str = field(default="text", metadata=about("Column with the text."))
    text_pair_column: str | None = field(default=None, metadata=about("Column with a second text, for sentence pairs."))
    label_column: str = field(default="label", metadata=about("Column with one class per row."))
    tokens_column: str = field(default="tokens", metadata=about("token-classification: column with the list of words."))
    tags_column: str = field(default="ner_tags", metadata=about("token-classification: column with one tag per word."))
    label_map: str | None = field(
        default=None, metadata=about('Class of the model for each label of the data, as JSON: {"neg": "NEGATIVE", "1": 1}.')
    )
    epsilon: float | None = field(
        default=None, metadata=about("Label smoothing the model was trained with, 0 for none; left out where it is not known.")
    )
    max_length: int | None = field(default=None, metadata=about("Tokens kept of each example; the model's limit, at most 512."))
    max_samples: int | None = field(default=None, metadata=about("Use only a random sample of so many examples of each split."))
    batch_size: int = field(default=32, metadata=about("Examples per forward pass."))
    use_cpu: bool = field(default=False, metadata=about("Do not use a GPU."))
    write_card: bool = field(default=False, metadata=about("Write README.md into output_dir."))
    update_card: str | None = field(
        default=None, metadata=about("Hub id or folder whose model card gets the results into its metadata.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        self._check_task()
        self.files = {split: path for split, path in (("validation", self.validation_file), ("test", self.test_file)) if path}
        if not self.predictions and bool(self.dataset_name) == bool(self.files):
            raise ValueError(f"expected dataset_name or test_file, got {self.dataset_name} and {self.files}; set one of them")
        if self.files and not self.test_file:
            raise ValueError("expected test_file beside validation_file, got none; name the file to report")
        if len({os.path.realpath(path) for path in self.files.values()}) < len(self.files):
            raise ValueError("expected two files, got one for both splits; a temperature is never judged where it was fitted")
        if self.dataset_name and self.test_split == self.validation_split:
            raise ValueError(
                f"expected two splits, got {self.test_split} twice; validation_split: none leaves the temperature out"
            )
        if self.model_name_or_path and os.path.realpath(self.output_dir) == os.path.realpath(self.model_name_or_path):
            raise ValueError("expected an output_dir beside the model, got its own folder; its report would be lost")
        trained = [name for name in (SETTINGS, OUTCOME) if Path(self.output_dir, name).exists()]
        if trained:
            raise ValueError(f"expected an output_dir beside that of a run, got one with {trained[0]}; its report would be lost")
        self.check_benchmark(self.task if self.model_name_or_path else "text-classification", self.dataset_name)
        named = self.dataset_id or self.dataset_title or hub_id(self.dataset_name) or self.dataset_name == EMBEDDED_DATASET
        if self.update_card and not named:
            source = self.dataset_name or Path(self.test_file or self.predictions or "").name
            raise ValueError(
                f"expected data with an id on the Hub or a title to update a card, got {source!r}; set dataset_id or "
                "dataset_title, or write_card"
            )
        if self.update_card and not (Path(self.update_card).exists() or hub_id(self.update_card)):
            raise ValueError(f"expected update_card as a README.md, a folder or a Hub id, got {self.update_card!r}; check it")
        if self.write_card:
            check_card(self.output_dir)
        if self.epsilon is not None and not 0 <= self.epsilon < 1:
            raise ValueError(f"expected 0 <= epsilon < 1, got {self.epsilon}; leave it out where it is not known")
        for name in ("max_length", "max_samples", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}; leave it out")
        self.labels = _mapping(self.label_map)

    def _check_task(self) -> None:
        """Refuse settings of another task, which would do nothing."""
        own = {setting.name for setting in fields(QuestionArguments)}
        others = {"text_column", "text_pair_column", "label_column", "label_map", "tokens_column", "tags_column"}
        unread = others if self.task == "multiple-choice" else own
        given = [s.name for s in fields(self) if s.name in unread and getattr(self, s.name) not in (s.default, [])]
        if given:
            remedy = "question_column and answer_column name its columns" if unread is others else "drop it"
            raise ValueError(f"expected no {given[0]} with task {self.task}, got one; {remedy}")
        if self.task == "multiple-choice":
            self.check()

    def _check_source(self) -> None:
        """Refuse two sources of predictions, or none."""
        if bool(self.model_name_or_path) == bool(self.predictions):
            found = "both" if self.predictions else "neither"
            raise ValueError(f"expected model_name_or_path or predictions, got {found}; set one of them")
        if self.predictions:
            given = ("dataset_name", "test_file", "validation_file", "text_pair_column", "max_length", "max_samples")
            if unread := [name for name in given if getattr(self, name) is not None]:
                raise ValueError(f"expected no {unread[0]} with predictions, got one; the predictions are all that is read")
            if self.task != "text-classification":
                raise ValueError(f"expected one label per row with predictions, got task {self.task}; give the model")
        elif unread := [
            n for n in ("validation_predictions", "label_names", "model_name", "hub_task", "library") if getattr(self, n)
        ]:
            raise ValueError(f"expected predictions with {unread[0]}, got a model; drop it, or give predictions")


def evaluation_parser() -> Parser:
    """Of the settings of an evaluation."""
    parser = Parser(EvaluateArguments, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; the command line overrides it.")
    return parser


def parse_evaluation(argv: Sequence[str] | None = None) -> EvaluateArguments:
    """Settings from `--config file.yaml` and the command line; the command line wins.

    Raises: ValueError for unknown ones and as `EvaluateArguments`.
    """
    parser = evaluation_parser()
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    from_file, argv = from_config(list(sys.argv[1:] if argv is None else argv), known)
    settings, *_, rest = parser.parse_args_into_dataclasses(
        args=[*(from_file or []), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(
            f"expected known settings, got {rest[0].split('=')[0]}{nearest(rest[0].lstrip('-').split('=')[0], known)}; see --help"
        )
    return settings


def evaluate(settings: EvaluateArguments) -> CalibrationReport | None:
    """Measure a trained model, or predictions, and leave `calibration.json`, plots and, if wanted, a card in output_dir.

    The report has a row of the model as it is, and with validation data one at the temperature fitted there and the post-hoc
    methods. Returns it on the main process, None on the others.

    Raises: ValueError for a model without a trained head, and for labels of the data which the model does not have.
    """
    if settings.predictions:
        return _evaluate_predictions(settings, settings.predictions)
    model, tokenizer = _load(settings)
    raw, name, dataset_id = _read(settings)
    if settings.task == "multiple-choice":
        names, outcome = _ask(settings, model, tokenizer, raw)
    else:
        names, outcome = _classify(settings, model, tokenizer, raw)
    answers = outcome.answers
    if not PartialState().is_main_process:
        return None
    known = _known(settings)
    epsilon = settings.epsilon
    if epsilon is None and known and known.published_row:
        epsilon = known.published_row.epsilon
    rows = [replace(row, run=EVALUATED, epsilon=epsilon) for row in outcome.rows]
    kept = kept_predictions(Path(settings.output_dir))
    if "test" in kept:
        remedy = {} if answers is None else {"remedy": "Compare the answers of the data with its options"}
        warning = permutation_warning(kept["test"].logits.argmax(1), kept["test"].labels, names, **remedy)
        if warning:
            announce(f"Warning: {warning}")
    draws = {row.name: outcome.draws[old.name] for row, old in zip(rows, outcome.rows, strict=True)}
    place = settings.model_name_or_path or ""
    report = CalibrationReport(
        task=settings.task if answers else TASKS[settings.task].hub_task,
        model_name=place if hub_id(place) else Path(place).name,
        base_model=known.base_model if known else None,
        dataset=DatasetFacts(
            name=settings.dataset_title or name, named=bool(settings.dataset_title) or settings.dataset_name == EMBEDDED_DATASET,
            hub_id=dataset_id, config=settings.dataset_config_name, n=outcome.n, n_sequences=outcome.n_sequences,
            split=settings.test_split if settings.dataset_name else "test", class_counts=outcome.class_counts,
        ),
        label_names=names,
        smoothing=known.smoothing_of(known.published_row) if known and known.published_row and settings.epsilon is None
        else SmoothingFacts(epsilon),
        rows=rows,
        training=known.training if known else None,
        history={},
        versions=package_versions(),
        published=EVALUATED,
        differences=differences(draws),
        posthoc=posthoc(kept["test"], kept["validation"]) if len(kept) == 2 else {},
        hub=settings.hub,
        answers=answers,
    )  # fmt: skip
    _show(report, settings)
    return report


def _classify(settings: EvaluateArguments, model: Any, tokenizer: Any, raw: dict[str, Dataset]) -> tuple[list[str], Outcome]:
    """The names of the classes, and what a classifier of texts or tokens shows."""
    task = TASKS[settings.task]
    names = [one_line(model.config.id2label[i]) for i in range(model.config.num_labels)]
    splits, match = _matched(settings, _sampled(settings, raw), names)
    if settings.task == "text-classification":
        check_overlap(splits)
    announce(match.sentence)
    limit = settings.max_length or min(tokenizer.model_max_length, _LONGEST)
    encode = tokenise_words if task.per_token else tokenise
    tokens = DatasetDict({s: encode(DatasetDict({"train": part}), tokenizer, limit)["train"] for s, part in splits.items()})
    training = _trainer_arguments(settings, do_eval="validation" in tokens)
    trainer = task.trainer(model=model, args=training, data_collator=task.collator(tokenizer, model), processing_class=tokenizer)
    if task.per_token:
        return names, evaluate_tokens(trainer, tokens, DatasetDict(splits), [], has_classes=True)
    return names, evaluate_classes(trainer, tokens)


def _trainer_arguments(settings: EvaluateArguments, *, do_eval: bool) -> LabelSmoothingArguments:
    return LabelSmoothingArguments(
        output_dir=settings.output_dir, per_device_eval_batch_size=settings.batch_size, use_cpu=settings.use_cpu,
        report_to="none", do_eval=do_eval, do_predict=True, remove_unused_columns=True,
    )  # fmt: skip


def _ask(settings: EvaluateArguments, model: Any, tokenizer: Any, raw: dict[str, Dataset]) -> tuple[list[str], Outcome]:
    """The names of the options, and what a language model shows when it is asked.

    Raises: ValueError for several processes, and as `read_asked` and `answer`.
    """
    device = _trainer_arguments(settings, do_eval=False).device
    if PartialState().num_processes > 1:
        raise ValueError(
            f"expected one process with task multiple-choice, got {PartialState().num_processes}; start it without torchrun or "
            "accelerate launch"
        )
    data = read_asked(_sampled(settings, raw), settings)
    for note in data.notes:
        announce(note)
    announce(f"The first prompt, with its right answer:\n{first_prompt(data, settings)}")
    model.to(device)
    asked = {"max_length": settings.max_length, "batch_size": settings.batch_size}
    folder = Path(settings.output_dir)
    outcome = answer(model, tokenizer, data, settings, folder, run=EVALUATED, epsilon=None, **asked)
    return [one_line(name) for name in data.label_names], outcome


def update_card(report: CalibrationReport, target: str, *, token: str | None = None) -> None:
    """Put the results of a report into the metadata of an existing card: a README.md, a folder with one, or a Hub id.

    A result of the same metric, data and settings gets the new value, all else in the card stays. Nothing is marked verified.

    Raises: ValueError for data without an id on the Hub, which the metadata need, for a target which is no card, and as
    `with_results`; then nothing is written.
    """
    results = eval_results(report)
    if not results:
        raise ValueError(
            "expected data with an id on the Hub or a title, and a task, to update a card, got "
            f"{report.dataset.name!r} and {report.task}; set dataset_id or dataset_title (and hub_task), or write_card"
        )
    path = Path(target, "README.md") if Path(target).is_dir() else Path(target)
    if path.is_file():
        write_atomically(path, with_results(_card_text(path), report.model_name, results))
    elif hub_id(target):
        with loading(f"the card of {target}", "write_card makes a new one"):
            copy = Path(hf_hub_download(target, "README.md", token=token))
        text = with_results(_card_text(copy), report.model_name, results)
        with uploading("the results", target):
            HfApi(token=token).upload_file(
                path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=target, commit_message="Calibration results"
            )
    else:
        raise ValueError(f"expected a README.md, a folder with one or a Hub id, got {target!r}; use write_card for a new card")


def _card_text(path: Path) -> str:
    """With its own line ends, which reading as text would change."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} in UTF-8, got other bytes at {error.start}; save it as UTF-8") from error


def _mapping(text: str | None) -> dict[str, str] | None:
    try:
        found = json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise ValueError(f'expected label_map as JSON, got {text!r}; write {{"neg": "NEGATIVE"}}') from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f'expected label_map as a mapping, got {text!r}; write {{"neg": "NEGATIVE"}}')
    return found


def _load(settings: EvaluateArguments) -> tuple[Any, Any]:
    """Model and tokenizer.

    Raises: ValueError for adapters, and for a model some of whose weights would be random.
    """
    place = model_path(settings.model_name_or_path or "")
    task = TASKS["causal-lm" if settings.task == "multiple-choice" else settings.task]
    if Path(place, "adapter_config.json").is_file():
        raise ValueError(f"expected a whole model, got adapters in {place}; merge them (merge_and_unload) and save that model")
    given = {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
    remedy = "check model_name_or_path and model_revision"
    with loading(f"a model in safetensors at {place}", remedy):
        model, info = load_weights(task.auto_model, place, output_loading_info=True, **given)
    random = sorted({*info["missing_keys"], *(str(found) for found in info["mismatched_keys"])})
    if random:
        raise ValueError(
            f"expected a trained {settings.task} model, got {place} without {', '.join(random[:4])}, which would be random; "
            "fine-tune it first (scripts/finetune.py)"
        )
    with loading(f"a tokenizer at {place}", remedy):
        return model, AutoTokenizer.from_pretrained(place, **given)


def _read(settings: EvaluateArguments) -> tuple[dict[str, Dataset], str, str | None]:
    """The test split and perhaps the validation split as they are, the name of the data, and its id on the Hub."""
    if settings.dataset_name == EMBEDDED_DATASET:
        data = load_snippets()
        return {split: data.splits[split] for split in ("validation", "test")}, data.name, None
    if settings.dataset_name:
        loaded = read_hub(settings.dataset_name, settings.dataset_config_name)
        if settings.test_split not in loaded:
            raise ValueError(f"expected the split {settings.test_split!r}, got {sorted(loaded)}; set test_split")
        wanted = {"validation": settings.validation_split, "test": settings.test_split}
        found = {split: loaded[alias] for split, alias in wanted.items() if alias in loaded}
        return found, settings.dataset_name, settings.dataset_id or hub_id(settings.dataset_name)
    return dict(read_files(settings.files)), Path(settings.files["test"]).name, settings.dataset_id


def _sampled(settings: EvaluateArguments, raw: dict[str, Dataset]) -> dict[str, Dataset]:
    """At most max_samples rows of each split."""
    kept = {split: sample(part, settings.max_samples, 0) for split, part in raw.items()}
    for split, part in raw.items():
        if len(kept[split]) < len(part):
            announce(f"{split}: {len(kept[split]):,} of {len(part):,} rows are used, a random sample, because of max_samples")
    return kept


def _matched(settings: EvaluateArguments, raw: dict[str, Dataset], names: list[str]) -> tuple[dict[str, Dataset], LabelMatch]:
    """The splits with the model's own ids as labels, and how they were found.

    Raises: ValueError for missing columns, empty splits, hidden, missing or unknown labels.
    """
    per_token = settings.task == "token-classification"
    label = settings.tags_column if per_token else settings.label_column
    columns = {settings.tokens_column: "tokens"} if per_token else {settings.text_column: "text"}
    if settings.text_pair_column and not per_token:
        columns[settings.text_pair_column] = "text_pair"
    values, data_names, kept = {}, None, {}
    for split, part in raw.items():
        absent = [column for column in (*columns, label) if column not in part.column_names]
        if absent or not len(part):
            raise ValueError(f"expected examples with {[*columns, label]} in {split}, got {part.column_names}; set the columns")
        kept[split] = part
        feature = part.features[label]
        feature = getattr(feature, "feature", feature)
        data_names = feature.names if isinstance(feature, ClassLabel) else data_names
        found = [list(row) if per_token else [row] for row in kept[split][label]]
        if isinstance(feature, ClassLabel) and any(label == -1 for row in found for label in row):
            raise ValueError(f"expected labels in {split}, got -1, which hides them; report another split with test_split")
        named = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
        values[split] = [[named.get(label, label) for label in row] for row in found]
    seen = {label for rows in values.values() for row in rows for label in row} - {IGNORE_INDEX}
    odd = [label for label in seen if isinstance(label, float) or label is None]
    if odd:
        raise ValueError(f"expected classes as words or integers in {label}, got {odd[0]}; drop or cast those rows")
    match = match_labels(seen, names, data_names, settings.labels)
    ids = match.ids | {IGNORE_INDEX: IGNORE_INDEX}
    made = {}
    for split, part in kept.items():
        content = {ours: list(part[theirs]) for theirs, ours in columns.items()}
        labels = [[ids[label] for label in row] for row in values[split]]
        made[split] = Dataset.from_dict(content | ({"tags": labels} if per_token else {"label": [row[0] for row in labels]}))
        check_texts(kept[split], split, [] if per_token else list(columns))
    return made, match


def _known(settings: EvaluateArguments) -> CalibrationReport | None:
    """The report beside the weights, which says how they were trained."""
    path = Path(settings.model_name_or_path or "", REPORT)
    return CalibrationReport.load(path) if path.is_file() else None


def _evaluate_predictions(settings: EvaluateArguments, path: str) -> CalibrationReport:
    """As `evaluate`, of the predictions in files."""
    reported = read_predictions(path, settings.test_split, settings.label_column)
    other, held_out = settings.validation_predictions, None
    if other or settings.validation_split in splits_in(path):
        held_out = read_predictions(other or path, settings.validation_split, settings.label_column)
        if (held_out.kind, held_out.names) != (reported.kind, reported.names):
            raise ValueError(
                f"expected validation predictions of the same kind and classes, got {held_out.kind} of {held_out.names} beside "
                f"{reported.kind} of {reported.names}; write both files alike"
            )
    scores = {"logits": reported.scores} if reported.kind == "logits" else {"probabilities": reported.scores}
    report = calibration_report(
        labels=reported.labels,
        label_names=settings.label_names or reported.names,
        label_map=settings.labels,
        validation=None if held_out is None else (held_out.scores, held_out.labels),
        model_name=settings.model_name or Path(path).stem,
        dataset_name=settings.dataset_title,
        dataset_id=settings.dataset_id,
        task=settings.hub_task,
        library=settings.library,
        license=settings.license,
        language=settings.language,
        split=settings.test_split,
        epsilon=settings.epsilon,
        **scores,
    )
    _show(report, settings)
    return report


def _show(report: CalibrationReport, settings: EvaluateArguments) -> None:
    folder, console = Path(settings.output_dir), Console()
    write_report_files(report, folder, card=settings.write_card)
    console.print(table(report, console.width))
    texts = [found for found in (asking(report), regime(report), tempering(report)) if found]
    console.print(*texts, sep="\n", markup=False, highlight=False)
    for text in warnings(report):
        console.print(f"Warning: {text}", markup=False, highlight=False)
    for more in more_tables(report):
        console.print(more)
    if settings.update_card:
        update_card(report, settings.update_card)
    console.print(f"Report and plots: {folder}", markup=False, highlight=False, soft_wrap=True)
