"""Labels: when two of them are the same class, which classes a data set has, and which class of a model each one means.

There is one equality, `folded`, for training, for evaluation and between the splits of a data set.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.optimize import linear_sum_assignment

from hf_ls.common.text import one_line
from hf_ls.metrics.intervals import wilson_interval

_GENERIC = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]*?)0*)?")


def folded(label: Any) -> str:
    """What is compared in place of a label: two labels with the same folded text are the same class.

    Case, blanks around a text and how many stand between its words do not count, nor the way a number is written:
    `1`, `"1"`, `"01"` and `1.0` are one class, and so are `"pos"` and `" Pos"`.

    >>> folded(1.0) == folded("1") == folded(" 01 "), folded("New  York") == folded("new york"), folded("1") == folded("10")
    (True, True, False)
    """
    text = " ".join(unicodedata.normalize("NFC", str(label)).split()).casefold()
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    sign, whole, fraction = number.groups()
    value = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return value if sign != "-" or value == "0" else f"-{value}"


def class_name(label: Any) -> str:
    """The name of a class: a text as it is written, a whole number without a point."""
    return str(int(label)) if isinstance(label, float) else str(label)


def classes_of(labels: Iterable[Any], where: str) -> list[Any]:
    """The different labels in order: numbers by their value, words by their letters.

    Raises: ValueError for labels which `check_distinct` refuses, for missing and blank ones, for numbers which are not whole.
    """
    found = set(labels)
    if any(label is None or not str(label).strip() or (str(label) == "nan" and isinstance(label, float)) for label in found):
        raise ValueError(f"expected a label in every row, got missing labels in {where}; fill them in, or drop those rows")
    broken = sorted(label for label in found if isinstance(label, float) and not label.is_integer())
    if broken:
        raise ValueError(
            f"expected class labels, got floating-point numbers (regression) in {where}, such as {broken[0]:g}; write classes as "
            "words or whole numbers"
        )
    check_distinct(found, where)
    if all(_NUMBER.fullmatch(folded(label)) for label in found):
        return sorted(found, key=lambda label: (float(folded(label)), str(label)))
    return sorted(found, key=str)


def check_distinct(labels: Collection[Any], where: str) -> None:
    """Refuse two labels which `folded` makes one: a model would learn two classes for one meaning.

    Raises: ValueError which names them.
    """
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(folded(label), []).append(repr(label))
    same = sorted(" and ".join(sorted(group)) for group in groups.values() if len(group) > 1)
    if same:
        shown = "; ".join(same[:4]) + (f" and {len(same) - 4} more" if len(same) > 4 else "")
        raise ValueError(
            f"expected classes with distinct names in {where}, got {shown}, which differ in nothing but blanks, case or how a "
            "number is written; write each class in one way"
        )


def absent_classes(part: Dataset, names: Sequence[str]) -> list[str]:
    """The classes, in order, of which a split has no row: ids in its column `label`, or lists of ids in `tags`."""
    if "tags" in part.column_names:
        seen = {tag for tags in part["tags"] for tag in tags}
    else:
        seen = set(part["label"]) if "label" in part.column_names else set(range(len(names)))
    return [name for i, name in enumerate(names) if i not in seen]


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

    In this order: what the user says (`given`: label -> name or id of the model); names, equal as `folded` says, in any order;
    ids, where the data has no names, or the model only LABEL_0, LABEL_1 … and the data as many names.

    data_names: of a `ClassLabel` feature, in the order of its ids; `found` then holds names.

    Raises: ValueError for a label without a class in the model, and for classes of the model which `check_distinct` refuses.
    """
    check_distinct(model_names, "id2label of the model")
    names = {folded(name): i for i, name in enumerate(model_names)}
    if given:
        check_distinct(given, "label_map")
        targets = {folded(label): _target(target, names, model_names) for label, target in given.items()}
        missing = sorted(str(label) for label in found if folded(label) not in targets)
        if missing:
            raise ValueError(f"expected every label in label_map, got none for {missing}; add them")
        return LabelMatch({label: targets[folded(label)] for label in found}, "Labels were matched as label_map says.", True)
    if all(folded(label) in names for label in found):
        ids = {label: names[folded(label)] for label in found}
        order = [names.get(folded(name)) for name in data_names or []]
        if data_names and order != list(range(len(model_names))):
            return LabelMatch(
                ids,
                f"Model and data disagree about the order of labels (model: {_shown(model_names)}; data: {_shown(data_names)}): "
                "they were matched by name.",
                True,
            )
        return LabelMatch(ids, "Labels were matched by name.", True)
    # A model whose names are numbers, as 1 to 5 for stars, means these by them: 0 is none of its classes then.
    if all(isinstance(label, int) for label in found) and not all(_NUMBER.fullmatch(name) for name in names):
        beyond = sorted(label for label in found if not 0 <= int(label) < len(model_names))
        if beyond:
            raise ValueError(f"expected ids from 0 to {len(model_names) - 1}, got {beyond[:5]}; give label_map")
        pairs = ", ".join(f"{i} = {one_line(name)}" for i, name in enumerate(model_names[:10]))
        return LabelMatch(
            {label: int(label) for label in found}, f"The data has ids without names, read as the model's: {pairs}.", False
        )
    if data_names and len(data_names) == len(model_names) and all(_GENERIC.fullmatch(name) for name in model_names):
        return LabelMatch(
            {name: i for i, name in enumerate(data_names)},
            f"The model has no label names, so that its ids were read in the order of the data: {_shown(data_names)}.",
            False,
        )
    unknown = sorted(str(label) for label in found if folded(label) not in names)
    raise ValueError(
        f"expected the labels of the model, {_shown(model_names)}, got {_shown(unknown)} in the data; say which is which with "
        f"label_map, e.g. {{{unknown[0]!r}: {model_names[0]!r}}}"
    )


def permutation_warning(
    predicted: Any, labels: Any, model_names: Sequence[str], remedy: str = "Compare id2label of the model with the data"
) -> str | None:
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
        f"{remedy}; nothing was changed."
    )


def _target(target: Any, names: Mapping[str, int], model_names: Sequence[str]) -> int:
    if folded(target) in names:
        return names[folded(target)]
    if str(target).isdecimal() and int(target) < len(model_names):
        return int(target)
    raise ValueError(f"expected a class of the model in label_map, got {target!r}; it has {_shown(model_names)}")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(one_line(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
