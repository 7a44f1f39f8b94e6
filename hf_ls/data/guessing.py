"""Which task a file is for and which of its columns are meant, where nobody has said so: by names, then by what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, LargeList, List, Value

from hf_ls.data.reading import conversation_columns

# By descending likelihood, the usual name first; compared without case.
_NAMES = {
    "label": (
        "label",
        "labels",
        "class",
        "category",
        "intent",
        "sentiment",
        "target",
        "gold",
        "gold_label",
        "rating",
        "stars",
        "y",
    ),
    "text": ("text", "sentence", "content", "review", "tweet", "comment", "utterance", "body", "message", "query", "question"),
    "tokens": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "labels", "ner", "pos_tags", "upos"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "dialog"),
    "source": ("source", "src", "input", "document", "article", "prompt"),
    "target": ("target", "tgt", "output", "summary", "completion", "response"),
    "question": ("question", "prompt", "query", "question_stem", "ctx", "input", "text", "sentence"),
    "options": ("options", "choices", "endings", "candidates", "answers"),
    "answer": ("answer", "label", "answerkey", "answer_key", "answer_idx", "gold", "target", "correct", "correct_answer"),
}
_TEXTS, _WHOLE = ("string", "large_string"), ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")

_LOOKED_AT = 50  # rows whose values tell what a column holds


def guess_task(part: Dataset) -> str | None:
    """The task of a file by its columns; None where they do not tell."""
    if chats := conversation_columns(part):
        pair = _named(part, "source", chats) and _named(part, "target", chats)
        return "sft" if pair or _guess(part, "messages", set()) else None
    if all(_named(part, kind, _lists(part)) or _sole_lists(part, kind) for kind in ("tokens", "tags")):
        return "token-classification"
    texts = _texts(part)
    source, target = (_named(part, kind, texts) for kind in ("source", "target"))
    if source and target and source != target and not _repeats(part, target):
        return "causal-lm" if source.lower() == "prompt" else "seq2seq"
    if texts and (_label(part, set()) is not None or guess_soft_labels(part)):
        return "text-classification"
    return (
        "causal-lm" if len(texts) == 1 and all(name in texts or _numbers_rows(part, name) for name in part.column_names) else None
    )


def guess_soft_labels(part: Dataset) -> list[str]:
    """The one column of mappings or lists of numbers (or of either as JSON), a vote or share for each class; [] without one.

    A file which has classes too is left to these.
    """
    if _label(part, set()) is not None:
        return []
    found = [name for name in part.column_names if _is_soft(part[name][:_LOOKED_AT])]
    return found if len(found) == 1 else []


def guess_columns(part: Dataset, given: Mapping[str, str | None], where: str = "train") -> tuple[dict[str, str], str | None]:
    """The column of each kind (`text` and `label`, `tokens` and `tags`, `source` and `target`, `question`, `options` and
    `answer`), and a sentence about those which are neither given nor named as usual. where: what an error calls the part.

    given: kind -> its column as the user says, None for a guess.

    Raises: ValueError where the columns do not tell.
    """
    found = {kind: column for kind, column in given.items() if column is not None}
    guessed: dict[str, str] = {}
    for kind in (kind for kind in _NAMES if kind in given and kind not in found):
        column = _NAMES[kind][0] if _NAMES[kind][0] in part.column_names else _guess(part, kind, set(found.values()))
        if column is None:
            raise ValueError(
                f"expected columns {[given[k] or k for k in given]} in {where}, got {part.column_names}; set "
                + " and ".join(f"{name}_column" for name in given)
            )
        found[kind] = column
        guessed |= {kind: column} if column != _NAMES[kind][0] else {}
    said = ", ".join(f"{kind}_column: {column!r}" for kind, column in guessed.items())
    found = {kind: found[kind] for kind in given}
    return found, f"Guessed among the columns {part.column_names}: {said}" if guessed else None


def _guess(part: Dataset, kind: str, taken: set[str]) -> str | None:
    if kind == "label":
        return _label(part, taken)
    if kind in ("tokens", "tags"):
        return _named(part, kind, [name for name in _lists(part) if name not in taken]) or _sole_lists(part, kind)
    if kind == "messages":
        chats = [name for name in conversation_columns(part) if name not in taken]
        return _named(part, kind, chats) or (chats[0] if len(chats) == 1 else None)
    if kind in ("options", "answer"):
        return _named(part, kind, [name for name in part.column_names if name not in taken])
    texts = [name for name in (*_texts(part), *(conversation_columns(part) if kind != "text" else ())) if name not in taken]
    return _named(part, kind, texts) or (_longest(part, texts) if kind == "text" else None)


def _named(part: Dataset, kind: str, candidates: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(candidates)}
    return next((lower[name] for name in _NAMES[kind] if name in lower), None)


def _texts(part: Dataset) -> list[str]:
    return [name for name, feature in part.features.items() if getattr(feature, "dtype", None) in _TEXTS]


def _lists(part: Dataset) -> list[str]:
    return [name for name, feature in part.features.items() if isinstance(feature, List | LargeList)]


def _sole_lists(part: Dataset, kind: str) -> str | None:
    """The only list of words, or the only other list beside one of those."""
    lists = _lists(part)
    words = [name for name in lists if getattr(part.features[name].feature, "dtype", None) in _TEXTS]
    if kind == "tokens":
        named = _named(part, "tags", words)
        words = [name for name in words if len(words) == 1 or name != named]
        return words[0] if len(words) == 1 and len(lists) > 1 else None
    tokens = _named(part, "tokens", lists) or _sole_lists(part, "tokens")
    others = [name for name in lists if name != tokens and isinstance(part.features[name].feature, Value | ClassLabel)]
    return others[0] if len(others) == 1 else None


def _label(part: Dataset, taken: set[str]) -> str | None:
    """A column of classes: one named so, or the only one of words or whole numbers whose values come again and again."""
    single = [
        name
        for name, feature in part.features.items()
        if name not in taken
        and (isinstance(feature, ClassLabel) or getattr(feature, "dtype", None) in (*_TEXTS, *_WHOLE, "float64"))
        and not _is_soft(part[name][:_LOOKED_AT])
    ]
    if named := _named(part, "label", single):
        return named
    likely = [name for name in single if getattr(part.features[name], "dtype", None) != "float64" and _repeats(part, name)]
    return likely[0] if len(likely) == 1 else None


def _is_soft(values: Sequence[Any]) -> bool:
    """Whether every value is a mapping, or a list of one length, of numbers from 0 on, the sum above 0."""
    if values and all(isinstance(value, str) and value[:1] in ("{", "[") for value in values):
        try:
            values = [json.loads(value) for value in values]
        except json.JSONDecodeError:
            return False
    rows = [[n or 0 for n in value.values()] if isinstance(value, dict) else value for value in values]
    alike = bool(rows) and all(isinstance(row, list) for row in rows) and len({type(value) for value in values}) == 1
    if not alike or (isinstance(values[0], list) and len({len(row) for row in rows}) > 1):
        return False
    return all(len(row) > 0 and all(_is_share(n) for n in row) and sum(row) > 0 for row in rows)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _numbers_rows(part: Dataset, column: str) -> bool:
    """Whether a column of whole numbers has another one in every row: an id."""
    return getattr(part.features[column], "dtype", None) in _WHOLE and len(part.unique(column)) == len(part)


def _repeats(part: Dataset, column: str) -> bool:
    """Whether a column has from two values on, each ten times on average: classes, no names, texts or ids."""
    return 2 <= len(part.unique(column)) <= max(2, len(part) // 10)


def _longest(part: Dataset, candidates: Sequence[str]) -> str | None:
    """The column with the longest texts on average."""
    lengths = {
        name: np.mean([pc.sum(pc.utf8_length(chunk)).as_py() or 0 for chunk in part.with_format("arrow")[name].chunks] or [0])
        for name in candidates
    }
    return max(lengths, key=lambda name: lengths[name]) if lengths else None
