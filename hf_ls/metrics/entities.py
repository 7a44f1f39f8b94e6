"""Entities in sequences of tags such as B-PER, I-PER, O: how many are found, by seqeval's reading of the tags."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from hf_ls.metrics.validation import Integers

OUTSIDE = "O"


def words_of(names: Sequence[str]) -> dict[str, Any]:
    """The arguments of `TokenCalibration` for classes of these names: none unless one is `O`; entities only where the others are
    in a scheme of B-, I- and the like and seqeval is installed."""
    if OUTSIDE not in names:
        return {}
    found: dict[str, Any] = {"outside_id": list(names).index(OUTSIDE)}
    in_scheme = all(name == OUTSIDE or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names)
    if in_scheme and importlib.util.find_spec("seqeval") is not None:
        found["entities"] = EntityCounts(names)
    return found


class EntityCounts:
    """(labels [t], predictions [t]) of one sequence -> how many entities are found right, are there, and are predicted."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the tags, in the order of their ids."""
        self.names = list(names)

    def __call__(self, labels: Integers, predictions: Integers) -> tuple[int, int, int]:
        """Count.

        >>> import numpy as np
        >>> EntityCounts(["O", "B-PER", "I-PER"])(np.array([1, 2, 0, 1]), np.array([1, 0, 0, 1]))
        (1, 2, 2)
        """
        from seqeval.metrics.sequence_labeling import get_entities  # imports scikit-learn

        there, predicted = (set(get_entities([self.names[i] for i in ids])) for ids in (labels, predictions))
        return len(there & predicted), len(there), len(predicted)
