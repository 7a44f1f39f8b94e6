"""Rows as questions: columns, answers in their several ways, prompts, few-shot examples, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_ls.answers.reading import QuestionArguments, read_questions

ROWS = [
    {"question": "Sky?", "choices": ["blue", "green"], "answer": "blue"},
    {"question": "Grass?", "choices": ["blue", "green"], "answer": "green"},
]


def read(rows: list[dict[str, Any]] | Dataset, examples: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
    part = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    shots = None if examples is None else Dataset.from_list(examples)
    return read_questions({"test": part}, QuestionArguments(**settings), shots)


def answers(rows: list[dict[str, Any]], **settings: Any) -> list[int | None]:
    return [question.answer for question in read(rows, **settings).splits["test"]]


def with_answers(*values: Any, options: list[Any] | None = None) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "options": options or ["w", "x", "y", "z"], "answer": value} for i, value in enumerate(values)]


def test_the_usual_columns():
    data = read(ROWS)
    first, second = data.splits["test"]
    assert first.prompt == "Question: Sky?\nAnswer:" and first.options == ("blue", "green")
    assert (first.answer, second.answer) == (0, 1)
    assert data.label_names == ["blue", "green"] and "options_column: 'choices'" in data.notes[0]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        (("x", "Z "), [1, 3]),
        (("B", "d"), [1, 3]),
        (("(B)", "D."), [1, 3]),
        ((0, 3), [0, 3]),
        (("0", "3"), [0, 3]),
        ((1.0, 0.0), [1, 0]),
        ((1, 4), [0, 3]),
    ],
)
def test_ways_to_name_the_answer(values, places):
    assert answers(with_answers(*values)) == places


def test_answers_which_can_be_read_in_two_ways_are_refused():
    with pytest.raises(
        ValueError, match=r"got 1 in row 0 of test, which is the place .* from 0 on 'x' or .* from 1 on 'w'.*answer_is"
    ):
        read(with_answers(1, 3))
    assert answers(with_answers(1, 3), answer_is="number") == [0, 2]
    assert answers(with_answers(1, 3), answer_is="index") == [1, 3]
    with pytest.raises(ValueError, match="the text of an option 'A' or the letter of an option 'B'"):
        read(with_answers("A", options=["B", "A"]))


@pytest.mark.parametrize("value", ["q", 7, None, "E", -1])
def test_an_answer_which_is_no_option_is_refused(value):
    rows = with_answers("x", "y", "x") if isinstance(value, str | None) else with_answers(0, 1, 2)
    rows[1]["answer"] = value
    with pytest.raises(ValueError, match=r"expected the answer in row 1 of test as the .* among 'w', 'x', 'y', 'z'"):
        read(rows)


def test_true_is_no_place():
    with pytest.raises(ValueError, match="got True"):
        read(with_answers(True, False, options=["yes", "no"]))


def test_options_with_letters_of_their_own():
    rows = [
        {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": key} for key in ("2", "3")
    ]
    data = read(rows, score="letter", answer_is="letter")
    assert [q.answer for q in data.splits["test"]] == [1, 2]
    assert data.splits["test"][0].prompt == "q\n1. a\n2. b\n3. c\nAnswer:" and data.splits["test"][0].options == ("1", "2", "3")


def test_one_column_for_each_option_of_which_the_last_may_be_missing():
    rows = [
        {"question": "q", "A": "one", "B": "two", "C": "three", "answer": "C"},
        {"question": "r", "A": "four", "B": "five", "C": None, "answer": "B"},
    ]
    data = read(rows)
    assert [len(q.options) for q in data.splits["test"]] == [3, 2] and data.label_names == ["A", "B", "C"]
    rows[1]["B"] = None
    rows[1]["C"] = "six"
    with pytest.raises(ValueError, match="got option 1 empty"):
        read(rows)


def test_a_list_as_json_and_options_for_all_rows():
    assert answers([{"question": "q", "options": '["yes", "no"]', "answer": "no"}]) == [1]
    assert answers([{"question": "q", "answer": "no"}], options=["yes", "no"]) == [1]
    with pytest.raises(ValueError, match="got the text 'yes, no'; write JSON"):
        read([{"question": "q", "options": "yes, no", "answer": "no"}])


def test_classes_of_a_dataset_are_options():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = read(Dataset.from_dict({"text": ["fine", "poor"], "label": [1, 0]}, features=features))
    assert data.label_names == ["bad", "good"] and [q.answer for q in data.splits["test"]] == [1, 0]


def test_template_with_columns_choices_and_line_breaks():
    rows = [row | {"subject": "nature"} for row in ROWS]
    data = read(
        rows, prompt_template=r"About {subject}: {question}\n{choices}\n{{so}}", score="letter", instruction="Say A or B."
    )
    assert data.splits["test"][0].prompt == "Say A or B.\n\nAbout nature: Sky?\nA. blue\nB. green\n{so}"
    assert data.splits["test"][0].options == ("A", "B")


def test_examples_stand_before_each_prompt_with_their_answers():
    shots = [{"question": "Snow?", "choices": ["white", "red"], "answer": "white"}]
    data = read(ROWS, shots)
    assert data.splits["test"][1].prompt == "Question: Snow?\nAnswer: white\n\nQuestion: Grass?\nAnswer:" and data.few_shot == 1
    lettered = read(ROWS, shots, score="letter").splits["test"][0].prompt
    assert lettered == "Snow?\nA. white\nB. red\nAnswer: A\n\nSky?\nA. blue\nB. green\nAnswer:"


def test_what_is_odd_is_said():
    twice = [{"question": "q", "choices": ["a", "a"], "answer": 0}, {"question": "r", "choices": ["a", "b"], "answer": 1}]
    assert any("1 questions have an option twice" in note for note in read(twice, score="letter", answer_is="index").notes)
    with pytest.raises(ValueError, match=r"got 'a' twice.*row 0 of test"):
        read(twice, answer_is="index")
    assert any("1 questions are also among the few-shot examples" in note for note in read(ROWS, ROWS[:1]).notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt_template": "{qestion}"}, "got {qestion}; did you mean"),
        ({"prompt_template": "{question!r}"}, "expected plain {names}"),
        ({"prompt_template": "{question"}, "expected {names} of columns"),
        ({"prompt_template": "{choices[0]}"}, "got {choices\\[0\\]}"),
        ({"score": "letter", "prompt_template": "{question}"}, "expected {choices} in prompt_template"),
        ({"score": "letter", "length_normalisation": "tokens"}, "letters have one length"),
        ({"options": ["a", "b"], "options_column": ["choices"]}, "expected options or options_column, got both"),
        ({"question_column": "q"}, r"got none of \['q'\] among the columns"),
    ],
)
def test_settings_which_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        read(ROWS, **settings)


def test_a_file_without_options_says_how_to_give_them():
    with pytest.raises(ValueError, match=r"set .*options_column.*, or options where all rows share them"):
        read([{"question": "q", "answer": "yes"}])


def test_a_row_without_a_question_is_refused():
    with pytest.raises(ValueError, match=r"expected text for {question} of the prompt, got None.*row 1 of test"):
        read([ROWS[0], ROWS[1] | {"question": None}])
