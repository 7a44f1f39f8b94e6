"""Reading files and datasets of the Hub, and the checks which hold for every column of text.

Owns: `load_dataset` and the words for what it cannot read. Does not own: splits, labels, tokens (`data`, `sequence_data`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from hf_ls.common.errors import loading

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_LONGEST_TEXT = 10_000_000  # bytes


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
    extra = {"sep": "\t"} if any(path.lower().endswith(".tsv") for path in paths) else {}
    try:
        return load_dataset(next(iter(types)), data_files=dict(files), **extra)
    except (ValueError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        found = cause.details().rstrip(".") if isinstance(cause, CastError) else " ".join(str(cause).split())
        remedy = "give all files the same columns" if isinstance(cause, CastError) else "check the files"
        raise ValueError(f"expected rows in {paths}, got: {found}; {remedy}") from error


def read_hub(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a dataset on the Hub or in a folder.

    Raises: ValueError when there is none, or it may not or cannot be read.
    """
    with loading(
        f"the dataset {name} on the Hub or in a folder",
        "check dataset_name and dataset_config_name, and HF_TOKEN if it is private",
    ):
        return load_dataset(name, config)


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


def check_texts(part: Dataset, split: str) -> None:
    """Only texts, in every row.

    Raises: ValueError for another type of column, missing texts, and as `check_length`.
    """
    for column in ("text", "text_pair"):
        if column not in part.column_names:
            continue
        if getattr(part.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"expected text in column {column!r} of {split}, got {part.features[column]}; name the right column or convert "
                "it to text"
            )
        missing = [text for text in part[column] if text is None]
        if missing:
            raise ValueError(f"expected text in every row of {split}, got {len(missing)} empty of {len(part)}; drop those rows")
    check_length(part, split)
