"""Reading predictions from a file: npz, CSV, TSV, JSON, JSONL or Parquet, with the labels beside them.

An npz has the arrays `labels` and `probabilities` or `logits`, or those which a run leaves (`logits_test`, `labels_test`, …). A
table has a column of labels and either a column `probabilities` or `logits` of lists, or one column of numbers a class, whose
heading is the class (`probability_` or `logit_` before it is taken off, and so is another beginning which all headings share
where the labels are without it).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from zipfile import BadZipFile

import numpy as np

from hf_ls.data.reading import read_files

T = TypeVar("T")
ScoreKind = Literal["probabilities", "logits"]
_KINDS: tuple[ScoreKind, ScoreKind] = ("probabilities", "logits")
_PREFIX: dict[ScoreKind, str] = {"probabilities": "probability_", "logits": "logit_"}


@dataclass(frozen=True)
class PredictionFile:
    """What a file says of one split: scores [n, K] of a kind, labels [n], and the names of the columns, if it has any."""

    kind: ScoreKind
    scores: Any
    labels: Any
    names: list[str] | None


def read_predictions(path: str, split: str, label_column: str = "label") -> PredictionFile:
    """The predictions in a file; of an npz with several splits those of `split`.

    Raises: ValueError for a missing or broken file, and for one without labels or without predictions.
    """
    if Path(path).suffix.lower() == ".npz":
        return _from_npz(path, split)
    return _from_table(path, label_column)


def splits_in(path: str) -> list[str]:
    """The splits which an npz of a run has, e.g. validation and test; empty for any other file."""
    if Path(path).suffix.lower() != ".npz":
        return []
    names = _from_arrays(path, lambda arrays: list(arrays.files))  # without reading the arrays
    return [name.removeprefix("labels_") for name in names if name.startswith("labels_")]


def _from_arrays(path: str, read: Callable[[Any], T]) -> T:
    """What `read` takes of an open npz."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return read(arrays)
    except FileNotFoundError as error:
        raise ValueError(f"expected a file of predictions, got no file at {path}; check the path") from error
    except (ValueError, OSError, BadZipFile) as error:
        found = " ".join(str(error).split())
        raise ValueError(
            f"expected plain arrays in {path}, got: {found}; write it with numpy.savez, labels as text or ids"
        ) from error


def _from_npz(path: str, split: str) -> PredictionFile:
    arrays = _from_arrays(path, dict)
    for ending in (f"_{split}", ""):
        kinds = [kind for kind in _KINDS if f"{kind}{ending}" in arrays]
        if len(kinds) == 1 and f"labels{ending}" in arrays:
            names = arrays.get("label_names")
            listed = None if names is None else [str(name) for name in names.tolist()]
            return PredictionFile(kinds[0], arrays[f"{kinds[0]}{ending}"], arrays[f"labels{ending}"], listed)
    raise ValueError(
        f"expected labels and either probabilities or logits in {path}, got {sorted(arrays)}; name the arrays so, or add "
        f"_{split} to each name"
    )


def _from_table(path: str, label_column: str) -> PredictionFile:
    rows = read_files({"test": path})["test"]
    columns = list(rows.column_names)
    if label_column not in columns:
        raise ValueError(f"expected the labels in a column {label_column!r} of {path}, got {columns}; set label_column")
    labels = list(rows[label_column])
    lists = [kind for kind in _KINDS if kind in columns]
    prefixed = [kind for kind in _KINDS if any(column.startswith(_PREFIX[kind]) for column in columns)]
    if len(lists) + len(prefixed) > 1:
        raise ValueError(f"expected probabilities or logits in {path}, got both; drop one of them")
    if lists:
        found = [json.loads(row) if isinstance(row, str) else row for row in rows[lists[0]]]
        return PredictionFile(lists[0], found, labels, None)
    if prefixed:
        kind = prefixed[0]
        wanted = [column for column in columns if column.startswith(_PREFIX[kind])]
        names = [column.removeprefix(_PREFIX[kind]) for column in wanted]
    else:
        wanted = names = [column for column in columns if column != label_column]
        odd = [column for column in wanted if rows.features[column].dtype not in ("int64", "float64", "float32", "float16")]
        if odd:
            raise ValueError(
                f"expected one column of numbers a class in {path}, got {odd[0]!r} of {rows.features[odd[0]].dtype}; drop it, or "
                f"begin the names of the others with {_PREFIX['probabilities']} or {_PREFIX['logits']}"
            )
        kind = "probabilities"
    scores = np.column_stack([np.asarray(rows[column], dtype=np.float64) for column in wanted]) if wanted else np.empty((0, 0))
    return PredictionFile(kind, scores, labels, _as_labelled(names, labels))


def _as_labelled(names: list[str], labels: list[Any]) -> list[str]:
    """The names of columns, without a beginning of all where only then the labels are among them."""
    known, shared = {str(label) for label in labels}, os.path.commonprefix(names)  # noqa: RUF071
    shorter = ([name[cut:] for name in names] for cut in range(len(shared) + 1))
    return next((found for found in shorter if known <= set(found)), names)
