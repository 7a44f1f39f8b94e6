"""From settings to data, tokenizer, tokens and model, for every task: which loader, tokeniser and model class they mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoTokenizer

from hf_ls.answers.questions import Question, continuation
from hf_ls.answers.reading import FEW_SHOT, QuestionArguments, QuestionData, read_questions
from hf_ls.common.errors import loading
from hf_ls.common.models import load_weights
from hf_ls.common.settings_file import nearest
from hf_ls.common.text import one_line
from hf_ls.data.classification import (
    EMBEDDED_DATASET,
    ClassificationData,
    load_classification,
    load_snippets,
    model_path,
    tokenise,
)
from hf_ls.data.conversations import ChatFormat, pairs_as_conversations, set_chat_template, tokenise_conversations
from hf_ls.data.g2p import CHAT_TEMPLATE, EMBEDDED_G2P, g2p_tokenizer, load_g2p
from hf_ls.data.labels import absent_classes
from hf_ls.data.preview import preview
from hf_ls.data.reading import read_files
from hf_ls.data.sequences import (
    SequenceData,
    check_sequence_overlap,
    load_sequences,
    tokenise_causal,
    tokenise_seq2seq,
    tokenise_words,
)
from hf_ls.data.soft_labels import with_soft_labels
from hf_ls.data.splitting import check_overlap, sample
from hf_ls.run.config import Config
from hf_ls.run.launch import announce
from hf_ls.run.tasks import TASKS
from hf_ls.trainer.distillation import load_teacher

logger = logging.getLogger(__name__)

_CAPS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}

Data = ClassificationData | SequenceData


@dataclass(frozen=True)
class Loaded:
    """What a run is made of before any model: data, tokenizer, and token ids and labels of each split.

    available: how many rows each split had before its cap. form: of conversations, None for other data. questions: beside the
    data of a language model, None without any.
    """

    data: Data
    tokenizer: Any
    tokens: DatasetDict
    available: Mapping[str, int]
    form: ChatFormat | None = None
    questions: QuestionData | None = None

    @property
    def sizes(self) -> str:
        """In words."""
        return ", ".join(f"{len(part):,} {split}" for split, part in self.tokens.items())


def load(config: Config) -> Loaded:
    """Data, tokenizer and tokens which the settings name; on several processes, the first one fills the caches.

    Raises: ValueError as `load_data`, `load_tokenizer` and `load_tokens`.
    """
    for note in config.notes:
        announce(note)
    with config.training.main_process_first(desc="data"):
        whole = load_data(config)
    for note in whole.notes:
        announce(note)
    data = capped(config, whole)
    tokenizer = load_tokenizer(config)
    form = chat_format(config, data, tokenizer)
    with config.training.main_process_first(desc="tokens"):
        tokens = load_tokens(config, data, tokenizer, form)
    questions = load_questions(config)
    if questions is not None:
        for note in questions.notes:
            announce(note)
        announce(f"The first question, with its right answer:\n{first_prompt(questions, config.questions)}")
    return Loaded(data, tokenizer, tokens, {split: len(part) for split, part in whole.splits.items()}, form, questions)


def load_data(config: Config) -> Data:
    """The splits which the settings name, whole, and warnings about texts which two of them share.

    Raises: ValueError as `load_classification` and `load_sequences`, and when most of the test split is the validation split.
    """
    settings, task = config.data, config.run.task
    source: dict[str, Any] = {
        "dataset_config": settings.dataset_config_name,
        "files": settings.files,
        "text_column": settings.text_column,
        "validation_fraction": settings.validation_fraction,
        "test_fraction": settings.test_fraction,
        "seed": _data_seed(config),
    }
    data: Data
    if settings.dataset_name == EMBEDDED_DATASET:
        data = load_snippets(settings.snippet_sources)
        if settings.soft_label_columns:
            splits, names, notes = with_soft_labels(data.splits, settings.soft_label_columns, data.label_names)
            data = replace(data, splits=splits, label_names=names, notes=tuple(notes))
        data = as_completions(data, config.questions) if config.asks_sentences else data
    elif settings.dataset_name == EMBEDDED_G2P:
        data = load_g2p()
    elif task == "text-classification":
        read = ("text_pair_column", "label_column", "soft_label_columns", "soft_label_names")
        source |= {name: getattr(settings, name) for name in read}
        data = load_classification(settings.dataset_name, **source)
    else:
        for name in ("messages_column", "source_column", "target_column", "tokens_column", "tags_column"):
            source[name] = getattr(settings, name)
        data = load_sequences(task, settings.dataset_name, **source)
    (check_overlap if task == "text-classification" else check_sequence_overlap)(data.splits)
    if task == "sft" and settings.dataset_name == EMBEDDED_G2P:
        data = replace(data, splits=pairs_as_conversations(data.splits))
    return data


def load_questions(config: Config) -> QuestionData | None:
    """The questions of validation and test which the settings name, or which the embedded sentences are; None without any.

    `max_eval_samples` and `max_predict_samples` hold for them as for the rows of these splits.

    Raises: ValueError as `read_asked`.
    """
    splits: Mapping[str, Dataset] = {}
    if config.questions.files:
        splits = read_files(config.questions.files)
    elif config.asks_sentences:
        splits = load_snippets(config.data.snippet_sources).splits
    seed = None if config.asks_sentences and not config.questions.files else _data_seed(config)
    kept = {split: sample(splits[split], getattr(config.data, _CAPS[split]), seed) for split in config.asks & set(splits)}
    return read_asked({split: kept[split] for split in _CAPS if split in kept}, config.questions) if kept else None


def capped(config: Config, data: Data) -> Data:
    """The data with at most `max_*_samples` rows a split, and warnings: what a cap leaves out, classes without a row.

    A cap is a random sample by the seed, since a user's file may be sorted by label or by date. The embedded data is in a fixed
    shuffled order: its first rows are a sample already, the same for every seed.
    """
    seed = None if config.data.dataset_name in (EMBEDDED_DATASET, EMBEDDED_G2P) else _data_seed(config)
    kept = {}
    for split, part in data.splits.items():
        kept[split] = sample(part, getattr(config.data, _CAPS[split]), seed)
        if seed is not None and len(kept[split]) < len(part):
            logger.warning(
                "%s: %d of %d rows are used, a random sample, because of %s", split, len(kept[split]), len(part), _CAPS[split]
            )
    data = replace(data, splits=DatasetDict(kept))
    _warn_of_absent_classes(data)
    return data


def _data_seed(config: Config) -> int:
    return config.training.seed if config.training.data_seed is None else config.training.data_seed


def _warn_of_absent_classes(data: Data) -> None:
    """A warning for each of train and test which has no row of a class, in the file or after the cut."""
    for split, consequence in (("train", "the model cannot learn them"), ("test", "nothing is measured on them")):
        absent = absent_classes(data.splits[split], data.label_names) if split in data.splits else []
        if absent:
            shown = ", ".join(map(one_line, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            logger.warning(
                "%s is without a row of %d of the %d classes: %s; %s",
                split,
                len(absent),
                len(data.label_names),
                shown,
                consequence,
            )


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the model, the one named apart, or that of the embedded dictionary for a model from scratch.

    Raises: ValueError for one which cannot be had, and as `set_chat_template`.
    """
    tokenizer, path = _named_tokenizer(config), config.data.chat_template_path
    if path is not None:
        with loading(
            f"a chat template in {path}, a .jinja file or a tokenizer on the Hub or in a folder", "check chat_template_path"
        ):
            set_chat_template(tokenizer, path, trust_remote_code=config.model.trust_remote_code)
    return tokenizer


def _named_tokenizer(config: Config) -> Any:
    settings = config.model
    if settings.model_type and not settings.tokenizer_name:
        tokenizer = g2p_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE if config.run.task == "sft" else None
        return tokenizer
    name = settings.tokenizer_name or settings.model_name_or_path
    with loading(f"a tokenizer {name} on the Hub or in a folder", "check model_name_or_path, tokenizer_name and model_revision"):
        return AutoTokenizer.from_pretrained(
            model_path(name),
            revision=None if settings.tokenizer_name else settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
        )


def load_tokens(config: Config, data: Data, tokenizer: Any, form: ChatFormat | None) -> DatasetDict:
    """Token ids and labels of each split, by the task's own rule for labels. form: of conversations, `chat_format`."""
    settings, task = config.data, config.run.task
    affixes = {"source_prefix": settings.source_prefix, "source_suffix": settings.source_suffix}
    if task == "text-classification":
        return tokenise(data.splits, tokenizer, settings.max_length)
    if task == "token-classification":
        return tokenise_words(data.splits, tokenizer, settings.max_length)
    if form is not None:
        announce(form.learnt)
        return tokenise_conversations(data.splits, form, settings.max_length)
    if task in ("causal-lm", "sft"):
        completion_only = settings.completion_only_loss is not False
        return tokenise_causal(data.splits, tokenizer, settings.max_length, completion_only=completion_only, **affixes)
    return tokenise_seq2seq(data.splits, tokenizer, settings.max_length, max_target_length=settings.max_target_length, **affixes)


def chat_format(config: Config, data: Data, tokenizer: Any) -> ChatFormat | None:
    """How the conversations of the data are written; None for other data.

    Raises: ValueError as `ChatFormat.of`, and for settings which only conversations have.
    """
    settings = config.data
    asked = settings.assistant_only_loss, settings.completion_only_loss
    if isinstance(data, SequenceData) and data.conversational:
        return ChatFormat.of(tokenizer, data.splits["train"], *asked)
    columns = data.splits["train"].column_names
    names = ["assistant_only_loss", *([] if "source" in columns else ["completion_only_loss"])]
    given = next((name for name in names if getattr(settings, name) is not None), None)
    if given is not None:
        raise ValueError(
            f"expected conversations with {given}, got columns {columns} of texts; drop it: of a prompt and a completion which "
            "are texts, the completion alone is learnt, or both with completion_only_loss: false"
        )
    return None


def looked_at(config: Config, loaded: Loaded) -> list[str]:
    """The lines which a dry run shows of the data."""
    settings = config.data
    limits = dict.fromkeys(set(loaded.data.splits["train"].column_names) & {"text", "tokens", "source"}, settings.max_length)
    if config.run.task == "seq2seq":
        limits["target"] = settings.max_target_length or settings.max_length
    if loaded.form is not None:
        limits = {"conversations": settings.max_length}
    return preview(
        loaded.data.splits, loaded.tokens, loaded.data.label_names, loaded.tokenizer, loaded.available, limits,
        (settings.source_prefix, settings.source_suffix), loaded.form,
    )  # fmt: skip


def load_distillation_teacher(config: Config, tokenizer: Any) -> Any:
    """The teacher which the settings name, or None; it must read the student's token ids."""
    name = config.training.distillation_teacher
    if name is None:
        return None
    trusted = {"trust_remote_code": config.model.trust_remote_code}
    with loading(f"the teacher {name} on the Hub or in a folder", "check distillation_teacher"):
        return load_teacher(model_path(name), TASKS[config.run.task].auto_model, tokenizer, **trusted)


def load_model(config: Config, data: Data, tokenizer: Any) -> Any:
    """The model of the task, pretrained or with random weights, label names in its config, and adapters if asked for.

    Raises: ValueError for a model which is not there, cannot be read or has no such setting as an override names.
    """
    settings, task = config.model, TASKS[config.run.task]
    changes = dict(settings.overrides)
    if task.has_classes:
        changes |= {"id2label": dict(enumerate(data.label_names)), "label2id": {n: i for i, n in enumerate(data.label_names)}}
    if settings.model_type:
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        if TASKS["seq2seq"] is task:  # what the decoder starts with and must end with
            special |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
            if tokenizer.bos_token_id is None and changes.get("decoder_start_token_id") is None:
                raise ValueError(
                    f"expected a tokenizer with a bos_token, with which the decoder starts, got {type(tokenizer).__name__} "
                    "without one; name another tokenizer, or the id in model_config_overrides: {decoder_start_token_id: ...}"
                )
        with loading(f"a model_type which transformers knows, {settings.model_type!r}", "see the names of its models"):
            _check_overrides(AutoConfig.for_model(settings.model_type), settings.overrides)
            scratch = AutoConfig.for_model(settings.model_type, **{"vocab_size": len(tokenizer)} | special | changes)
        model = task.auto_model.from_config(scratch)
    else:
        name = settings.model_name_or_path
        given = {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
        with loading(f"the model {name} in safetensors on the Hub or in a folder", "check model_name_or_path and model_revision"):
            if settings.overrides:
                _check_overrides(AutoConfig.from_pretrained(model_path(name), **given), settings.overrides)
            model = load_weights(
                task.auto_model,
                model_path(name),
                ignore_mismatched_sizes=settings.ignore_mismatched_sizes,
                **given,
                **changes,
            )
        if config.training.do_train and hasattr(model.config, "calibration_temperature"):  # these weights will change
            del model.config.calibration_temperature
    if settings.peft == "none":
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        task_type=TaskType[task.peft_task],
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    return get_peft_model(model, lora)


def _check_overrides(known: Any, overrides: dict[str, Any]) -> None:
    unknown = [name for name in overrides if not hasattr(known, name)]
    if unknown:
        near = nearest(unknown[0], known.to_dict())
        raise ValueError(
            f"expected fields of {type(known).__name__} in model_config_overrides, got {unknown[0]!r}{near}; see its docs"
        )


def check_tokens(tokens: DatasetDict, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer which is not the model's, as far as it shows: unknown words only, or ids which the model has not.

    Raises: ValueError.
    """
    rows = tokens["train"].select(range(min(len(tokens["train"]), 200)))["input_ids"]
    ids, special = {token for row in rows for token in row}, set(tokenizer.all_special_ids)
    if ids and ids <= special and len(rows) > 1:
        raise ValueError(
            f"expected a tokenizer which knows the words of train, got special tokens only from {type(tokenizer).__name__} with "
            f"{len(tokenizer)} tokens; set tokenizer_name, or put the files of the tokenizer beside the model"
        )
    size = model.get_input_embeddings().weight.shape[0]
    if (
        len(tokenizer) > size > 0
        and (largest := max(token for part in tokens.values() for row in part["input_ids"] for token in row)) >= size
    ):
        raise ValueError(
            f"expected token ids below {size}, the vocabulary of the model, got {largest}; set tokenizer_name to the model's own"
        )


def read_asked(splits: Mapping[str, Dataset], settings: QuestionArguments) -> QuestionData:
    """The questions of some splits as the settings say, after the examples of their few-shot file.

    Raises: ValueError as `read_questions`, and where most questions of test are in validation.
    """
    examples = read_files({FEW_SHOT: settings.few_shot_file})[FEW_SHOT] if settings.few_shot_file else None
    data = read_questions(splits, settings, examples)
    prompts = {split: [f"{q.prompt} {q.options}" for q in questions] for split, questions in data.splits.items()}
    check_overlap({split: Dataset.from_dict({"text": texts}) for split, texts in prompts.items()})
    return data


def first_prompt(data: QuestionData, settings: QuestionArguments) -> str:
    """The first question of the reported split as the model reads it, each line behind a bar."""
    text = "".join(_completed(data.splits["test"][0], settings))
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def as_completions(data: ClassificationData, settings: QuestionArguments) -> SequenceData:
    """Texts and their classes as what a language model learns: `source`, the prompt of the question, and `target`, its answer.

    Both are the text on which the answers are scored, the blanks at the end of the prompt with the target.
    """
    asked = read_asked(data.splits, settings)
    made = {}
    for split, questions in asked.splits.items():
        pairs = [_completed(question, settings) for question in questions]
        made[split] = Dataset.from_dict({"source": [prompt for prompt, _ in pairs], "target": [answer for _, answer in pairs]})
    return SequenceData(DatasetDict(made), (), data.name, data.hub_id, data.licence, made["test"][0]["source"])


def _completed(question: Question, settings: QuestionArguments) -> tuple[str, str]:
    """The prompt of a question and its right option, as they are scored."""
    return continuation(question.prompt, question.options[question.answer or 0], settings.option_prefix)
