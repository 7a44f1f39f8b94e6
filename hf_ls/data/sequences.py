"""Loading and tokenising data for sequence-to-sequence, causal language modelling and token classification.

What comes out are rows of `input_ids`, `attention_mask` and `labels`, which `DataCollatorForSeq2Seq` pads, the labels with −100.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value

from hf_ls.common.models import IGNORE_INDEX
from hf_ls.data.classification import check_columns, read_splits
from hf_ls.data.conversations import FOR_TEMPLATE, check_conversations, prompt_text
from hf_ls.data.guessing import guess_columns
from hf_ls.data.labels import check_distinct, class_name, classes_of, folded
from hf_ls.data.reading import check_length, check_text_type, conversation_columns
from hf_ls.data.splitting import Rows, check_overlap, same_text, with_held_out
from hf_ls.data.truncation import count_cut, warn_of, with_labels, without_lost
from hf_ls.losses.priors import count_labels

logger = logging.getLogger(__name__)

SequenceTask = Literal["seq2seq", "causal-lm", "sft", "token-classification"]


@dataclass(frozen=True)
class SequenceData:
    """Splits with the columns of a task, and what is known about where they come from.

    Columns: `source` and `target` (seq2seq, or prompt and completion), `text` (causal-lm), `tokens` and `tags`
    (token-classification; `label_names` are those of the tags, and empty for the other tasks), those of `conversations` (sft).
    `example` and `notes` as in `ClassificationData`.
    """

    splits: DatasetDict
    label_names: tuple[str, ...]
    name: str
    hub_id: str | None
    licence: str | None
    example: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def conversational(self) -> bool:
        """Whether a row is a conversation, which a chat template writes as tokens."""
        return bool({"messages", "completion"} & {*self.splits["train"].column_names})


def load_sequences(
    task: SequenceTask,
    dataset_name: str | None,
    *,
    dataset_config: str | None = None,
    files: dict[str, str] | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    tokens_column: str | None = None,
    tags_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> SequenceData:
    """Train, validation and test splits of a dataset on the Hub or in local CSV, JSON or Parquet files.

    seq2seq reads `source_column` and `target_column`; causal-lm the same two as prompt and completion, or `text_column`; sft
    conversations in `messages_column`, or in the two as prompt and completion, else what causal-lm reads;
    token-classification a list of words and a list of tags per row. Columns which are not given are guessed (`guessing`); a dot
    reaches into a column of mappings: "translation.en". A missing validation or test split is cut as in `load_classification`.

    Raises: ValueError for an unknown task, missing splits or columns, columns of another type, empty rows, rows with another
    number of tags than words, fewer than two tags, and tags of a later split which train does not have.
    """
    if task not in get_args(SequenceTask):
        raise ValueError(f"expected a task among {get_args(SequenceTask)}, got {task!r}; text-classification has its own loader")
    raw, name, hub_id = read_splits(dataset_name, dataset_config, files)
    given = {
        "token-classification": {"tokens": tokens_column, "tags": tags_column},
        "seq2seq": {"source": source_column, "target": target_column},
        "causal-lm": _of_language_model(raw["train"], text_column, source_column, target_column),
        "sft": _of_conversations(raw["train"], messages_column, text_column, source_column, target_column),
    }[task]
    raw = raw.flatten() if any("." in (column or "") for column in given.values()) else raw
    columns, guessed = guess_columns(raw["train"], given)
    settings = " and ".join(f"{kind}_column" for kind in columns)
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"expected two columns, got {columns} from one; set {settings}")
    for split, part in raw.items():
        check_columns(part, split, list(columns.values()), settings)
        if task == "token-classification":
            _check_tag_columns(part, split, columns["tokens"], columns["tags"])
    names: tuple[str, ...] = ()
    splits = raw.select_columns(list(columns.values()))
    if task == "sft" and {*columns.values()} & {*conversation_columns(raw["train"])}:
        beside = [name for name in FOR_TEMPLATE if name in raw["train"].column_names]
        splits = raw.select_columns([*columns.values(), *beside])
        ours = {"source": "prompt", "target": "completion", "text": "messages"}
        columns = {ours.get(kind, kind): column for kind, column in columns.items()}
    elif task != "token-classification":
        splits = _checked_text(splits, drop_empty="text" in columns)
    splits = splits.rename_columns({old: new for new, old in columns.items() if old != new})
    if {"messages", "completion"} & columns.keys():
        check_conversations(splits, columns)
    if task == "token-classification":
        splits, names = _integer_tags(splits, columns["tags"])
    fractions = {"test": test_fraction, "validation": validation_fraction}
    splits, cut = with_held_out(splits, fractions, seed, _rows, "the rarest tag of each row" if names else None)
    return SequenceData(splits, names, name, hub_id, None, notes=(*([guessed] if guessed else ()), *cut))


def _of_language_model(train: Dataset, text: str | None, source: str | None, target: str | None) -> dict[str, str | None]:
    """Which columns causal-lm reads: the given ones, `text`, prompts and completions by their names, or the texts there are."""
    if source is not None or target is not None:
        return {"source": source, "target": target}
    if text is None and "text" not in train.column_names:
        with suppress(ValueError):
            pair: dict[str, str | None] = {"source": None, "target": None}
            guess_columns(train, pair)
            return pair
    return {"text": text}


def _of_conversations(
    train: Dataset, messages: str | None, text: str | None, source: str | None, target: str | None
) -> dict[str, str | None]:
    """Which columns sft reads: conversations where there are any and no other column is given, else as causal-lm."""
    found = conversation_columns(train)
    if messages is None and (not found or text is not None or source is not None or target is not None):
        return _of_language_model(train, text, source, target)
    if messages is None:
        with suppress(ValueError):
            pair: dict[str, str | None] = {"source": None, "target": None}
            if {*guess_columns(train, pair)[0].values()} <= {*found}:
                return pair
    return {"messages": messages}


def _rows(part: Dataset) -> Rows:
    """By the rarest tag of each row, so that rare ones are in every split; other tasks have one stratum."""
    if "tags" not in part.column_names:
        return Rows(["" for _ in range(len(part))], texts_of(part))
    counts = Counter(tag for tags in part["tags"] for tag in tags)
    return Rows([str(min(tags, key=lambda tag: counts[tag], default="")) for tags in part["tags"]], texts_of(part))


def texts_of(part: Dataset) -> list[str]:
    """What a model is asked in each row, as `same_text` makes it: its source, text, words or prompt."""
    if "messages" in part.column_names or "completion" in part.column_names:
        return [same_text(prompt_text(row)) for row in part]
    if "tokens" in part.column_names:
        return [same_text(*words) for words in part["tokens"]]
    return [same_text(text) for text in part["source" if "source" in part.column_names else "text"]]


def _checked_text(splits: DatasetDict, drop_empty: bool) -> DatasetDict:
    """Only text in every row; empty documents of a corpus are left out, empty sources and targets refused."""
    kept = {}
    for split, part in splits.items():
        check_length(part, split)
        for column in part.column_names:
            check_text_type(part, split, column)
        full = [i for i, row in enumerate(part) if all(value and not value.isspace() for value in row.values())]
        if len(full) < len(part):
            if not drop_empty or not full:
                first = next(i for i in range(len(part)) if i >= len(full) or full[i] != i)
                raise ValueError(
                    f"expected text in every row of {split}, got {len(part) - len(full)} empty of {len(part)} (the first is row "
                    f"{first}); drop those rows"
                )
            logger.warning(
                "%s: %d rows of %d are left out, because their text is missing or blank", split, len(part) - len(full), len(part)
            )
            part = part.select(full)
        kept[split] = part
    return DatasetDict(kept)


def _check_tag_columns(part: Dataset, split: str, tokens_column: str, tags_column: str) -> None:
    """A list of words and a list of as many tags in every row."""
    for column, what in ((tokens_column, "words"), (tags_column, "tags")):
        if not isinstance(part.features[column], List | LargeList):
            raise ValueError(
                f"expected a list of {what} per row in column {column!r} of {split}, got {part.features[column]}; CSV cannot "
                "hold lists: use JSON lines or Parquet"
            )
    if getattr(part.features[tokens_column].feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"expected words in {split}, got {part.features[tokens_column]} in column {tokens_column!r}; set tokens_column"
        )
    if not isinstance(part.features[tags_column].feature, ClassLabel | Value):
        raise ValueError(
            f"expected one tag per word in {split}, got {part.features[tags_column]} in column {tags_column!r}; set tags_column"
        )
    for i, (words, tags) in enumerate(zip(part[tokens_column], part[tags_column], strict=True)):
        if words is None or tags is None or len(words) != len(tags) or None in words or None in tags:
            sizes = [len(values or ()) for values in (words, tags)]
            raise ValueError(
                f"expected one tag per word, got {sizes[0]} words and {sizes[1]} tags (or missing ones) in row {i} of {split}; "
                "fix or drop that row"
            )


def _integer_tags(splits: DatasetDict, column: str) -> tuple[DatasetDict, tuple[str, ...]]:
    """Tags as class ids, −100 for ignored ones, and the names of the classes; `column` is that of the user."""
    named = splits["train"].features["tags"].feature
    seen = {split: {tag for tags in part["tags"] for tag in tags} - {IGNORE_INDEX} for split, part in splits.items()}
    if isinstance(named, ClassLabel):
        classes, names = list(range(named.num_classes)), tuple(named.names)
        check_distinct(names, f"train, column {column!r}")
    else:
        if any(isinstance(tag, float | bool) for tag in seen["train"]):
            raise ValueError(f"expected tags as words or integers, got {named} in column {column!r}; set tags_column")
        classes = classes_of(seen["train"], f"train, column {column!r}")
        names = tuple(map(class_name, classes))
    if len(classes) < 2:
        raise ValueError(f"expected at least 2 tags in train, got {classes}; check tags_column")
    ids = {folded(tag): i for i, tag in enumerate(classes)}
    for split, tags in seen.items():
        unknown = sorted(str(tag) for tag in tags if folded(tag) not in ids)
        if unknown:
            raise ValueError(f"expected only tags known from train, got {unknown} in {split}; fix or drop those rows")
    id_of = {tag: ids[folded(tag)] for tags in seen.values() for tag in tags} | {IGNORE_INDEX: IGNORE_INDEX}
    features = Features({"tokens": List(Value("string")), "tags": List(Value("int64"))})
    integers = {
        split: Dataset.from_dict(
            {"tokens": list(part["tokens"]), "tags": [[id_of[tag] for tag in tags] for tags in part["tags"]]}, features=features
        )
        for split, part in splits.items()
    }
    return DatasetDict(integers), names


def check_sequence_overlap(splits: DatasetDict) -> None:
    """Refuse to select on the test data and warn about test sources, texts or sentences which training has seen.

    Raises: ValueError as `data.check_overlap`.
    """
    column = next(name for name in ("source", "text", "tokens", "messages", "completion") if name in splits["train"].column_names)
    if column in ("messages", "completion"):
        check_overlap({split: Dataset.from_dict({"text": [*map(prompt_text, part)]}) for split, part in splits.items()})
        return
    texts = splits.select_columns([column])
    if column == "tokens":
        check_overlap(texts.map(lambda row: {"text": " ".join(row["tokens"])}, remove_columns=["tokens"], desc="overlap"))
    else:
        check_overlap(texts if column == "text" else texts.rename_column(column, "text"))


def tokenise_seq2seq(
    splits: DatasetDict,
    tokenizer: Any,
    max_length: int,
    *,
    max_target_length: int | None = None,
    source_prefix: str = "",
    source_suffix: str = "",
) -> DatasetDict:
    """`input_ids` of each source, `labels` of each target; rows stay in order. Cut rows are counted in a warning.

    Args:
        max_length: tokens kept of a source; `max_target_length` of a target (the same if None), special tokens included.
        source_prefix: put before every source, such as T5's "translate English to German: "; `source_suffix` after it.
    """
    target_length = max_target_length or max_length

    def encode(batch: dict[str, list]) -> dict[str, list]:
        sources = [source_prefix + text + source_suffix for text in batch["source"]]
        encoded = tokenizer(sources, truncation=True, max_length=max_length)
        labels = tokenizer(text_target=batch["target"], truncation=True, max_length=target_length)["input_ids"]
        cut_sources = count_cut(encoded["input_ids"], max_length, lambda i: tokenizer(sources[i], verbose=False))
        cut_targets = count_cut(labels, target_length, lambda i: tokenizer(text_target=batch["target"][i], verbose=False))
        return {**encoded, "labels": labels, "cut_sources": cut_sources, "cut_targets": cut_targets}

    tokens = splits.map(encode, batched=True, remove_columns=splits["train"].column_names, desc="tokenising")
    tokens = warn_of(tokens, "cut_sources", f"sources lose what is beyond {max_length} tokens; raise max_length")
    return warn_of(tokens, "cut_targets", f"targets lose what is beyond {target_length} tokens; raise max_target_length")


def tokenise_causal(
    splits: DatasetDict,
    tokenizer: Any,
    max_length: int,
    *,
    source_prefix: str = "",
    source_suffix: str = "",
    completion_only: bool = True,
) -> DatasetDict:
    """Token rows of at most `max_length` for next-token prediction, the end-of-sequence token after each document.

    Documents (`text`): a longer one is cut into blocks which overlap by one token, so that each token but the first of the
    document is predicted exactly once; blocks never mix documents. Prompts and completions (`source`, `target`): one row each,
    in order, with −100 as label of the prompt, unless it is to be learnt too (`completion_only=False`); both parts are tokenised
    apart, as in generation, so a completion which begins a new word needs its blank in `source_suffix` or in the target. Cut
    completions are counted in a warning.

    Raises: ValueError for max_length < 2, a tokenizer without an end-of-sequence token, and prompts which leave no room for any
    completion.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("expected a tokenizer with an end-of-sequence token, got none; set tokenizer.eos_token")
    if max_length < 2:
        raise ValueError(f"expected max_length >= 2, got {max_length}: one token predicts the next; 512 is a usual value")

    def documents(batch: dict[str, list]) -> dict[str, list]:
        inputs, labels = [], []
        for ids in tokenizer(batch["text"], verbose=False)["input_ids"]:
            ids = ids if ids[-1:] == [end] else [*ids, end]
            # A document of one token predicts nothing: its only block is kept until it has been counted.
            for start in range(0, max(len(ids) - 1, 1), max_length - 1):
                block = ids[start : start + max_length]
                inputs.append(block)
                # The block before has predicted the token where they overlap.
                labels.append([IGNORE_INDEX, *block[1:]] if start else list(block))
        masks = [[1] * len(ids) for ids in inputs]
        return {"input_ids": inputs, "attention_mask": masks, "labels": labels, "lost": [int(len(ids) < 2) for ids in inputs]}

    def completions(batch: dict[str, list]) -> dict[str, list]:
        prompts = tokenizer([source_prefix + text + source_suffix for text in batch["source"]], verbose=False)["input_ids"]
        targets = tokenizer(batch["target"], add_special_tokens=False, verbose=False)["input_ids"]
        inputs, labels, cut, lost = [], [], [], []
        for prompt, target in zip(prompts, targets, strict=True):
            prompt = prompt[:-1] if prompt[-1:] == [end] else prompt  # the tokenizer's own end would be in the middle
            inputs.append([*prompt, *target, end][:max_length])
            before = [IGNORE_INDEX] * len(prompt) if completion_only else prompt
            labels.append([*before, *target, end][:max_length])
            cut.append(int(len(prompt) + len(target) + 1 > max_length))
            lost.append(int(completion_only and len(prompt) >= max_length))
        masks = [[1] * len(ids) for ids in inputs]
        return {"input_ids": inputs, "attention_mask": masks, "labels": labels, "cut": cut, "lost": lost}

    columns = splits["train"].column_names
    if "text" in columns:
        tokens = splits.map(documents, batched=True, remove_columns=columns, desc="tokenising")
        tokens = without_lost(tokens, "documents are left out, because the tokenizer makes no token of them")
        return with_labels(tokens, "documents of more than one token", "none; use the tokenizer of the model")
    tokens = splits.map(completions, batched=True, remove_columns=columns, desc="tokenising")
    tokens = warn_of(tokens, "cut", f"rows lose the end of their completion beyond {max_length} tokens; raise max_length")
    tokens = warn_of(
        tokens, "lost", f"rows count for nothing, because their prompt alone fills {max_length} tokens; raise max_length"
    )
    return with_labels(tokens, f"completions within max_length={max_length}", "prompts which fill it; raise max_length")


def tokenise_words(splits: DatasetDict, tokenizer: Any, max_length: int) -> DatasetDict:
    """Token rows of word lists: the first sub-token of a word carries its tag, all other positions −100.

    Rows stay in order. Words lost to truncation, or because the tokenizer makes no token of them, are counted in a warning.

    Raises: ValueError for a tokenizer which does not know its words, or which would write them without blanks between them.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"expected a fast tokenizer, which knows its words, got {type(tokenizer).__name__}; use a fast one")
    listed, written = tokenizer(["word", "word"], is_split_into_words=True), tokenizer("word word", add_special_tokens=False)
    if written["input_ids"] != [
        token for token, word in zip(listed["input_ids"], listed.word_ids(), strict=True) if word is not None
    ]:
        # GPT-2 and RoBERTa: the words would be stuck together, which transformers 5 no longer refuses.
        raise ValueError(
            "expected a tokenizer with a blank before each word, got one without; load it with add_prefix_space=True"
        )

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels, lost = [], []
        for i, tags in enumerate(batch["tags"]):
            words = encoded.word_ids(i)
            before = [None, *words[:-1]]
            first = [word is not None and word != last for word, last in zip(words, before, strict=True)]
            labels.append([tags[word] if starts else IGNORE_INDEX for word, starts in zip(words, first, strict=True)])
            lost.append(len(tags) - sum(first))
        return {**encoded, "labels": labels, "lost": lost}

    tokens = splits.map(encode, batched=True, remove_columns=splits["train"].column_names, desc="tokenising")
    tokens = warn_of(tokens, "lost", f"words are beyond {max_length} tokens or have none and count for nothing; raise max_length")
    return with_labels(
        tokens, f"words with a tag within max_length={max_length}", "none; raise max_length or check the tokenizer"
    )


def token_counts(tokens: Dataset, vocab_size: int) -> np.ndarray:
    """How often each token is a label in a tokenised split, exact int64 [V]; −100 is not counted.

    Raises: as `priors.count_labels`.
    """
    return count_labels(tokens.select_columns(["labels"]).with_format("numpy"), vocab_size).numpy()
