"""Votes of raters and probabilities of teachers as distributions: every shape of column, the majority, ties, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_ls.data.classification import EMBEDDED_MODEL, load_classification, model_path, tokenise
from hf_ls.data.soft_labels import with_soft_labels

VOTES = [[3, 1, 0], [0, 2, 2], [1, 1, 8], [5, 0, 0]] * 10
NAMES = ["neg", "neu", "pos"]


def rows(kind: str) -> list[dict]:
    def columns(votes: list[int]) -> dict:
        if kind == "columns":
            return dict(zip(NAMES, votes, strict=True))
        mapping = {name: n for name, n in zip(NAMES, votes, strict=True) if n or "sparse" not in kind}
        value = mapping if "mapping" in kind else [v / sum(votes) for v in votes] if kind == "probabilities" else votes
        return {"votes": json.dumps(value) if "text" in kind else value}

    return [{"text": f"sentence {i}", **columns(votes)} for i, votes in enumerate(VOTES)]


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *(("list", "jsonl"), ("list", "parquet"), ("probabilities", "parquet"), ("mapping", "json"), ("sparse mapping", "jsonl")),
        *(("list as text", "csv"), ("mapping as text", "tsv"), ("columns", "csv"), ("columns", "parquet")),
    ],
)
def test_every_shape_of_column_is_the_same_distribution(tmp_path, kind, suffix):
    table = Dataset.from_list(rows(kind))
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix in ("csv", "tsv"):
        table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    else:
        found = rows(kind)
        path.write_text(json.dumps(found) if suffix == "json" else "\n".join(map(json.dumps, found)))
    named = kind in ("list", "probabilities", "list as text")
    data = load_classification(
        None, files={"train": str(path)}, soft_label_columns=NAMES if kind == "columns" else ["votes"],
        soft_label_names=NAMES if named else (), test_fraction=0.2,
    )  # fmt: skip
    assert data.label_names == tuple(NAMES)
    by_text = {row["text"]: row for part in data.splits.values() for row in part}
    assert len(by_text) == 40
    for i, votes in enumerate(VOTES):
        row = by_text[f"sentence {i}"]
        np.testing.assert_allclose(row["soft_labels"], np.array(votes) / sum(votes), atol=1e-12)
        assert row["label"] == int(np.argmax(votes))
    assert "Soft labels over 3 classes" in data.notes[0] and "10 of 40 in train" in data.notes[1]
    tokens = tokenise(data.splits, AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL)), 8)
    assert tokens["test"]["soft_labels"][:] == data.splits["test"]["soft_labels"][:]


@pytest.mark.parametrize(
    ("votes", "names", "match"),
    [
        ([[1, 2], [1, 2, 3]], (), "3 in row 1|2 numbers per row"),
        ([[1, 2], [0, 0]], (), r"sum above 0, got \[0.0, 0.0\] in row 1"),
        ([[1, 2], [-1, 2]], (), ">= 0"),
        ([[1, 2], None], (), "a list of numbers or a mapping in every row"),
        ([1, 2], (), "a list of numbers or a mapping in every row"),
        (["[1, 2", "[1]"], (), "as JSON"),
        ([[1], [2]], (), "2 or more classes"),
        ([[1, 2]] * 2, ("a", "b", "c"), "3 numbers per row"),
    ],
)
def test_what_is_no_distribution_is_refused(votes, names, match):
    part = Dataset.from_dict({"text": ["a", "b"], "votes": votes})
    with pytest.raises(ValueError, match=match):
        with_soft_labels({"train": part}, ["votes"], names)
    with pytest.raises(ValueError, match=r"columns \['other'\] in train"):
        with_soft_labels({"train": part}, ["other"])
