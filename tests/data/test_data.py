"""Embedded and local data: fixed, stratified, leak-free splits; every wrong file refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from hf_ls.data.classification import (
    EMBEDDED_MODEL,
    SNIPPET_LABELS,
    load_classification,
    load_snippets,
    model_path,
    tokenise,
)
from hf_ls.data.splitting import check_overlap


@pytest.fixture(scope="module")
def snippets():
    return load_snippets().splits


def test_snippets_are_the_published_ones_with_fixed_splits(snippets):
    assert {split: len(part) for split, part in snippets.items()} == {"train": 18504, "validation": 2300, "test": 2284}
    assert snippets["test"].features["label"].names == list(SNIPPET_LABELS)
    assert snippets["test"][0] == load_snippets().splits["test"][0]


def test_snippet_labels_are_the_strict_majority_of_the_raters(snippets):
    for part in snippets.values():
        for label, counts in zip(part["label"], part["rater_counts"], strict=True):
            assert all(counts[label] > count for k, count in enumerate(counts) if k != label)


def test_snippet_splits_share_neither_documents_nor_texts(snippets):
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for parts in ([{text.lower() for text in snippets[s]["text"]} for s in (a, b)],
                      [set(zip(snippets[s]["source"], (i.split("_")[0] for i in snippets[s]["id"]), strict=True)) for s in (a, b)]):  # fmt: skip
            assert not parts[0] & parts[1]


def test_snippet_splits_are_stratified(snippets):
    whole = Counter(pair for part in snippets.values() for pair in zip(part["source"], part["label"], strict=True))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        part = Counter(zip(snippets[split]["source"], snippets[split]["label"], strict=True))
        for pair, count in whole.items():
            assert part[pair] / count == pytest.approx(share, abs=0.03)


def test_a_prefix_of_train_is_a_fair_sample(snippets):
    first, whole = Counter(snippets["train"]["source"][:2000]), Counter(snippets["train"]["source"])
    for source, count in whole.items():
        assert first[source] / 2000 == pytest.approx(count / len(snippets["train"]), abs=0.04)


def test_snippet_sources_can_be_chosen():
    assert set(load_snippets(["tweets"]).splits["train"]["source"]) == {"tweets"}
    with pytest.raises(ValueError, match="amazonReviewSnippets"):
        load_snippets(["facebook"])


def test_embedded_model_is_found_without_network():
    assert AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))("hello")["input_ids"][0] == 101
    assert model_path("org/other") == "org/other"


def write(tmp_path, name, rows):
    path = tmp_path / name
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


ROWS = [{"text": f"row {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_local_files_of_each_kind(tmp_path, name):
    data = load_classification(None, files={"train": write(tmp_path, name, ROWS), "test": write(tmp_path, "t_" + name, ROWS[:6])})
    assert data.label_names == ("no", "yes")
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 36, "validation": 4, "test": 6}
    assert data.splits["test"]["label"][:4] == [0, 1, 0, 1]


def test_other_column_names_and_pairs(tmp_path):
    rows = [{"premise": f"a {i}", "hypothesis": f"b {i}", "gold": i % 3 + 5} for i in range(30)]
    data = load_classification(
        None,
        files={"train": write(tmp_path, "a.jsonl", rows)},
        text_column="premise",
        text_pair_column="hypothesis",
        label_column="gold",
    )
    assert data.label_names == ("5", "6", "7")
    assert sorted(data.splits["train"].column_names) == ["label", "text", "text_pair"]


def test_numeric_labels_keep_numeric_order(tmp_path):
    rows = [{"text": str(i), "label": i % 12} for i in range(60)]
    assert load_classification(None, files={"train": write(tmp_path, "a.jsonl", rows)}).label_names == tuple(
        str(k) for k in range(12)
    )


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("a.csv", [{"size": 0.5, "label": 1}] * 20, "expected columns"),
        ("a.jsonl", [{"text": "a", "label": 0}] * 20, "at least 2 classes"),
        ("a.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 10, "regression"),
        ("a.jsonl", [{"text": "a", "label": None}, {"text": "b", "label": "x"}] * 10, "missing labels"),
        ("a.txt", ROWS, "files of one type"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, rows, match):
    with pytest.raises(ValueError, match=match):
        load_classification(None, files={"train": write(tmp_path, name, rows)})


def test_labels_which_train_never_saw_are_refused(tmp_path):
    files = {"train": write(tmp_path, "a.jsonl", ROWS), "test": write(tmp_path, "b.jsonl", [{"text": "x", "label": "maybe"}])}
    with pytest.raises(ValueError, match="maybe"):
        load_classification(None, files=files)
    with pytest.raises(ValueError, match="existing files"):
        load_classification(None, files={"train": str(tmp_path / "none.csv")})
    with pytest.raises(ValueError, match="neither"):
        load_classification(None)


def test_selecting_on_test_is_refused_and_leaks_are_told(caplog):
    part = Dataset.from_list([{"text": f"row {i}", "label": i % 2} for i in range(10)])
    other = Dataset.from_list([{"text": f"other {i}", "label": i % 2} for i in range(10)])
    with pytest.raises(ValueError, match="selecting on test"):
        check_overlap(DatasetDict(train=other, validation=part, test=part))
    check_overlap(DatasetDict(train=part, validation=other, test=part))
    assert "10 of 10 test examples are also in train" in caplog.text


def test_tokens_are_truncated_and_carry_labels():
    tokenizer = AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    part = Dataset.from_list([{"text": "many words " * 50, "label": 1}, {"text": "few", "label": 0}])
    tokens = tokenise(DatasetDict(train=part), tokenizer, 16)["train"]
    assert [len(ids) for ids in tokens["input_ids"]] == [16, 3]
    assert list(tokens["labels"]) == [1, 0]
    assert "text" not in tokens.column_names


@pytest.mark.parametrize("classes", [(1, 2), ("1", "2"), (5, 3, 8), (True, False), ("b", "a")])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_every_row_keeps_its_label(tmp_path, classes, name):
    rows = [{"text": f"row {i} of class {classes[i % len(classes)]}", "label": classes[i % len(classes)]} for i in range(30)]
    data = load_classification(None, files={"train": write(tmp_path, name, rows)})
    for part in data.splits.values():
        for text, label in zip(part["text"], part["label"], strict=True):
            assert text.endswith(f"of class {data.label_names[label]}")


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text,label\n"), ("a.jsonl", ""), ("a.jsonl", '{"text": "a", '), ("a.parquet", "PAR1 no")]
)
def test_empty_and_broken_files_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="expected rows in"):
        load_classification(None, files={"train": str(tmp_path / name)})


@pytest.mark.parametrize("name", ["a.parquet", "a.json"])
def test_a_file_without_a_row_is_said_to_be_one(tmp_path, name):
    path = tmp_path / name
    empty = Dataset.from_dict({"text": [], "label": []})
    _ = empty.to_parquet(path) if name == "a.parquet" else path.write_text("[]")
    with pytest.raises(ValueError, match=r"expected rows in .*, got: a file without a row; check the files"):
        load_classification(None, files={"train": str(path)})
