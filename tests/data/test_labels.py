"""One equality of labels: training, evaluation, splits and words alike."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_ls.data.classification import load_classification
from hf_ls.data.labels import classes_of, folded, match_labels
from hf_ls.data.reading import read_files
from hf_ls.data.sequences import load_sequences

SAME = [
    ("pos", "pos "), ("neg", "Neg"), ("New York", "new  york"), ("stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301"), ("1", "1.0"),
    ("1", "01"), ("+1", "1"), ("-0", "0"), ("2.50", "2.5"), (" 7", "7"), ("\tx", "x\u00a0"),
]  # fmt: skip
DIFFERENT = [
    ("pos", "neg"), ("1", "10"), ("1", "-1"), ("1e3", "1000"), ("1.5", "15"), ("a b", "ab"), ("1.", "1.5"), ("x1", "x01"),
    ("None", "none."), ("True", "1"), ("10", "1"), (".", ".."), ("1.0.0", "1.0"), ("0", "O"),
]  # fmt: skip
PAIRS = [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT]


def trains(tmp_path, a, b):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"s {i}", "label": (a, b)[i % 2]}) + "\n" for i in range(20)))
    return load_classification(None, files={"train": str(tmp_path / "a.jsonl")}).label_names


def trains_on_tags(tmp_path, a, b):
    rows = [{"tokens": ["w", f"v{i}"], "ner_tags": [a, b]} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_sequences("token-classification", None, files={"train": str(tmp_path / "t.jsonl")}).label_names


def trains_on_named_classes(tmp_path, a, b):
    features = Features({"text": Value("string"), "label": ClassLabel(names=[a, b])})
    Dataset.from_list([{"text": f"s {i}", "label": i % 2} for i in range(20)], features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    return load_classification(None, files={"train": str(tmp_path / "a.parquet")}).label_names


def trains_on_named_tags(tmp_path, a, b):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=[a, b]))})
    rows = [{"tokens": ["w", f"v{i}"], "ner_tags": [0, 1]} for i in range(20)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    return load_sequences("token-classification", None, files={"train": str(tmp_path / "t.parquet")}).label_names


def evaluates(tmp_path, a, b):
    return (a, b) if match_labels([a, b], [a, b]).ids == {a: 0, b: 1} else None


def maps(tmp_path, a, b):
    return (a, b) if match_labels([a, b], ["p", "q"], given={a: "p", b: "q"}).ids == {a: 0, b: 1} else None


@pytest.mark.parametrize(("a", "b", "same"), PAIRS)
@pytest.mark.parametrize("use", [trains, trains_on_tags, trains_on_named_classes, trains_on_named_tags, evaluates, maps])
def test_training_and_evaluation_agree_whether_two_labels_are_one_class(tmp_path, use, a, b, same):
    assert (folded(a) == folded(b)) == same
    if same:
        with pytest.raises(ValueError, match="distinct names") as caught:
            use(tmp_path, a, b)
        assert repr(a) in str(caught.value) and repr(b) in str(caught.value)
    else:
        assert sorted(use(tmp_path, a, b)) == sorted([a, b])  # the exact texts


@pytest.mark.parametrize(("a", "b"), SAME)
def test_splits_and_models_are_matched_by_the_same_equality(tmp_path, a, b):
    for name, label in (("train", a), ("test", b)):
        rows = [{"text": f"{name} {i}", "label": (label, "other")[i % 2]} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_classification(None, files={split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")})
    assert [data.label_names[k] for k in data.splits["test"]["label"][:2]] == [a, "other"]
    assert match_labels([b, "other"], data.label_names).ids == {
        b: data.label_names.index(a),
        "other": data.label_names.index("other"),
    }


def test_classes_named_by_numbers_are_not_read_as_ids():
    """A model of 1 to 4 stars and data of 1 to 3: as ids these would be 2, 3 and 4 stars."""
    assert match_labels([1, 2, 3], ["1", "2", "3", "4"]).ids == {1: 0, 2: 1, 3: 2}
    assert match_labels([1.0, 2.0], ["1", "2"]).ids == {1.0: 0, 2.0: 1}
    with pytest.raises(ValueError, match="expected the labels of the model"):
        match_labels([0, 1], ["1", "2", "3"])
    assert match_labels([0, 1], ["bad", "good"]).ids == {0: 0, 1: 1}  # words: ids are all that is left


@pytest.mark.parametrize("labels", [["10", "9", "1"], [10, 9, 1], ["10", "9.0", "1"], [10.0, 9.0, 1.0]])
def test_numbers_are_in_the_order_of_their_values(labels):
    assert classes_of(labels, "train") == labels[::-1]


@pytest.mark.parametrize("labels", [["a", None], ["a", ""], ["a", " "], [1.0, float("nan")]])
def test_missing_labels_are_refused(labels):
    with pytest.raises(ValueError, match="got missing labels in train"):
        classes_of(labels, "train")


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "NaN", "n/a", "N/A", "NULL", "#N/A", "<NA>", "-nan", ""])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_only_an_empty_field_is_missing(tmp_path, word, suffix):
    sep = {"csv": ",", "tsv": "\t"}[suffix]

    def write(name, *columns):
        rows = zip(*columns, strict=True)
        (tmp_path / name).write_text("\n".join(sep.join(row) for row in rows) + "\n")
        return {"train": str(tmp_path / name)}

    texts, words = ["text", *(f"s {i}" for i in range(30))], ["label", *((word, "hate", "0")[i % 3] for i in range(30))]
    labelled, documents = (
        write(f"a.{suffix}", texts, words),
        write(f"b.{suffix}", ["text", *words[1:]], ["id", *map(str, range(30))]),
    )
    pairs = write(f"c.{suffix}", ["source", *texts[1:]], ["target", *words[1:]])
    if word:
        assert set(load_classification(None, files=labelled).label_names) == {word, "hate", "0"}
        assert sum(map(len, load_sequences("causal-lm", None, files=documents).splits.values())) == 30
        assert word in load_sequences("seq2seq", None, files=pairs).splits["train"]["target"]
        return
    with pytest.raises(ValueError, match="missing labels"):
        load_classification(None, files=labelled)
    with pytest.raises(ValueError, match=r"got \d+ empty of 30"):
        load_sequences("seq2seq", None, files=pairs)


def test_what_a_corpus_loses_is_a_warning(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,id\n" + "".join(f"{'' if i % 2 else f's {i}'},{i}\n" for i in range(30)))
    data = load_sequences("causal-lm", None, files={"train": str(tmp_path / "a.csv")})
    lost = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum(int(text.split(": ")[1].split()[0]) for text in lost) == 15 == sum(map(len, data.splits.values()))
    assert all("left out, because their text is missing or blank" in text for text in lost)


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        (["1", "22", "-3", "0"], int), (["1", "", "3"], int), (["007", "1"], str), (["1", "1.5", "2e-3"], float), (["1", "x"], str),
        (["True", "False"], bool), (["True", "1"], str), (["nan", "0.5"], str), (["inf", "1"], str), (["9" * 30, "1"], str),
    ],
)  # fmt: skip
def test_a_csv_column_is_of_numbers_only_where_every_field_is_one(tmp_path, fields, kinds):
    (tmp_path / "a.csv").write_text("n,t\n" + "".join(f"{field},x\n" for field in fields))
    column = list(read_files({"train": str(tmp_path / "a.csv")})["train"]["n"])
    assert [type(value) for value in column] == [kinds if field else type(None) for field in fields]


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"tweet": 1.5, "stars": "a"}, {"text_column": "tweet", "label_column": "stars"}, "column 'tweet'"),
        (
            {"tweet": "a", "votes": [0.5, 0.5]},
            {"text_column": "tweet", "label_column": "votes"},
            "column 'votes'.*votes of raters",
        ),
        ({"tweet": "a", "votes": None}, {"text_column": "tweet", "label_column": "votes"}, "column 'votes'"),
        ({"tweet": "a"}, {"text_column": "tweet", "label_column": "tweet"}, "different columns"),
        ({"tweet": "a"}, {"text_column": "tweet", "label_column": ""}, "expected columns"),
    ],
)
def test_a_refusal_names_the_column_of_the_user(tmp_path, row, settings, said):
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 20)
    with pytest.raises(ValueError, match=said) as caught:
        load_classification(None, files={"train": str(tmp_path / "a.jsonl")}, **settings)
    assert "'text'" not in str(caught.value) and "'label'" not in str(caught.value)


@pytest.mark.parametrize(("task", "column"), [("causal-lm", "messages"), ("causal-lm", "chat"), ("seq2seq", "chat")])
def test_conversations_are_told_where_they_belong(tmp_path, task, column):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text((json.dumps({column: chat, "target": "x"}) + "\n") * 20)
    named = {"text_column": column} if task == "causal-lm" else {"source_column": column}
    with pytest.raises(ValueError, match=f"column '{column}' of train, got conversations .*LabelSmoothingSFTTrainer"):
        load_sequences(task, None, files={"train": str(tmp_path / "a.jsonl")}, **named)
