"""A question with options, and how a prompt and an option are joined: in one place, for few-shot examples and for scoring."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """A prompt, the texts which may follow it, and the place of the right one, from 0 on; None where it is not known.

    Raises: ValueError for fewer than two options, an empty prompt or option, equal options, or an answer which is none of them.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"expected a prompt, got {self.prompt!r}; a model which reads nothing cannot answer")
        if len(self.options) < 2:
            raise ValueError(f"expected 2 options or more, got {list(self.options)}; a probability needs alternatives")
        empty = [i for i, option in enumerate(self.options) if not option.strip()]
        if empty:
            raise ValueError(f"expected text in every option, got option {empty[0]} empty; drop that row or fill it in")
        stripped = [option.strip() for option in self.options]
        if len(set(stripped)) < len(stripped):
            twice = next(option for option in stripped if stripped.count(option) > 1)
            raise ValueError(f"expected different options, got {twice!r} twice; drop that row, or score letters")
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise ValueError(f"expected an answer from 0 to {len(self.options) - 1}, got {self.answer}; give its place")

    @classmethod
    def of(cls, row: Any) -> Question:
        """The question which a mapping with `prompt`, `options` and perhaps `answer` (a place from 0 on) describes.

        Raises: TypeError for anything else; ValueError as the class.
        """
        if isinstance(row, Question):
            return row
        if not isinstance(row, Mapping) or not {"prompt", "options"} <= row.keys():
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise TypeError(
                f"expected a question as {{'prompt', 'options', 'answer'}}, got {found}; give a mapping with these keys"
            )
        prompt, options, answer = row["prompt"], row["options"], row.get("answer")
        if not isinstance(prompt, str) or isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise TypeError(f"expected a text as prompt and a list of texts as options, got {prompt!r:.40} and {options!r:.60}")
        if answer is not None and (isinstance(answer, bool) or not hasattr(answer, "__index__")):
            raise TypeError(f"expected answer as the place of an option from 0 on, got {answer!r}; use options.index(...)")
        return cls(prompt, tuple(options), None if answer is None else int(answer))


def continuation(prompt: str, option: str, prefix: str) -> tuple[str, str]:
    """The prompt without the blanks at its end, and what follows it: these blanks, else `prefix`, then the option.

    Blanks belong to what follows, since tokenizers put them at the beginning of a word (as in lm-evaluation-harness).

    >>> continuation("Answer:", "yes", " "), continuation("Answer: ", "yes", " "), continuation("Answer:", " yes", " ")
    (('Answer:', ' yes'), ('Answer:', ' yes'), ('Answer:', ' yes'))
    """
    kept = prompt.rstrip()
    blanks = prompt[len(kept) :]
    return kept, (blanks + option.lstrip() if blanks else option if option[:1].isspace() else prefix + option)


def letter(place: int) -> str:
    """A for 0, B for 1 …; 27 for the one after Z."""
    return string.ascii_uppercase[place] if place < 26 else str(place + 1)
