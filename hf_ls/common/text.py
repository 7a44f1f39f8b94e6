"""Text of users for titles, tables and model cards: on one line, escaped for Markdown, linked where it is an id on the Hub."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# What Markdown would obey: code, emphasis, cells, formulas, headings; lists and definitions at the start;
# links, also bare ones. Other brackets stay, so that an interval [0.1, 0.2] is readable in the source.
_MARKUP = r"[\\`*|~$#]|(?<![^\W_])_|_(?![^\W_])|^[-+=[]|\](?=[(\[:])|:(?=//)|(?<=www)\."


def plain(value: Any, markup: str = _MARKUP) -> str:
    """Escape text for Markdown: one line which reads as itself, also inside a table cell."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(markup, r"\\\g<0>", text, flags=re.IGNORECASE)
    return re.sub(r"^(\d+)(?=[.)](?: |$))", r"\1\\", text)  # no numbered list


def link(name: str, repository: str | None, kind: str = "") -> str:
    """The name, linked if the repository can be an id on the Hub."""
    known = hub_id(repository)
    if known is None:
        return plain(name)
    # Any bracket could end the link early.
    return f"[{plain(name, _MARKUP + '|[][]')}](https://huggingface.co/{kind}{known})"


def in_words(given: Any) -> str:
    """A setting: numbers short, lists and mappings in words."""
    if isinstance(given, float):
        return f"{given:g}"
    if isinstance(given, list):
        return ", ".join(in_words(item) for item in given)
    if isinstance(given, dict):
        return ", ".join(f"{plain(key)} {in_words(item)}" for key, item in given.items())
    return plain(given)


def markdown_table(lines: list[list[str]], texts: int) -> str:
    """A table whose first line are headings and whose first `texts` columns are words."""
    head, *rest = lines
    rule = [":--" if i < texts else "--:" for i in range(len(head))]
    # Names of runs and of task metrics are anybody's; the other cells are numbers.
    shown = ([plain(cell) for cell in head], rule, *([*map(plain, line[:texts]), *line[texts:]] for line in rest))
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def literal(text: str) -> str:
    """A Python string literal on one line."""
    return json.dumps(one_line(text), ensure_ascii=False)


def one_line(text: str) -> str:
    """Text without line breaks, control characters and direction overrides, for titles and metadata."""
    kept = "".join(" " if c.isspace() else c for c in str(text) if c.isprintable() or c.isspace())
    return " ".join(kept.split())


def hub_id(name: str | None) -> str | None:
    """The name if it can be an id on the Hub, rather than a path here."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
