"""What is lost where a text has more tokens than are kept, counted while it is tokenised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from datasets import DatasetDict

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
