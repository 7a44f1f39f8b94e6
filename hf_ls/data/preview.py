"""What a run would be trained on, to be looked at before it starts: rows, classes, examples as the model sees them, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_ls.common.models import IGNORE_INDEX
from hf_ls.common.text import one_line
from hf_ls.data.conversations import ChatFormat

_SHOWN_CLASSES = 40
_SHOWN_LETTERS = 400
_MEASURED = 5000  # rows of a split whose tokens are counted


def preview(
    splits: DatasetDict,
    tokens: DatasetDict,
    names: Sequence[str],
    tokenizer: Any,
    available: Mapping[str, int],
    limits: Mapping[str, int],
    affixes: tuple[str, str] = ("", ""),
    form: ChatFormat | None = None,
) -> list[str]:
    """Lines of text.

    Args:
        splits, tokens: before and after the tokenizer; names: of the classes, none for language models.
        available: rows of each split before a cap. limits: column -> how many of its tokens are kept.
        affixes: what stands before and after each source. form: of conversations.
    """
    return [
        _rows(splits, available),
        *_classes(splits, names),
        *_examples(tokens["train"], names, tokenizer),
        *_lengths(splits, tokenizer, limits, affixes, form),
    ]


def _rows(splits: DatasetDict, available: Mapping[str, int]) -> str:
    def size(split: str) -> str:
        n, of = len(splits[split]), available[split]
        return f"{n:,} {split}" + (f" (a sample of {of:,})" if of > n else "")

    return "Rows: " + ", ".join(map(size, splits))


def _classes(splits: DatasetDict, names: Sequence[str]) -> list[str]:
    """A line for each class with its rows (words, for tags) in each split; of many classes the most and the least frequent."""
    if not names:
        return []
    counts = {split: _label_counts(part, len(names)) for split, part in splits.items()}
    shown = list(range(len(names)))
    if len(names) > _SHOWN_CLASSES:
        order = np.argsort(-counts["train"], kind="stable").tolist()
        shown = [*order[: _SHOWN_CLASSES // 2], *order[-_SHOWN_CLASSES // 2 :]]
    width = max(len("class"), *(len(_short(names[k])) for k in shown))
    unit = "words" if "tags" in splits["train"].column_names else "rows"
    lines = [f"Classes: {len(names)}, {unit} of each"]
    lines.append(f"  {'class':{width}}" + "".join(f"{split:>12}" for split in splits))
    lines += [f"  {_short(names[k]):{width}}" + "".join(f"{counts[split][k]:>12,}" for split in splits) for k in shown]
    if len(shown) < len(names):
        lines.insert(2 + _SHOWN_CLASSES // 2, f"  … {len(names) - len(shown)} more …")
    return lines


def _label_counts(part: Dataset, num_classes: int) -> np.ndarray:
    rows = part["tags"] if "tags" in part.column_names else [part["label"]]
    labels = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return np.bincount(labels[labels != IGNORE_INDEX], minlength=num_classes)


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 40 else f"{line[:39]}…"


def _examples(train: Dataset, names: Sequence[str], tokenizer: Any) -> list[str]:
    """Three rows of train: the first of three classes, or the first, the middle and the last."""
    places = sorted({0, len(train) // 2, len(train) - 1})
    if isinstance(train[0]["labels"], int):
        labels = train["labels"][:]
        places = sorted(labels.index(label) for label in list(dict.fromkeys(labels))[:3])
    lines = [_example(train[place], names, tokenizer) for place in places]
    cut = [line if len(line) <= 3 * _SHOWN_LETTERS else f"{line[: 3 * _SHOWN_LETTERS]} …" for line in lines]
    marked = ", what it learns to write in «»" if any("«" in line for line in lines) else ""
    return [f"Examples of train, as the model sees them{marked}:", *(f"  {line}" for line in cut)]


def _clipped(text: str) -> str:
    """On one line, the middle of a long text left out."""
    line, half = one_line(text), _SHOWN_LETTERS // 2
    return line if len(line) <= _SHOWN_LETTERS else f"{line[:half]} … {line[-half:]}"


def _example(row: Mapping[str, Any], names: Sequence[str], tokenizer: Any) -> str:
    ids, labels = row["input_ids"], row["labels"]
    if isinstance(labels, int):
        return f"{one_line(names[labels])}: {_clipped(tokenizer.decode(ids))}"
    if names:  # one tag per word, at its first token
        tagged = zip(tokenizer.convert_ids_to_tokens(ids), labels, strict=True)
        return one_line(" ".join(word if tag == IGNORE_INDEX else f"{word}/{names[tag]}" for word, tag in tagged))
    if len(labels) == len(ids) and all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True)):
        parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
        texts = [(learnt, _clipped(tokenizer.decode([token for token, _ in pairs]))) for learnt, pairs in parts]
        return " ".join(f"«{text}»" if learnt else text for learnt, text in texts)
    target = tokenizer.decode([i for i in labels if i != IGNORE_INDEX])
    return f"{_clipped(tokenizer.decode(ids))} «{_clipped(target)}»"


def _lengths(
    splits: DatasetDict, tokenizer: Any, limits: Mapping[str, int], affixes: tuple[str, str], form: ChatFormat | None
) -> list[str]:
    """How long the rows of each split are without truncation, beside what is kept of them."""
    lines = []
    for split, part in splits.items():
        rows = part.select(np.unique(np.linspace(0, len(part) - 1, min(len(part), _MEASURED)).astype(int)))
        for column, limit in limits.items():
            lengths = np.array([len(ids) for ids in _whole(rows, column, tokenizer, affixes, form)])
            middle, most = np.quantile(lengths, [0.5, 0.95], method="higher")
            share = np.mean(lengths > limit)
            what = "cut into blocks" if column == "text" and "label" not in part.column_names else "cut"
            name, of = "words" if column == "tokens" else column, "" if len(rows) == len(part) else f" of {len(rows):,} rows"
            lines.append(
                f"Tokens in {name} of {split}: half have up to {middle}, 95 % up to {most}, the longest {lengths.max():,}; "
                f"beyond {limit}, {share:.1%}{of} are {what}"
            )
    return lines


def _whole(rows: Dataset, column: str, tokenizer: Any, affixes: tuple[str, str], form: ChatFormat | None) -> list[list[int]]:
    if form is not None:
        return [form.encode(row)[0] for row in rows]
    values = list(rows[column])
    if column == "tokens":
        return tokenizer(values, is_split_into_words=True, verbose=False)["input_ids"]
    if column == "source":
        return tokenizer([affixes[0] + text + affixes[1] for text in values], verbose=False)["input_ids"]
    if column == "target":
        return tokenizer(text_target=values, verbose=False)["input_ids"]
    return tokenizer(values, list(rows["text_pair"]) if "text_pair" in rows.column_names else None, verbose=False)["input_ids"]
