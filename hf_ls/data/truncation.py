"""What is lost where a text has more tokens than are kept, counted while it is tokenised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import DatasetDict

from hf_ls.common.models import IGNORE_INDEX

logger = logging.getLogger(__name__)


def count_cut(rows: list[list[int]], limit: int, encode: Callable[[int], Any]) -> list[int]:
    """1 for each row which truncation has shortened, else 0: only rows at the limit need a second look."""
    return [int(len(ids) == limit and len(encode(i)["input_ids"]) > limit) for i, ids in enumerate(rows)]


def warn_of(tokens: DatasetDict, column: str, message: str) -> DatasetDict:
    """Warn about what a column counts (a column, because a cached `map` does not run its function), and drop it."""
    for split, part in tokens.items():
        count = sum(part[column])
        if count:
            logger.warning("%s: %d %s", split, count, message)
    return tokens.remove_columns([column])


def without_lost(tokens: DatasetDict, message: str) -> DatasetDict:
    """The rows which the column `lost` does not mark, with a warning about the others."""
    whole = {split: np.flatnonzero(~np.array(part["lost"], dtype=bool)) for split, part in tokens.items()}
    tokens = warn_of(tokens, "lost", message)
    return DatasetDict({split: part.select(whole[split]) for split, part in tokens.items()})


def with_labels(tokens: DatasetDict, wanted: str, got: str) -> DatasetDict:
    """The splits, each with a label which counts.

    Raises: ValueError for a split without one.
    """
    for split, part in tokens.items():
        if not any(label != IGNORE_INDEX for labels in part["labels"] for label in labels):
            raise ValueError(f"expected {wanted} in {split}, got {got}")
    return tokens
