"""Reading files and datasets of the Hub, and the checks which hold for every column of text."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from hf_ls.common.errors import loading

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_LONGEST_TEXT = 10_000_000  # bytes
_ONLY_EMPTY_IS_MISSING = {"keep_default_na": False, "na_values": [""]}
_TYPES = {
    r"^[+-]?(0|[1-9][0-9]{0,17})$": "int64",
    r"^[+-]?((0|[1-9][0-9]{0,14})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$": "float64",
    "^(True|False|true|false)$": "bool",
}


# How datasets says it of a Parquet file and of a JSON file.
_NO_ROW = ("BatchSize must be greater than 0", "corresponds to no data")


def read_files(files: Mapping[str, str]) -> DatasetDict:
    """The rows of local CSV, TSV, JSON, JSONL or Parquet files, split -> path.

    Raises: ValueError for missing, empty or broken files, lines of more than
    10 MB, other columns from file to file, and unknown or mixed file types.
    """
    paths = sorted(files.values())
    types = {_FORMATS.get(Path(path).suffix.lower()) for path in paths}
    if len(types) != 1 or None in types:
        raise ValueError(f"expected files of one type among {sorted(_FORMATS)}, got {paths}; convert them")
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"expected existing files, got {missing}; check the paths")
    empty = [path for path in paths if not Path(path).stat().st_size]
    if empty:
        raise ValueError(f"expected rows in {empty}, got: empty files; check the files")
    for path in paths:
        _check_lines(path)
        _check_json(path)
    kind = next(iter(types))
    try:
        if kind == "csv":
            return _read_csv(dict(files))
        return load_dataset(kind, data_files=dict(files))
    except (ValueError, OSError, OverflowError, DatasetGenerationError) as error:
        if str(error).startswith("expected "):
            raise
        cause = error.__cause__ or error
        found = cause.details().rstrip(".") if isinstance(cause, CastError) else " ".join(str(cause).split())
        if any(said in found for said in _NO_ROW):
            found = "a file without a row"
        remedy = "give all files the same columns" if isinstance(cause, CastError) else "check the files"
        raise ValueError(f"expected rows in {paths}, got: {found}; {remedy}") from error


def _read_csv(files: dict[str, str]) -> DatasetDict:
    """CSV and TSV: every field as text, only an empty one is missing, then numbers where a column holds nothing else.

    pandas would read a class or a text `None`, `NA`, `null` or `nan` as missing, and guess types 10,000 rows at a time.
    """
    options: dict[str, Any] = {
        **_ONLY_EMPTY_IS_MISSING,
        "sep": "\t" if Path(next(iter(files.values()))).suffix.lower() == ".tsv" else ",",
    }
    columns = {path: list(pd.read_csv(path, nrows=0, dtype=str, **options).columns) for path in files.values()}
    first, *others = columns
    for path in others:
        new, gone = (sorted(set(columns[a]) - set(columns[b])) for a, b in ((path, first), (first, path)))
        if new or gone:
            raise ValueError(
                f"expected rows in {sorted(files.values())}, got: {len(new)} new columns ({', '.join(new)}) and {len(gone)} "
                f"missing columns ({', '.join(gone)}) in {path}; give all files the same columns"
            )
    features = Features({str(column): Value("string") for column in columns[first]})
    return _typed(load_dataset("csv", data_files=files, features=features, **options))


def _typed(splits: DatasetDict) -> DatasetDict:
    """Columns of text as numbers or booleans where the text of every row of every split is one.

    007 stays a text, and so does a number with more digits than float64 keeps.
    """
    features = Features(next(iter(splits.values())).features)
    for column in features:
        chunks = [chunk for part in splits.values() for chunk in part.with_format("arrow")[column].chunks]
        for pattern, kind in _TYPES.items():
            matches = [pc.all(pc.match_substring_regex(chunk, pattern), min_count=0).as_py() for chunk in chunks]
            if all(matches) and any(chunk.null_count < len(chunk) for chunk in chunks):
                features[column] = Value(kind)
                break
    return splits if features == next(iter(splits.values())).features else splits.cast(features)


def read_hub(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a dataset on the Hub or in a folder.

    Raises: ValueError when there is none, or it may not or cannot be read.
    """
    with loading(
        f"the dataset {name} on the Hub or in a folder",
        "check dataset_name and dataset_config_name, and HF_TOKEN if it is private",
    ):
        builder = load_dataset_builder(name, config)
        if hasattr(builder.config, "keep_default_na"):  # its files are CSV
            builder = load_dataset_builder(name, config, low_memory=False, **_ONLY_EMPTY_IS_MISSING)
        builder.download_and_prepare()
        return builder.as_dataset()


def _check_lines(path: str) -> None:
    """Refuse a line of more than 10 MB before a reader takes it into memory; a JSON array may well be one line."""
    if Path(path).suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        return
    length = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            first = chunk.find(b"\n")
            length += len(chunk) if first < 0 else first
            if length > _LONGEST_TEXT:
                raise ValueError(
                    f"expected lines of at most {_LONGEST_TEXT:,} bytes in {path}, got a longer one; check its line ends, or cut "
                    "that text into several rows"
                )
            length = length if first < 0 else len(chunk) - chunk.rfind(b"\n") - 1


def _check_json(path: str) -> None:
    """Refuse rows which are no objects, with their place: pyarrow's reader (26.0) does not survive all of them."""
    if _FORMATS[Path(path).suffix.lower()] != "json":
        return
    with open(path, "rb") as file:
        first = file.readline().removeprefix(codecs.BOM_UTF8).strip()
        file.seek(0)
        if first.startswith(b"["):
            values, what = _elements(file.read()), "element"
        elif b"\0" in first or (first.startswith(b"{") and not first.endswith(b"}")):
            return  # another encoding, or one object over many lines
        else:
            values, what = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file), "line"
        for number, value in enumerate(values, 1):
            if value and not value.startswith(b"{"):
                raise ValueError(
                    f'expected rows such as {{"text": ...}} in {path}, got {value[:40].decode("utf-8", "replace")} in {what} '
                    f"{number}; delete that {what}"
                )


def _elements(data: bytes) -> Iterator[bytes]:
    """The elements of a JSON array; none of what only the reader can tell."""
    with suppress(ValueError, RecursionError):
        found = json.loads(data)
        yield from (b"{" if isinstance(element, dict) else json.dumps(element).encode() for element in found)


def check_length(part: Dataset, split: str) -> None:
    """Refuse a text of more than 10 MB: a file without line ends, which would take hours to tokenise.

    Raises: ValueError.
    """
    for column in part.column_names:
        if getattr(part.features[column], "dtype", None) in ("string", "large_string"):
            sizes = [pc.binary_length(chunk).to_numpy(zero_copy_only=False) for chunk in part.with_format("arrow")[column].chunks]
            lengths = np.nan_to_num(np.concatenate(sizes)) if sizes else np.zeros(1)
            if (longest := int(lengths.max())) > _LONGEST_TEXT:
                text = part[int(lengths.argmax())][column]
                raise ValueError(
                    f"expected texts of at most {_LONGEST_TEXT:,} bytes, got one of {longest:,} in {split}, which begins "
                    f"{text[:30]!r}; check the line ends of the file, or cut that text into several rows"
                )


def check_texts(part: Dataset, split: str, columns: Sequence[str]) -> None:
    """Only texts in these columns, in every row.

    Raises: ValueError for another type of column, missing texts, and as `check_length`.
    """
    for column in columns:
        check_text_type(part, split, column)
        missing = part.with_format("arrow")[column].null_count
        if missing:
            raise ValueError(
                f"expected text in every row of {split}, got {missing} empty of {len(part)} in column {column!r}; drop those rows"
            )
    check_length(part, split)


def check_text_type(part: Dataset, split: str, column: str) -> None:
    """Refuse a column which holds no texts.

    Raises: ValueError, with the way out for conversations.
    """
    feature = part.features[column]
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return
    if is_conversation(part, column):
        raise ValueError(
            f"expected text in column {column!r} of {split}, got conversations (lists of messages); train these with task: sft "
            "(in code LabelSmoothingSFTTrainer), or write each as one text, with tokenizer.apply_chat_template(tokenize=False)"
        )
    raise ValueError(f"expected text in column {column!r} of {split}, got {feature}; name the right column or convert it to text")


def conversation_columns(part: Dataset) -> list[str]:
    """The columns of conversations."""
    return [name for name in part.column_names if is_conversation(part, name)]


def is_conversation(part: Dataset, column: str) -> bool:
    """Whether a column holds lists of messages: mappings which say whose they are, in `role` or, as ShareGPT, in `from`."""
    if not isinstance(part.features[column], List | LargeList):
        return False
    # By a value: the type says nothing where fields differ from row to row.
    first: list[Any] = next((row for row in part[column] if row), [])
    return bool(first) and all(isinstance(message, dict) and {"role", "from"} & {*message} for message in first)
