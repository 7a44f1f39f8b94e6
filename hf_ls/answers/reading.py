"""Rows of a file as questions: which columns they are in, which option is right, and the prompt, made by a template."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from datasets import ClassLabel, Dataset

from hf_ls.answers.questions import Question, continuation, letter
from hf_ls.common.errors import did_you_mean
from hf_ls.common.text import one_line
from hf_ls.data.guessing import guess_columns
from hf_ls.data.labels import folded

logger = logging.getLogger(__name__)

Reading = Literal["text", "letter", "index", "number"]

FEW_SHOT = "few_shot_file"
_BETWEEN = "\n\n"  # examples, and the prompt behind them
_READINGS: dict[Reading, str] = {
    "text": "the text of an option",
    "letter": "the letter of an option",
    "index": "the place of an option from 0 on",
    "number": "the place of an option from 1 on",
}
_TEMPLATES = {"text": "Question: {question}\nAnswer:", "letter": "{question}\n{choices}\nAnswer:"}


@dataclass(kw_only=True)
class QuestionArguments:
    """How rows become questions.

    Raises: ValueError for settings which contradict each other.
    """

    question_column: str | None = field(
        default=None, metadata={"help": "questions: column with the question or the whole prompt; guessed where left out."}
    )
    options_column: list[str] = field(
        default_factory=list,
        metadata={"help": "questions: column with the list of options, or one column for each option; guessed."},
    )
    options: list[str] = field(default_factory=list, metadata={"help": "questions: options which all rows share."})
    answer_column: str | None = field(default=None, metadata={"help": "questions: column with the right option; guessed."})
    answer_is: Literal["auto", "text", "letter", "index", "number"] = field(
        default="auto",
        metadata={"help": "questions: what names the right option: its text, letter, place from 0 (index) or 1 (number)."},
    )
    score: Literal["text", "letter"] = field(
        default="text",
        metadata={"help": "questions: take the probability of the text of an option, or of its letter (listed by {choices})."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "questions: the prompt, with {question}, {choices} (one line each, 'A. text') and any column by its "
            r"name; \n is a line break."
        },
    )
    instruction: str = field(default="", metadata={"help": "questions: text before everything, with a blank line after it."})
    few_shot_file: str | None = field(
        default=None,
        metadata={"help": "questions: file of rows as in test_file, put before each prompt with their answers."},
    )
    option_prefix: str = field(
        default=" ", metadata={"help": "questions: what stands between a prompt which ends without a blank and an option."}
    )
    length_normalisation: Literal["none", "tokens", "characters"] = field(
        default="none",
        metadata={
            "help": "questions: log-probability of an option as it is, over its tokens, or over its characters, as "
            "acc_norm of lm-evaluation-harness."
        },
    )

    def check(self) -> None:
        """Refuse settings which contradict each other.

        Raises: ValueError.
        """
        if self.options and self.options_column:
            raise ValueError(f"expected options or options_column, got both ({self.options}, {self.options_column}); set one")
        if self.score == "letter" and self.length_normalisation != "none":
            raise ValueError(
                f"expected length_normalisation none with score letter, got {self.length_normalisation}; letters have one length"
            )
        if self.score == "letter" and "choices" not in _fields(self.template("question")):
            raise ValueError(
                f"expected {{choices}} in prompt_template with score letter, got {self.prompt_template!r}; the model must see "
                "which letter is which"
            )

    def template(self, question_column: str) -> str:
        """The template, by default that of the questions or, of a column `prompt`, the prompt as it is."""
        if self.prompt_template is not None:
            return self.prompt_template.replace("\\n", "\n")
        return "{question}" if question_column == "prompt" and self.score == "text" else _TEMPLATES[self.score]


@dataclass(frozen=True)
class QuestionData:
    """Splits of questions, and what was made of the settings.

    label_names: the options, where all rows have the same ones, else their letters.
    template: of the prompts. few_shot: how many examples stand before each. notes: what was guessed or is odd, a sentence each.
    """

    splits: dict[str, list[Question]]
    label_names: list[str]
    template: str
    few_shot: int
    notes: tuple[str, ...]


class _Row(NamedTuple):
    """One row as read: all its columns, the text of the question, options and their letters, and what it says of the answer."""

    where: str
    values: dict[str, Any]
    question: Any
    texts: list[str]
    letters: list[str]
    answer: Any


def read_questions(splits: Mapping[str, Dataset], settings: QuestionArguments, examples: Dataset | None = None) -> QuestionData:
    """The questions of some splits; `examples` are put before each prompt, with their answers.

    Raises: ValueError for columns which are not there, rows without two different options and a right one, answers which can be
    read in two ways, and a template with unknown names.
    """
    settings.check()
    parts = dict(splits) | ({} if examples is None else {FEW_SHOT: examples})
    question, options, answer, guessed = _columns(next(iter(splits.values())), settings)
    template = settings.template(question)
    known = {"question", "choices", *next(iter(splits.values())).column_names}
    for name in _fields(template):
        if name not in known:
            raise ValueError(
                f"expected names of columns in prompt_template, got {{{name}}}; "
                + did_you_mean(name, known, "double other braces")
            )
    rows = {split: _rows(part, split, question, options, answer, settings) for split, part in parts.items()}
    places, said = _places(rows, settings.answer_is)
    before = [settings.instruction.replace("\\n", "\n")] if settings.instruction else []
    for row, place in zip(rows.get(FEW_SHOT, ()), places.get(FEW_SHOT, ()), strict=True):
        shot = _question(row, template, settings.score, place)
        before.append("".join(continuation(shot.prompt, shot.options[place], settings.option_prefix)))
    lead = "".join(text + _BETWEEN for text in before)
    made = {
        split: [_question(row, template, settings.score, at, lead) for row, at in zip(rows[split], places[split], strict=True)]
        for split in splits
    }
    tested = [row for split in splits for row in rows[split]]
    repeated = sum(len(set(row.texts)) < len(row.texts) for row in tested)
    shown = {row.question for row in rows.get(FEW_SHOT, ())}
    same = sum(row.question in shown for row in tested)
    odd = [
        f"{repeated} questions have an option twice; their letters are scored all the same" if repeated else "",
        f"{same} questions are also among the few-shot examples, which show their answer" if same else "",
    ]
    sets = {tuple(row.texts) for row in tested}
    names = list(sets.pop()) if len(sets) == 1 else max((row.letters for row in tested), key=len)
    notes = [note for note in (guessed, said, *(f"Warning: {text}" for text in odd if text)) if note]
    return QuestionData(made, names, template, len(rows.get(FEW_SHOT, ())), tuple(notes))


def _columns(part: Dataset, settings: QuestionArguments) -> tuple[str, list[str], str, str | None]:
    """The columns of question, options (none where all rows share them) and answer, and what was guessed."""
    wanted: dict[str, str | None] = {"question": settings.question_column}
    columns = list(settings.options_column)
    if not settings.options and not columns:
        columns = [name for name in map(letter, range(26)) if name in part.column_names]
        columns = columns if len(columns) > 1 and columns[0] == "A" else []
        named = settings.answer_column or next((n for n, f in part.features.items() if isinstance(f, ClassLabel)), None)
        if not columns and not (named and _class_names(part, named)):
            wanted["options"] = None
    try:
        found, guessed = guess_columns(part, wanted | {"answer": settings.answer_column}, "the file")
    except ValueError as error:
        raise ValueError(f"{error}, or options where all rows share them" if "options" in wanted else str(error)) from error
    return found["question"], columns or [found[kind] for kind in ("options",) if kind in found], found["answer"], guessed


def _class_names(part: Dataset, column: str) -> list[str]:
    feature = part.features.get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _rows(part: Dataset, split: str, question: str, options: list[str], answer: str, settings: QuestionArguments) -> list[_Row]:
    absent = [column for column in (question, *options, answer) if column not in part.column_names]
    if absent or not len(part):
        got = f"none of {absent}" if absent else "no row"
        raise ValueError(
            f"expected questions in {split}, got {got} among the columns {part.column_names}; set question_column, "
            "options_column and answer_column"
        )
    names = _class_names(part, answer)
    shared = settings.options or ([] if options else names)
    found = []
    for i, values in enumerate(part):
        where = f"row {i} of {split}"
        texts, letters = _options([values[column] for column in options], shared, where)
        said = values[answer]
        said = names[said] if names and isinstance(said, int) and 0 <= said < len(names) else said
        found.append(_Row(where, values, values[question], texts, letters, said))
    return found


def _options(cells: list[Any], shared: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """The texts of the options of a row and their letters, of the data where it has some: `{"text": […], "label": […]}`."""
    letters = None
    found: Any = cells
    if shared:
        found = list(shared)
    elif len(cells) == 1:
        found = _parsed(cells[0], where)
        if isinstance(found, Mapping) and {"text", "label"} <= found.keys():
            letters, found = [str(label) for label in found["label"]], found["text"]
        if not isinstance(found, list):
            raise ValueError(f"expected a list of options in {where}, got {found!r:.60}; set options_column")
    while found and found[-1] is None:  # a row with fewer options than there are columns
        found = found[:-1]
    texts = ["" if text is None else str(text).strip() for text in found]
    if len(texts) < 2 or not all(texts):
        got = f"option {texts.index('')} empty" if "" in texts else f"{len(texts)}"
        raise ValueError(f"expected 2 options or more, each with text, in {where}, got {got}; fill them in, or drop that row")
    return texts, letters or [letter(i) for i in range(len(texts))]


def _parsed(cell: Any, where: str) -> Any:
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'expected a list of options in {where}, got the text {cell[:40]!r}; write JSON, ["yes", "no"], or name one column '
            "for each option in options_column"
        ) from error


def _places(rows: Mapping[str, Sequence[_Row]], wanted: str) -> tuple[dict[str, list[int]], str | None]:
    """The place of the right option of each row, read in the same way everywhere, and how in a sentence where that was found.

    Raises: ValueError where no way fits all rows, or two of them name other options.
    """
    tried = [reading for reading in _READINGS if wanted in ("auto", reading)]
    found = {reading: {split: [_place(row, reading) for row in part] for split, part in rows.items()} for reading in tried}
    whole = {r: places for r, places in found.items() if not any(None in part for part in places.values())}
    if not whole:
        best = max(tried, key=lambda r: sum(place is not None for part in found[r].values() for place in part))
        row = next(r for split, part in rows.items() for r, place in zip(part, found[best][split], strict=True) if place is None)
        raise ValueError(
            f"expected the answer in {row.where} as {_READINGS[best]} among {_shown(row.texts)}, got {row.answer!r}; correct it, "
            "drop that row, or set answer_column or answer_is"
        )
    reading, places = next(iter(whole.items()))
    for other, others in whole.items():
        for row, one, two in ((r, a, b) for s in rows for r, a, b in zip(rows[s], places[s], others[s], strict=True)):
            if one != two:
                ways = f"{_READINGS[reading]} {row.texts[one or 0]!r} or {_READINGS[other]} {row.texts[two or 0]!r}"
                raise ValueError(
                    f"expected answers which can be read in one way, got {row.answer!r} in {row.where}, which is {ways}; set "
                    f"answer_is to {reading} or {other}"
                )
    settled = {split: [place for place in part if place is not None] for split, part in places.items()}
    return settled, f"Answers were read as {_READINGS[reading]}" if wanted == "auto" else None


def _place(row: _Row, reading: Reading) -> int | None:
    """Which option the answer names; None where it names none."""
    if row.answer is None or (isinstance(row.answer, bool) and reading != "text"):
        return None
    said = folded(row.answer)
    if reading in ("index", "number"):
        place = int(said) - (reading == "number") if said.isdecimal() else -1
        return place if 0 <= place < len(row.texts) else None
    if reading == "letter":
        said = folded(str(row.answer).strip(" ().:"))
    known = row.texts if reading == "text" else row.letters
    exact = [i for i, option in enumerate(known) if option == str(row.answer)]
    like = exact or [i for i, option in enumerate(known) if folded(option) == said]
    return like[0] if len(like) == 1 else None


def _question(row: _Row, template: str, score: str, place: int, lead: str = "") -> Question:
    listed = "\n".join(f"{mark}. {text}" for mark, text in zip(row.letters, row.texts, strict=True))
    values = row.values | {"question": row.question, "choices": listed}
    try:
        for name in _fields(template):
            if not isinstance(values[name], str | int | float) or not str(values[name]).strip():
                raise ValueError(
                    f"expected text for {{{name}}} of the prompt, got {values[name]!r:.40}; fill it in, or drop that row"
                )
        filled = "".join(before + ("" if name is None else str(values[name])) for before, name in _pieces(template))
        return Question(lead + filled, tuple(row.letters if score == "letter" else row.texts), place)
    except ValueError as error:
        raise ValueError(f"{error} ({row.where})") from error


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Text and the name behind it, in turn; `{{` is a brace.

    Raises: ValueError for anything but names in braces.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"expected {{names}} of columns in prompt_template, got {template!r}: {error}; double other braces"
        ) from error
    if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parsed):
        raise ValueError(f"expected plain {{names}} of columns in prompt_template, got {template!r}; double other braces")
    return [(text, name) for text, name, *_ in parsed]


def _fields(template: str) -> list[str]:
    return [name for _, name in _pieces(template) if name is not None]


def _shown(texts: Sequence[str]) -> str:
    return ", ".join(repr(one_line(text)[:40]) for text in texts[:6]) + (" …" if len(texts) > 6 else "")
