"""One distribution over the classes per example: from the votes of raters, or the probabilities of a teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from numpy.typing import NDArray

LABEL, SOFT = "label", "soft_labels"


def with_soft_labels(
    splits: DatasetDict, columns: Sequence[str], names: Sequence[str] = ()
) -> tuple[DatasetDict, tuple[str, ...], list[str]]:
    """The splits with `soft_labels`, their counts or probabilities divided by their sum, and `label`, the class with most; names
    of the classes; and sentences about what that means.

    Args:
        columns: one column of lists, mappings (class -> count) or texts with either as JSON; or one column of numbers per class.
        names: of the classes, in the order of a list. Else the keys of the mappings, the names of several columns, or 0, 1, ….

    Raises: ValueError for missing columns, other values, lists of different lengths, and rows without a vote.
    """
    for split, part in splits.items():
        if absent := [column for column in columns if column not in part.column_names]:
            raise ValueError(f"expected columns {absent} in {split}, got {part.column_names}; set soft_label_columns")
    rows = {split: _values(part, split, columns) for split, part in splits.items()}
    found = _class_names(rows, columns, names)
    made, notes, ties = {}, [], {}
    for split, part in splits.items():
        votes = _matrix(rows[split], found, split)
        q = votes / votes.sum(axis=1, keepdims=True)
        ties[split] = int((np.isclose(q, q.max(axis=1, keepdims=True), rtol=0, atol=1e-12).sum(axis=1) > 1).sum())
        kept = part.remove_columns([name for name in (LABEL, SOFT) if name in part.column_names])
        kept = kept.add_column(LABEL, q.argmax(axis=1).tolist()).add_column(SOFT, q.tolist())
        features = Features({**kept.features, LABEL: ClassLabel(names=list(found)), SOFT: List(Value("float64"))})
        made[split] = kept.cast(features)
    notes.append(f"Soft labels over {len(found)} classes from {', '.join(columns)}; the label is the class with most")
    if any(ties.values()):
        shown = ", ".join(f"{n:,} of {len(splits[split]):,} in {split}" for split, n in ties.items() if n)
        notes.append(f"Ties for the most: {shown}; the label there is the first of the equal classes")
    return DatasetDict(made), found, notes


def _values(part: Dataset, split: str, columns: Sequence[str]) -> list[Any]:
    """A list or a mapping per row."""
    if len(columns) > 1:
        return [list(row) for row in zip(*(part[column] for column in columns), strict=True)]
    values = part[columns[0]][:]
    if values and isinstance(values[0], str):
        try:
            values = [json.loads(text) for text in values]
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected lists or mappings as JSON in {columns[0]!r} of {split}, got: {error}") from error
    kinds = {type(value) for value in values}
    if not kinds <= {list} and not kinds <= {dict}:
        other = next(value for value in values if not isinstance(value, list | dict) or type(value) is not type(values[0]))
        raise ValueError(
            f"expected a list of numbers or a mapping in every row of {columns[0]!r} in {split}, got {other!r:.60}; give one "
            "count or probability per class, or name one column for each class"
        )
    return values


def _class_names(rows: Mapping[str, list[Any]], columns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    first = rows["train"][0]
    if isinstance(first, dict):
        keys = sorted({str(key) for value in rows["train"] for key in value})
        found = list(names) or keys
        if missing := sorted({str(key) for part in rows.values() for value in part for key in value} - set(found)):
            raise ValueError(f"expected classes among {found}, got {missing} too; set soft_label_names, or drop those votes")
    else:
        found = list(names) or (list(columns) if len(columns) > 1 else [str(k) for k in range(len(first))])
    if len(set(found)) < len(found) or len(found) < 2:
        raise ValueError(f"expected 2 or more classes with different names for soft labels, got {found}; set soft_label_names")
    return tuple(found)


def _matrix(values: list[Any], names: Sequence[str], split: str) -> NDArray[np.float64]:
    """Non-negative numbers [n, K], a vote in each row."""
    rows = [[value.get(name) or 0 for name in names] if isinstance(value, dict) else value for value in values]
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(names)), None)
    if wrong is not None:
        raise ValueError(
            f"expected {len(names)} numbers per row in {split}, one for each of {list(names)}, got {len(rows[wrong])} in row "
            f"{wrong}; set soft_label_names, or fix that row"
        )
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers as soft labels in {split}, got: {error}; fill in what is missing") from error
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1) | (matrix < 0).any(axis=1) | (matrix.sum(axis=1) <= 0))
    if bad.size:
        raise ValueError(
            f"expected counts or probabilities >= 0 with a sum above 0, got {matrix[bad[0]].tolist()} in row {bad[0]} of {split} "
            f"({bad.size} rows in all); drop them"
        )
    return matrix
