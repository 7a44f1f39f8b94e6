"""Task and columns of a file which says neither: guessed by names and by what is in the columns, or refused."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_ls.data.guessing import guess_columns, guess_soft_labels, guess_task

N = 60
TEXTS = [f"a sentence about number {i}" for i in range(N)]
SAID, ANSWERED = [[{"role": "user", "content": t}] for t in TEXTS], [[{"role": "assistant", "content": t[::-1]}] for t in TEXTS]
TEXT, TAGS, PAIR = {"text": None, "label": None}, {"tokens": None, "tags": None}, {"source": None, "target": None}


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("part", "task", "found"),
    [
        (rows(text=TEXTS, label=[i % 2 for i in range(N)]), "text-classification", {"text": "text", "label": "label"}),
        (rows(id=list(range(N)), Comment=TEXTS, Category=["None", "b", "c"] * 20), "text-classification", {"text": "Comment", "label": "Category"}),
        (rows(zzz=TEXTS, kind=["x", "y"] * 30), "text-classification", {"text": "zzz", "label": "kind"}),
        (rows(title=[t[:9] for t in TEXTS], abstract=TEXTS, stars=[float(i % 5) for i in range(N)]), "text-classification", {"text": "abstract", "label": "stars"}),
        (rows(words=[["Ann", "ran"]] * N, ner=[["B", "O"]] * N), "token-classification", {"tokens": "words", "tags": "ner"}),
        (rows(xs=[["Ann", "ran"]] * N, ys=[[1, 0]] * N), "token-classification", {"tokens": "xs", "tags": "ys"}),
        (rows(document=TEXTS, summary=[t[:9] + t[-3:] for t in TEXTS]), "seq2seq", {"source": "document", "target": "summary"}),
        (rows(prompt=TEXTS, completion=[t[::-1] for t in TEXTS]), "causal-lm", {"source": "prompt", "target": "completion"}),
        (rows(prompt=SAID, completion=ANSWERED, label=["x", "y"] * 30), "sft", {"source": "prompt", "target": "completion"}),
        (rows(id=list(range(N)), source=["a", "b"] * 30, messages=SAID), "sft", {"messages": "messages"}),
        (rows(text=TEXTS, turns=SAID), "sft", {"messages": "turns"}),
        (rows(Conversations=[[{"from": "human", "value": t}] for t in TEXTS], tools=SAID), "sft", {"messages": "Conversations"}),
    ],
)  # fmt: skip
def test_columns_which_tell(part, task, found):
    assert guess_task(part) == task
    columns, said = guess_columns(part, dict.fromkeys(found))
    assert columns == found
    usual = ({"text": "text", "label": "label"}, {"messages": "messages"})
    assert said is None if found in usual else all(f"{kind}_column: {column!r}" in said for kind, column in found.items())


def test_one_text_alone_is_a_language_model_and_named_classes_are_labels():
    assert guess_task(rows(story=TEXTS)) == "causal-lm"
    named = Dataset.from_dict(
        {"s": TEXTS, "k": [0, 1] * 30}, features=Features({"s": Value("string"), "k": ClassLabel(names=["no", "yes"])})
    )
    assert guess_columns(named, TEXT)[0] == {"text": "s", "label": "k"}


@pytest.mark.parametrize(
    ("part", "given"),
    [
        (rows(a=TEXTS, b=TEXTS[::-1]), TEXT),  # two texts, no class
        (rows(a=TEXTS, b=["x", "y"] * 30, c=["p", "q", "r"] * 20), TEXT),  # two columns of classes
        (rows(a=[0.5] * N, b=[1] * N), TEXT),
        (rows(a=TEXTS, b=TEXTS), PAIR),
        (rows(a=[[1, 2]] * N, b=[[1, 0]] * N), TAGS),
        (rows(a=SAID, b=ANSWERED), {"messages": None}),
    ],
)
def test_columns_which_do_not_tell_are_refused(part, given):
    with pytest.raises(ValueError, match=r"expected columns .* in train, got \['a', 'b'.*_column"):
        guess_columns(part, given)


def test_what_the_user_says_is_not_guessed():
    part = rows(a=TEXTS, b=["x", "y"] * 30, label=["p", "q", "r"] * 20)
    columns, said = guess_columns(part, {"text": None, "label": "b"})
    assert columns == {"text": "a", "label": "b"} and said.endswith("text_column: 'a'")


SHARES = [{"no": i % 3 / 2, "yes": 1 - i % 3 / 2} for i in range(N)]


@pytest.mark.parametrize(
    "votes",
    [SHARES, [list(share.values()) for share in SHARES], [str(list(share.values())) for share in SHARES], [{"no": 3, "yes": None}] * N],
    ids=["mapping", "list", "JSON", "a class without votes"],
)  # fmt: skip
def test_numbers_for_each_class_are_soft_labels(votes):
    part = rows(id=list(range(N)), text=TEXTS, votes=votes)
    assert guess_task(part) == "text-classification" and guess_soft_labels(part) == ["votes"]
    assert not guess_soft_labels(rows(text=TEXTS, votes=votes, label=["a", "b"] * 30)), "classes are there"
    assert not guess_soft_labels(rows(text=TEXTS, votes=votes, more=votes)), "which one?"


@pytest.mark.parametrize(
    "other",
    [[[0.5, -0.5]] * N, [[1], [1, 2]] * 30, [["a", "b"]] * N, [[0, 0]] * N, [0.5] * N, [3, 4, 4] * 20],
    ids=["negative", "ragged", "words", "nothing", "numbers", "whole"],
)
def test_a_text_beside_something_else_is_no_language_model(other):
    assert not guess_soft_labels(rows(text=TEXTS, other=other))
    assert guess_task(rows(text=TEXTS, other=other)) in (None, "text-classification")
    assert guess_task(rows(text=TEXTS, id=list(range(N)))) == "causal-lm"


def test_preferences_are_no_conversations_to_learn():
    assert guess_task(rows(prompt=SAID, chosen=ANSWERED, rejected=ANSWERED)) is None
