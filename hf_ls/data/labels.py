"""Which class of a model each label of a data set means.

Owns: matching by name, by id or by the user's word, what is said about it, and the suspicion that ids are permuted.
Does not own: loading (`evaluating`) or any metric (`metrics`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from hf_ls.common.text import one_line
from hf_ls.metrics.intervals import wilson_interval

_GENERIC = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class LabelMatch:
    """The id in the model of each label of the data, and in one sentence how it was found."""

    ids: dict[Any, int]
    sentence: str
    by_name: bool


def match_labels(
    found: Collection[str | int],
    model_names: Sequence[str],
    data_names: Sequence[str] | None = None,
    given: Mapping[str, str] | None = None,
) -> LabelMatch:
    """Match the labels `found` in data with the classes of a model, whose names are in the order of its ids.

    In this order: what the user says (`given`: label -> name or id of the model); names, whatever their case and order; ids,
    where the data has no names, or the model only LABEL_0, LABEL_1 … and the data as many names.

    data_names: of a `ClassLabel` feature, in the order of its ids; `found` then holds names.

    Raises: ValueError for a label without a class in the model.
    """
    names = {_key(name): i for i, name in enumerate(model_names)}
    if len(names) < len(model_names):
        raise ValueError(f"expected classes with distinct names, got {list(model_names)}; give the model an id2label")
    if given:
        targets = {str(label): _target(target, names, model_names) for label, target in given.items()}
        missing = sorted(str(label) for label in found if str(label) not in targets)
        if missing:
            raise ValueError(f"expected every label in label_map, got none for {missing}; add them")
        return LabelMatch({label: targets[str(label)] for label in found}, "Labels were matched as label_map says.", True)
    if all(isinstance(label, int) for label in found):
        beyond = sorted(label for label in found if not 0 <= int(label) < len(model_names))
        if beyond:
            raise ValueError(f"expected ids from 0 to {len(model_names) - 1}, got {beyond[:5]}; give label_map")
        pairs = ", ".join(f"{i} = {one_line(name)}" for i, name in enumerate(model_names[:10]))
        return LabelMatch(
            {label: int(label) for label in found}, f"The data has ids without names, read as the model's: {pairs}.", False
        )
    if all(_key(label) in names for label in found):
        ids = {label: names[_key(label)] for label in found}
        order = [names.get(_key(name)) for name in data_names or []]
        if data_names and order != list(range(len(model_names))):
            return LabelMatch(
                ids,
                f"Model and data disagree about the order of labels (model: {_shown(model_names)}; data: {_shown(data_names)}): "
                "they were matched by name.",
                True,
            )
        return LabelMatch(ids, "Labels were matched by name.", True)
    if data_names and len(data_names) == len(model_names) and all(_GENERIC.fullmatch(name) for name in model_names):
        return LabelMatch(
            {name: i for i, name in enumerate(data_names)},
            f"The model has no label names, so that its ids were read in the order of the data: {_shown(data_names)}.",
            False,
        )
    unknown = sorted(str(label) for label in found if _key(label) not in names)
    raise ValueError(
        f"expected the labels of the model, {_shown(model_names)}, got {_shown(unknown)} in the data; say which is which with "
        f"label_map, e.g. {{{unknown[0]!r}: {model_names[0]!r}}}"
    )


def permutation_warning(predicted: Any, labels: Any, model_names: Sequence[str]) -> str | None:
    """A sentence if another assignment of the labels fits the predictions measurably better (disjoint 95 % Wilson intervals).

    predicted, labels: class ids [n]. Such a model is either bad in an unlikely way, or its labels are in another order.
    """
    k, n = len(model_names), len(labels)
    confusion = np.bincount(np.asarray(labels) * k + np.asarray(predicted), minlength=k * k).reshape(k, k)
    rows, columns = linear_sum_assignment(-confusion)
    right, best = int(np.trace(confusion)), int(confusion[rows, columns].sum())
    if float(wilson_interval(best, n)[0]) <= float(wilson_interval(right, n)[1]):
        return None
    moved = [f"{one_line(model_names[i])} → {one_line(model_names[j])}" for i, j in zip(rows, columns, strict=True) if i != j]
    return (
        f"The labels look permuted: accuracy {right / n:.3f} as they are, {best / n:.3f} with {', '.join(moved[:10])}. "
        "Compare id2label of the model with the data; nothing was changed."
    )


def _key(name: Any) -> str:
    return " ".join(str(name).split()).casefold()


def _target(target: Any, names: Mapping[str, int], model_names: Sequence[str]) -> int:
    if _key(target) in names:
        return names[_key(target)]
    if str(target).isdecimal() and int(target) < len(model_names):
        return int(target)
    raise ValueError(f"expected a class of the model in label_map, got {target!r}; it has {_shown(model_names)}")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(one_line(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
