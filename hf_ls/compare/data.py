"""The data of a comparison: prepared once, with label noise and out-of-domain sets, as files which every cell reads."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import ClassLabel, Dataset, List, concatenate_datasets

from hf_ls.common.files import write_atomically
from hf_ls.common.models import IGNORE_INDEX
from hf_ls.data.classification import EMBEDDED_DATASET, ClassificationData, load_snippets
from hf_ls.data.conversations import FOR_TEMPLATE, pairs_as_conversations
from hf_ls.data.labels import folded
from hf_ls.data.reading import read_files
from hf_ls.data.sequences import SequenceData, SequenceTask, load_sequences, texts_of
from hf_ls.data.splitting import same_text
from hf_ls.metrics.ceiling import guessing_scores
from hf_ls.run.config import Config
from hf_ls.run.loading import Data, capped, load_data, load_questions

logger = logging.getLogger(__name__)

# Column of a file which cells read -> the setting which names it; what stands beside these is for chat templates.
_COLUMNS = {name: f"{name}_column" for name in ("text", "text_pair", "label")}
_SEQUENCE_COLUMNS = {name: f"{name}_column" for name in ("text", "source", "target", "messages", "tokens", "tags")}
_SEQUENCE_COLUMNS |= {"prompt": "source_column", "completion": "target_column"}


@dataclass(frozen=True)
class CompareData:
    """Where the data lie and what they are.

    label_names: of classes or tags, none for language models. columns: setting of a run -> column of all files.
    train: seed -> file (one file for all seeds without label noise). others: "validation", "test" -> file.
    ood: name of an out-of-domain set -> file. questions: "test", "validation" -> file, none without any; guessing: as in
    `Comparison`. sizes, hashes: file name -> how many rows it has, and their SHA-256.
    """

    name: str
    label_names: tuple[str, ...]
    columns: dict[str, str]
    train: dict[int, Path]
    others: dict[str, Path]
    ood: dict[str, Path]
    sizes: dict[str, int]
    hashes: dict[str, str]
    questions: dict[str, Path]
    guessing: tuple[float, float] | None = None


def prepare_data(
    config: Config,
    folder: Path,
    seeds: Sequence[int],
    *,
    flip_labels: float = 0.0,
    ood_sources: Sequence[str] = (),
    ood_files: Mapping[str, str] | None = None,
    ood_samples: int = 1000,
) -> CompareData:
    """Load, split, flip and write everything that the cells read, to `folder`.

    Validation and test keep their labels. Out-of-domain sets keep at most `ood_samples` rows, none of whose texts is in
    train, validation or test.

    Raises: ValueError for missing splits, unknown sources, and labels which train does not have.
    """
    data = _in_domain(config, ood_sources)
    missing = {"train", "validation", "test"} - set(data.splits)
    if missing:
        raise ValueError(f"expected train, validation and test, got no {sorted(missing)}; give --test_file (test reports alone)")
    known = _COLUMNS if isinstance(data, ClassificationData) else _SEQUENCE_COLUMNS
    columns = [column for column in data.splits["train"].column_names if column in (*known, *FOR_TEMPLATE)]
    parts = {split: _named(part.select_columns(columns), data) for split, part in data.splits.items()}
    seen = {text for part in parts.values() for text in _texts(part)}
    ood = {source: _rows_of_source(source, data) for source in ood_sources}
    for name, path in (ood_files or {}).items():
        if isinstance(data, ClassificationData):
            ood[name] = read_labelled(Path(path), config, data)
        else:
            ood[name] = _named(read_sequences(Path(path), config, data), data)
    tables: dict[str, Dataset] = {"validation": parts["validation"], "test": parts["test"]}
    if flip_labels:
        for seed in seeds:
            tables[f"train-seed{seed}"] = flip(parts["train"], flip_labels, len(data.label_names), seed)
    else:
        tables["train"] = parts["train"]
    for name, rows in ood.items():
        apart = [i for i, text in enumerate(_texts(rows)) if text not in seen][:ood_samples]
        if not apart:
            raise ValueError(f"expected examples in {name} which are not in train, validation or test, got none; drop that set")
        tables[f"ood-{name}"] = rows.select(apart).select_columns([c for c in columns if c in rows.column_names])
    asked = load_questions(config)
    questions = {} if asked is None else asked.splits
    for split, own in questions.items():
        rows_of = [{"prompt": q.prompt, "options": list(q.options), "answer": q.answer} for q in own]
        tables[f"questions-{split}"] = Dataset.from_list(rows_of)
    tested = [question.options for question in questions.get("test", ())]
    files = {}
    for name, table in tables.items():
        files[name] = folder / f"{name}.parquet"
        _write(table, files[name])
    return CompareData(
        name=data.name,
        label_names=data.label_names,
        columns={known[column]: column for column in columns if column in known},
        train={seed: files.get(f"train-seed{seed}", files.get("train", Path())) for seed in seeds},
        others={split: files[split] for split in ("validation", "test")},
        ood={name: files[f"ood-{name}"] for name in ood},
        sizes={name: len(table) for name, table in tables.items()},
        hashes={name: _hash(table) for name, table in tables.items()},
        questions={split: files[f"questions-{split}"] for split in questions},
        guessing=guessing_scores([len(options) for options in tested]) if len(set(tested)) > 1 else None,
    )


def flip(train: Dataset, share: float, num_classes: int, seed: int) -> Dataset:
    """The rows with round(share·n) labels moved to one of the other K−1 classes, each equally likely.

    Raises: ValueError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected 0 <= flip_labels < 1, got {share}; 0.2 flips one label in five")
    random = np.random.default_rng([seed, 1])
    labels = np.array(train["label"])
    rows = random.choice(len(labels), size=round(share * len(labels)), replace=False)
    labels[rows] = (labels[rows] + random.integers(1, num_classes, size=len(rows))) % num_classes
    features = train.features
    return train.remove_columns("label").add_column("label", labels.tolist()).cast(features)


def read_labelled(path: Path, config: Config, data: ClassificationData) -> Dataset:
    """A file with the columns of the settings, its labels (names, equal as `folded` says, or ids 0..K−1) as ids of training.

    Raises: ValueError for a missing or unreadable file, missing columns, and unknown labels.
    """
    rows = read_files({"train": str(path)})["train"]
    names = dict(data.columns) or {config.data.text_column or "text": "text", config.data.label_column or "label": "label"}
    absent = [column for column in names if column not in rows.column_names]
    if absent:
        raise ValueError(f"expected columns {sorted(names)} in {path}, got no {absent}; name them as in the training data")
    rows = rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    feature = rows.features["label"]
    given = [feature.int2str(value) for value in rows["label"]] if isinstance(feature, ClassLabel) else rows["label"]
    ids = _ids_of_training(dict.fromkeys(given), data, "labels", path)
    labels = [ids[value] for value in given]
    return rows.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=list(data.label_names)))


def read_sequences(path: Path, config: Config, data: SequenceData) -> Dataset:
    """A file with the columns of the settings, or with names which are guessed as those of training; tags as ids of training.

    Raises: ValueError as `load_sequences`, for other columns than those of training, and for unknown tags.
    """
    names = ("text_column", "messages_column", "source_column", "target_column", "tokens_column", "tags_column")
    columns: dict[str, Any] = {name: getattr(config.data, name) for name in names}
    try:
        found = load_sequences(
            cast(SequenceTask, config.run.task), None,
            files={"train": str(path)}, validation_fraction=0.0, test_fraction=0.0, **columns,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"expected an out-of-domain set with the columns of the training data in {path}, got: {error}"
        ) from error
    splits = found.splits
    if data.conversational and not found.conversational and "source" in splits["train"].column_names:
        splits = pairs_as_conversations(splits)
    rows = splits["train"]
    wanted, got = (set(part.column_names) - {*FOR_TEMPLATE} for part in (data.splits["train"], rows))
    if wanted != got:
        raise ValueError(
            f"expected columns of {sorted(wanted)} in {path}, got {sorted(got)}; write the rows as those of training"
        )
    if not data.label_names:
        return rows
    ids = _ids_of_training(found.label_names, data, "tags", path)
    id_of = {i: ids[name] for i, name in enumerate(found.label_names)} | {IGNORE_INDEX: IGNORE_INDEX}
    tags = [[id_of[tag] for tag in row] for row in rows["tags"]]
    return rows.remove_columns("tags").add_column("tags", tags)


def _ids_of_training(given: Iterable[Any], data: Data, what: str, path: Path) -> dict[Any, int]:
    """The id in training of each label which is given: by its name, equal as `folded` says, or, where one is none, by its id.

    Raises: ValueError for unknown labels.
    """
    values = list(given)
    ids = {folded(name): i for i, name in enumerate(data.label_names)}
    if not {folded(value) for value in values} <= set(ids):
        ids = {str(i): i for i in range(len(data.label_names))}
    unknown = sorted({str(value) for value in values if folded(value) not in ids})
    if unknown:
        raise ValueError(f"expected {what} among {list(data.label_names)} in {path}, got {unknown[:5]}; fix or drop those rows")
    return {value: ids[folded(value)] for value in values}


def _named(part: Dataset, data: Data) -> Dataset:
    """Tags with their names, which a file keeps; other data as they are."""
    if "tags" not in part.column_names:
        return part
    return part.cast_column("tags", List(ClassLabel(names=list(data.label_names))))


def _in_domain(config: Config, ood_sources: Sequence[str]) -> Data:
    if ood_sources:
        if config.data.dataset_name != EMBEDDED_DATASET:
            raise ValueError(
                f"expected ood_sources only with dataset_name: {EMBEDDED_DATASET}, got {config.data.dataset_name}; use --ood_file"
            )
        wanted = config.data.snippet_sources
        known = sorted(set(load_snippets(wanted).splits["train"]["source"]))
        unknown = sorted(set(ood_sources) - set(known))
        kept = [source for source in known if source not in ood_sources]
        if unknown or not kept:
            raise ValueError(f"expected some, not all, of the sources {known} in ood_sources, got {list(ood_sources)}; choose")
        config = replace(config, data=replace(config.data, snippet_sources=kept))
    return capped(config, load_data(config))


def _rows_of_source(source: str, data: Data) -> Dataset:
    """All splits of a source which nothing is trained on."""
    splits = load_snippets([source]).splits
    return concatenate_datasets([splits[split] for split in ("test", "validation", "train")]).select_columns(["text", "label"])


def _texts(rows: Dataset) -> list[str]:
    if "label" not in rows.column_names:
        return texts_of(rows)
    columns = [column for column in ("text", "text_pair") if column in rows.column_names]
    return [same_text(*values) for values in zip(*(rows[c] for c in columns), strict=True)]


def _hash(table: Dataset) -> str:
    digest = hashlib.sha256()
    for row in table:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _write(table: Dataset, path: Path) -> None:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    write_atomically(path, buffer.getvalue())
