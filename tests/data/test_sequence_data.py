"""Sequences: columns found and checked, no token lost or counted twice, what is cut is told."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, DataCollatorForSeq2Seq, GPT2TokenizerFast

from hf_ls.data.classification import EMBEDDED_MODEL, model_path
from hf_ls.data.g2p import g2p_tokenizer
from hf_ls.data.sequences import (
    check_sequence_overlap,
    load_sequences,
    token_counts,
    tokenise_causal,
    tokenise_seq2seq,
    tokenise_words,
)

PAIRS = [{"source": f"word{'abc'[i % 3]}", "target": f"AH{i % 3} B"} for i in range(40)]
TAGGED = [{"tokens": ["Ann", "saw", f"Bob{i}"], "ner_tags": ["PER", "O", ("PER", "ORG")[i % 2]]} for i in range(30)]


@pytest.fixture(scope="module")
def bert():
    return AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A GPT-2 tokenizer: no special tokens of its own around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["the cat sat on a mat "] * 9, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))  # fmt: skip
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2TokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


def write(tmp_path, name, rows):
    path = tmp_path / name
    if name.endswith((".csv", ".tsv")):
        sep = "," if name.endswith(".csv") else "\t"
        path.write_text("\n".join([sep.join(rows[0]), *(sep.join(map(str, row.values())) for row in rows)]) + "\n")
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def splits(rows, **others):
    return DatasetDict({name: Dataset.from_list(part) for name, part in {"train": rows, **others}.items()})


# Loading


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_pairs_from_local_files_of_each_kind(tmp_path, name):
    files = {"train": write(tmp_path, name, PAIRS), "test": write(tmp_path, "t_" + name, PAIRS[:6])}
    data = load_sequences("seq2seq", None, files=files)
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 36, "validation": 4, "test": 6}
    assert data.splits["test"][1] == PAIRS[1]
    assert (data.label_names, data.hub_id, data.name) == ((), None, f"{name}, t_{name}")


def test_other_column_names_even_swapped_ones(tmp_path):
    rows = [{"target": "left", "source": "right", "id": i} for i in range(20)]
    path = write(tmp_path, "a.jsonl", rows)
    data = load_sequences("seq2seq", None, files={"train": path}, source_column="target", target_column="source")
    assert data.splits["train"][0] == {"source": "left", "target": "right"}


def test_a_dot_reaches_into_a_mapping(tmp_path):
    rows = [{"translation": {"en": f"house {i}", "de": f"Haus {i}"}} for i in range(20)]
    path = write(tmp_path, "a.jsonl", rows)
    data = load_sequences("seq2seq", None, files={"train": path}, source_column="translation.en", target_column="translation.de")
    assert {row["target"] for row in data.splits["validation"]} <= {f"Haus {i}" for i in range(20)}


def test_causal_lm_reads_documents_or_prompts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path, "a.jsonl", [{"text": text, "source": "s", "target": "t"} for text in ("one", "", "  ", "two") * 5])
    documents = load_sequences("causal-lm", None, files={"train": path}, validation_fraction=0.2)
    assert {text for part in documents.splits.values() for text in part["text"]} == {"one", "two"}
    assert "are left out" in caplog.text
    prompts = load_sequences("causal-lm", None, files={"train": path}, target_column="target")
    assert prompts.splits["train"].column_names == ["source", "target"]


def test_string_tags_become_ids_in_sorted_order(tmp_path):
    data = load_sequences("token-classification", None, files={"train": write(tmp_path, "a.jsonl", TAGGED)})
    assert data.label_names == ("O", "ORG", "PER")
    for row in data.splits["train"]:
        assert row["tags"][:2] == [2, 0] and row["tags"][2] == (2 if int(row["tokens"][2][3:]) % 2 == 0 else 1)


def test_integer_tags_are_renumbered_and_minus_100_stays_ignored(tmp_path):
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": [7, -100, 3 + i % 2]} for i in range(20)]
    data = load_sequences("token-classification", None, files={"train": write(tmp_path, "a.parquet", rows)})
    assert data.label_names == ("3", "4", "7")
    assert {tuple(tags) for tags in data.splits["train"]["tags"]} == {(2, -100, 0), (2, -100, 1)}


def test_named_tags_keep_their_ids_though_some_never_occur(tmp_path):
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [3, 0]}] * 20, features=features).to_parquet(tmp_path / "a.parquet")
    data = load_sequences("token-classification", None, files={"train": str(tmp_path / "a.parquet")})
    assert data.label_names == tuple(names)
    assert data.splits["train"]["tags"][0] == [3, 0]


@pytest.mark.parametrize(
    ("task", "name", "rows", "match"),
    [
        ("seq2seq", "a.csv", [{"text": "a"}] * 9, "expected columns .*'source', 'target'.* set source_column and target_column"),
        ("causal-lm", "a.csv", [{"size": 0.5}] * 9, "set text_column"),
        ("seq2seq", "a.jsonl", [{"source": "a", "target": 1}] * 9, "expected text in column 'target'"),
        ("seq2seq", "a.jsonl", [{"source": "a", "target": ["b"]}] * 9, "expected text in column 'target'"),
        ("seq2seq", "a.jsonl", [*PAIRS, {"source": "x", "target": None}], "got 1 empty of"),
        ("seq2seq", "a.jsonl", [{"source": " ", "target": "x"}] * 9, "the first is row 0"),
        ("causal-lm", "a.jsonl", [{"text": ""}] * 9, "expected text in every row"),
        ("token-classification", "a.csv", [{"tokens": "a b", "ner_tags": "O O"}] * 9, "CSV cannot hold lists"),
        ("token-classification", "a.jsonl", [{"tokens": ["a"], "ner_tags": ["O", "O"]}] * 9, "got 1 words and 2 tags"),
        ("token-classification", "a.jsonl", [{"tokens": [1], "ner_tags": ["O"]}] * 9, "expected words in train"),
        ("token-classification", "a.jsonl", [{"tokens": ["a"], "ner_tags": [0.5]}] * 9, "expected tags as words or integers"),
        ("token-classification", "a.jsonl", [{"tokens": ["a"], "ner_tags": ["O"]}] * 9, "at least 2 tags"),
        ("token-classification", "a.jsonl", [*TAGGED, {"tokens": ["a"], "ner_tags": None}], "or missing ones"),
        ("seq2seq", "a.txt", PAIRS, "files of one type"),
        ("summarization", "a.csv", PAIRS, "expected a task among"),
    ],
)
def test_wrong_files_are_refused(tmp_path, task, name, rows, match):
    with pytest.raises(ValueError, match=match):
        load_sequences(task, None, files={"train": write(tmp_path, name, rows)}, validation_fraction=0.2)


def test_missing_empty_and_ambiguous_input_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"source": ')
    for name, match in (("none.csv", "existing files"), ("empty.jsonl", "empty files"), ("broken.jsonl", "expected rows in")):
        with pytest.raises(ValueError, match=match):
            load_sequences("seq2seq", None, files={"train": str(tmp_path / name)})
    with pytest.raises(ValueError, match="neither"):
        load_sequences("seq2seq", None)
    with pytest.raises(ValueError, match="two columns"):
        load_sequences("seq2seq", None, files={"train": write(tmp_path, "a.csv", PAIRS)}, source_column="target")


def test_tags_which_train_never_saw_are_refused(tmp_path):
    other = write(tmp_path, "b.jsonl", [{"tokens": ["a"], "ner_tags": ["MISC"]}])
    with pytest.raises(ValueError, match="MISC"):
        load_sequences("token-classification", None, files={"train": write(tmp_path, "a.jsonl", TAGGED), "test": other})


@pytest.mark.parametrize("column", ["source", "text", "tokens"])
def test_leaks_are_told_and_selecting_on_test_is_refused(column, caplog):
    def rows(word):
        return [{column: [word, str(i)] if column == "tokens" else f"{word} {i}", "target": "x"} for i in range(10)]

    check_sequence_overlap(splits(rows("a"), validation=rows("b"), test=rows("a")))
    assert "10 of 10 test examples are also in train" in caplog.text
    with pytest.raises(ValueError, match="selecting on test"):
        check_sequence_overlap(splits(rows("a"), validation=rows("b"), test=rows("b")))


# Sequence to sequence


def test_sources_and_targets_become_rows_with_prefix_and_suffix():
    tokenizer = g2p_tokenizer()
    row = tokenise_seq2seq(splits([{"source": "ab", "target": "AE1 B"}]), tokenizer, 32, source_prefix="z", source_suffix="q")[
        "train"
    ][0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["z", "a", "b", "q", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["AE1", "B", "</s>"]
    assert set(row) == {"input_ids", "attention_mask", "labels"}


def test_exactly_the_cut_rows_are_counted(caplog):
    sources = ["a" * n for n in (2, 3, 4, 5, 6)]  # with </s> 3 to 7 tokens
    targets = ["B " * n for n in (1, 2, 3, 4, 5)]
    parts = splits([{"source": s, "target": t} for s, t in zip(sources, targets, strict=True)])
    tokens = tokenise_seq2seq(parts, g2p_tokenizer(), 5, max_target_length=4)["train"]
    assert [len(ids) for ids in tokens["input_ids"]] == [3, 4, 5, 5, 5]
    assert [len(ids) for ids in tokens["labels"]] == [2, 3, 4, 4, 4]
    assert all(ids[-1] == 2 for ids in (*tokens["input_ids"], *tokens["labels"]))  # </s> stays at the end
    assert "train: 2 sources lose what is beyond 5 tokens; raise max_length" in caplog.text
    assert "train: 2 targets lose what is beyond 4 tokens; raise max_target_length" in caplog.text
    caplog.clear()
    tokenise_seq2seq(parts, g2p_tokenizer(), 7)
    assert not caplog.text


# Causal language modelling


@pytest.mark.parametrize("max_length", [2, 3, 5, 64])
def test_every_token_but_the_first_is_predicted_exactly_once(byte_level, max_length):
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    texts = ["the cat sat on a mat", "a", "the the the cat", "on a mat the cat sat"]
    tokens = tokenise_causal(splits([{"text": text} for text in texts]), tokenizer, max_length)["train"]
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    predicted = [pair for row in tokens for pair in zip(row["input_ids"], row["labels"][1:], strict=False)]
    assert predicted == [pair for ids in documents for pair in itertools.pairwise(ids)]
    assert all(2 <= len(row["input_ids"]) <= max_length and len(row["labels"]) == len(row["input_ids"]) for row in tokens)
    # Labels of a block which the block before has predicted are ignored, so counting labels counts every token once.
    counts = token_counts(tokens, len(tokenizer))
    assert counts.tolist() == np.bincount(np.concatenate(documents), minlength=len(tokenizer)).tolist()


def test_documents_do_not_mix_and_end_once():
    tokenizer = g2p_tokenizer()  # adds </s> of its own accord
    tokens = tokenise_causal(splits([{"text": "abcd"}, {"text": "xy"}]), tokenizer, 4)["train"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in tokens["input_ids"]] == [
        ["a", "b", "c", "d"],
        ["d", "</s>"],
        ["x", "y", "</s>"],
    ]


def test_only_the_completion_is_learnt():
    tokenizer = g2p_tokenizer()
    rows = [{"source": "ab", "target": "AE1 B"}, {"source": "c", "target": "K"}]
    tokens = tokenise_causal(splits(rows), tokenizer, 32, source_suffix="<s>")["train"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in tokens["input_ids"]] == [
        ["a", "b", "<s>", "AE1", "B", "</s>"],
        ["c", "<s>", "K", "</s>"],
    ]
    for ids, labels, prompt in zip(tokens["input_ids"], tokens["labels"], (3, 2), strict=True):
        assert labels == [-100] * prompt + ids[prompt:]


def test_cut_completions_are_counted_and_rows_stay_in_order(caplog):
    rows = [{"source": "abc", "target": "B"}, {"source": "abc", "target": "B B B"}, {"source": "abcdefg", "target": "B"}]
    tokens = tokenise_causal(splits(rows), g2p_tokenizer(), 6)["train"]
    assert [sum(label != -100 for label in labels) for labels in tokens["labels"]] == [2, 3, 0]
    assert "train: 2 rows lose the end of their completion beyond 6 tokens" in caplog.text
    assert "train: 1 rows count for nothing, because their prompt alone fills 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="prompts which fill it"):
        tokenise_causal(splits(rows[2:]), g2p_tokenizer(), 6)
    with pytest.raises(ValueError, match="in validation, got prompts which fill it"):
        tokenise_causal(splits(rows, validation=rows[2:]), g2p_tokenizer(), 6)


def test_documents_without_a_token_are_counted_and_not_all_of_them(caplog):
    tokenizer = g2p_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[0-9]+"), "")
    tokens = tokenise_causal(splits([{"text": text} for text in ("ab", "1", "c", "22")]), tokenizer, 8)["train"]
    assert len(tokens) == 2 and set(tokens.column_names) == {"input_ids", "attention_mask", "labels"}
    assert "train: 2 documents are left out, because the tokenizer makes no token of them" in caplog.text
    with pytest.raises(ValueError, match="expected documents of more than one token in train, got none"):
        tokenise_causal(splits([{"text": "1"}]), tokenizer, 8)


def test_causal_lm_needs_an_end_and_two_tokens(bert):
    with pytest.raises(ValueError, match="end-of-sequence token"):
        tokenise_causal(splits([{"text": "a"}]), bert, 16)
    with pytest.raises(ValueError, match="max_length >= 2"):
        tokenise_causal(splits([{"text": "a"}]), g2p_tokenizer(), 1)


# Token classification


def test_the_first_sub_token_carries_the_tag(bert):
    row = tokenise_words(splits([{"tokens": ["Unbelievability", "is", "rare"], "tags": [1, 0, 2]}]), bert, 32)["train"][0]
    words = bert.convert_ids_to_tokens(row["input_ids"])
    assert sum(word.startswith("##") for word in words) >= 1
    starts = [not word.startswith(("##", "[")) for word in words]
    assert [label for label, start in zip(row["labels"], starts, strict=True) if start] == [1, 0, 2]
    assert all(label == -100 for label, start in zip(row["labels"], starts, strict=True) if not start)


def test_lost_words_are_counted(bert, caplog):
    rows = [
        {"tokens": ["a"] * 10, "tags": [1] * 10},
        {"tokens": ["a", "", "b"], "tags": [0, 1, 0]},
        {"tokens": ["c"], "tags": [1]},
    ]
    tokens = tokenise_words(splits(rows), bert, 8)["train"]
    assert [sum(label != -100 for label in labels) for labels in tokens["labels"]] == [6, 2, 1]
    assert "train: 5 words are beyond 8 tokens or have none" in caplog.text


def test_tokenizers_which_cannot_tag_words_are_refused(byte_level):
    rows = splits([{"tokens": ["the", "cat"], "tags": [0, 1]}])
    with pytest.raises(ValueError, match="add_prefix_space=True"):
        tokenise_words(rows, AutoTokenizer.from_pretrained(byte_level), 16)
    with pytest.raises(ValueError, match="fast tokenizer"):
        tokenise_words(rows, ByT5Tokenizer(), 16)
    tokenizer = AutoTokenizer.from_pretrained(byte_level, add_prefix_space=True)
    assert tokenizer.decode(tokenise_words(rows, tokenizer, 16)["train"][0]["input_ids"]) == " the cat"


# All of them


def test_the_rows_of_all_tasks_pad_with_one_collator(bert):
    g2p = g2p_tokenizer()
    words = splits([{"tokens": ["a"] * n, "tags": [1] * n} for n in (1, 3)])
    for tokenizer, parts in (
        (g2p, tokenise_seq2seq(splits(PAIRS[:2]), g2p, 16)),
        (g2p, tokenise_causal(splits([{"text": "abcd"}, {"text": "x"}]), g2p, 16)),
        (g2p, tokenise_causal(splits(PAIRS[:2]), g2p, 16)),
        (bert, tokenise_words(words, bert, 16)),
    ):
        batch = DataCollatorForSeq2Seq(tokenizer)([parts["train"][i] for i in range(2)])
        assert (batch["labels"] != -100).sum().item() == sum(token_counts(parts["train"], len(tokenizer)))


def test_token_counts_are_exact():
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[5, 5, -100], [0, -100, 5]]})
    counts = token_counts(tokens, 7)
    assert counts.tolist() == [1, 0, 0, 0, 0, 3, 0] and counts.dtype == np.int64
    with pytest.raises(ValueError, match="label ids in"):
        token_counts(tokens, 5)
