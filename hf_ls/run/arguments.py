"""The settings of a run, a dataclass for each of model, data, questions and the rest; `config` puts them together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_ls.answers.reading import QuestionArguments
from hf_ls.data.classification import EMBEDDED_DATASET, EMBEDDED_MODEL


def about(text: str) -> dict[str, Any]:
    """The metadata of a setting: what --help says about it."""
    return {"help": text}


@dataclass
class ModelArguments:
    """Which model, and how it is changed before training."""

    model_name_or_path: str = field(default=EMBEDDED_MODEL, metadata=about("Hub id or folder; the default is in hf_ls[demo]."))
    model_revision: str = field(default="main", metadata=about("Branch, tag or commit on the Hub."))
    model_config_overrides: str | None = field(
        default=None, metadata=about("Config fields to change, as JSON or a YAML mapping, e.g. {num_hidden_layers: 3}.")
    )
    model_type: str | None = field(
        default=None, metadata=about("Train this architecture from random weights, e.g. bart, instead of model_name_or_path.")
    )
    tokenizer_name: str | None = field(default=None, metadata=about("Hub id or folder of the tokenizer, when not the model's."))
    ignore_mismatched_sizes: bool = field(
        default=False, metadata=about("Start a new classifier head when the model's own has another number of classes.")
    )
    peft: Literal["none", "lora"] = field(default="none", metadata=about("Train low-rank adapters instead of all weights."))
    lora_r: int = field(default=8, metadata=about("Rank of the adapters."))
    lora_alpha: int = field(default=16, metadata=about("Scale of the adapters."))
    lora_dropout: float = field(default=0.0, metadata=about("Dropout before the adapters."))
    trust_remote_code: bool = field(default=False, metadata=about("Run code from the model's repository."))

    def __post_init__(self) -> None:
        self.overrides: dict[str, Any] = {}
        if self.model_config_overrides:
            try:
                self.overrides = json.loads(self.model_config_overrides)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'expected model_config_overrides as JSON, got {self.model_config_overrides!r}; write {{"a": 1}}'
                ) from error
            if not isinstance(self.overrides, dict):
                raise ValueError(f"expected model_config_overrides as a mapping, got {self.overrides!r}; write name: value")


@dataclass
class DataArguments:
    """Which data: the embedded snippets, a dataset on the Hub, or local CSV, JSON or Parquet files."""

    dataset_name: str | None = field(default=None, metadata=about(f"Hub id, or '{EMBEDDED_DATASET}' for the embedded data."))
    dataset_config_name: str | None = field(default=None, metadata=about("Configuration of the dataset on the Hub."))
    snippet_sources: list[str] = field(default_factory=list, metadata=about("Embedded data only: keep these sources."))
    train_file: str | None = field(default=None, metadata=about("Local CSV, TSV, JSON, JSONL or Parquet file."))
    validation_file: str | None = field(default=None, metadata=about("As train_file; cut from train when missing."))
    test_file: str | None = field(default=None, metadata=about("As train_file; only ever reported on."))
    text_column: str | None = field(default=None, metadata=about("Column with the text; `text`, or guessed and said."))
    text_pair_column: str | None = field(default=None, metadata=about("Column with a second text, for sentence pairs."))
    label_column: str | None = field(default=None, metadata=about("Column with one class per row; `label`, or guessed and said."))
    soft_label_columns: list[str] = field(
        default_factory=list,
        metadata=about("Raters or teachers instead of label_column: a column of lists or mappings, or one of counts per class."),
    )
    soft_label_names: list[str] = field(default_factory=list, metadata=about("Names of the classes in such a list, in order."))
    source_column: str | None = field(
        default=None, metadata=about("seq2seq: column with the source; causal-lm and sft: with the prompt.")
    )
    target_column: str | None = field(
        default=None, metadata=about("seq2seq: column with the target; causal-lm and sft: the completion.")
    )
    messages_column: str | None = field(
        default=None, metadata=about("sft: column with lists of messages; `messages`, or guessed and said.")
    )
    chat_template_path: str | None = field(
        default=None,
        metadata=about("sft: chat template, a .jinja file or a tokenizer which has one; the tokenizer's own if none."),
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata=about("sft: learn what the assistant says alone; so where the chat template marks it.")
    )
    completion_only_loss: bool | None = field(
        default=None, metadata=about("Language models: learn the completions alone, not the prompts; so where rows have both.")
    )
    packing: bool = field(
        default=False, metadata=about("sft: several examples in one row of max_length, in training; fast with FlashAttention.")
    )
    source_prefix: str = field(default="", metadata=about("Text before each source, such as T5's task prefix."))
    source_suffix: str = field(default="", metadata=about("Text after each source, such as the blank before a completion."))
    tokens_column: str | None = field(
        default=None, metadata=about("token-classification: column with the list of words; `tokens`, or guessed and said.")
    )
    tags_column: str | None = field(
        default=None, metadata=about("token-classification: column with one tag per word; `ner_tags`, or guessed and said.")
    )
    validation_fraction: float = field(
        default=0.1, metadata=about("Share of train which is held out when there is no validation split, stratified.")
    )
    test_fraction: float = field(
        default=0.1, metadata=about("The same when there is no test split; 0 for no test: validation is reported then.")
    )
    max_length: int = field(default=128, metadata=about("Tokens kept of each example."))
    max_target_length: int | None = field(default=None, metadata=about("Tokens kept of each target; as max_length if not given."))
    max_train_samples: int | None = field(
        default=None,
        metadata=about("Use only so many training examples: a random sample by the seed (embedded data: the first)."),
    )
    max_eval_samples: int | None = field(default=None, metadata=about("The same for validation."))
    max_predict_samples: int | None = field(default=None, metadata=about("The same for test."))

    def __post_init__(self) -> None:
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        self.files = {split: path for split, path in files.items() if path}
        if bool(self.dataset_name) == bool(self.files):
            raise ValueError(
                f"expected either dataset_name or train_file, got {self.dataset_name} and {self.files}; set one "
                f"(dataset_name: {EMBEDDED_DATASET} is the embedded data)"
            )
        if self.files and not self.train_file:
            raise ValueError(f"expected train_file, got only {sorted(self.files)}; add --train_file")
        resolved = [Path(path).resolve() for path in self.files.values()]
        if len(set(resolved)) != len(resolved):
            raise ValueError(f"expected different files per split, got {self.files}; never select or train on the test data")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected 0 < validation_fraction < 1, got {self.validation_fraction}; 0.1 is a usual value")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"expected 0 <= test_fraction < 1, got {self.test_fraction}; 0.1 is a usual value, 0 for no test")
        if self.snippet_sources and self.dataset_name != EMBEDDED_DATASET:
            raise ValueError(
                f"expected snippet_sources only with dataset_name: {EMBEDDED_DATASET}, got {self.dataset_name}; drop it"
            )
        for name in ("max_length", "max_target_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}; leave it out for no limit")


@dataclass(kw_only=True)
class TrainingQuestions(QuestionArguments):
    """Questions beside the training data of a language model, and how they become prompts."""

    question_file: str | None = field(
        default=None, metadata=about("Language models: questions whose answers are reported on, beside the tokens of test.")
    )
    validation_question_file: str | None = field(
        default=None,
        metadata=about("As question_file; followed in training, and the temperature of the answers is fitted on them."),
    )

    def __post_init__(self) -> None:
        files = {"validation": self.validation_question_file, "test": self.question_file}
        self.files = {split: path for split, path in files.items() if path}
        if self.files and not self.question_file:
            raise ValueError("expected question_file beside validation_question_file, got none; name the questions to report")


@dataclass
class RunArguments:
    """What the run does besides training."""

    task: Literal["text-classification", "token-classification", "seq2seq", "causal-lm", "sft"] = field(
        default="text-classification", metadata=about("The task; sft: conversations, through TRL.")
    )
    text_metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "chrf"],
        metadata=about("Quality of what seq2seq models generate: exact_match, word_error_rate, phoneme_error_rate, bleu, chrf."),
    )
    with_baseline: bool = field(default=False, metadata=about("First train the same model with epsilon = 0, for the comparison."))
    class_weight: Literal["none", "balanced"] = field(
        default="none",
        metadata=about("balanced: an example of class k counts n / (K n_k) times in training, in the baseline too."),
    )
    soft_labels: Literal["train", "evaluate"] = field(
        default="train",
        metadata=about("With soft_label_columns: train on the distributions (labels in the runs beside it), or only measure."),
    )
    bake_temperature: bool = field(
        default=False, metadata=about("Divide the saved classifier's weights by the temperature fitted on validation.")
    )
    early_stopping_patience: int | None = field(
        default=None, metadata=about("Stop after so many evaluations without a better metric_for_best_model.")
    )
    dry_run: bool = field(default=False, metadata=about("Check settings, data and model, then stop before training."))
    overwrite_output_dir: bool = field(
        default=False, metadata=about("Delete the earlier run in output_dir; refused where anything else is in it.")
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"expected early_stopping_patience >= 1, got {self.early_stopping_patience}; leave it out for none")
