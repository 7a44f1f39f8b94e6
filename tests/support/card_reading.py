"""Reading a card back: its headings, table cells and rendered Markdown, and names which try to break it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from reports import make_report

from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.card import MARKER, model_card

ORDER = ["Evaluation", "How to use", "Label smoothing", "Training", "Limitations", "Versions"]
HOSTILE = {
    "newline": "a\nb",
    "yaml document": "x\n---\nlicense: mit\n---\n# Owned",
    "carriage returns": "x\r---\rlicense: mit",
    "yaml tag": "!!python/object/apply:os.system ['true']",
    "yaml anchors": "&a *a : - [x, {y: z}] # c",
    "html": "<script>alert(1)</script><!-- ",
    "end of comment": "--> <img src=x onerror=alert(1)>",
    "pipes": "a | b || c \\| d",
    "backticks": "`code` ```python\nimport os\n```",
    "markdown": "**bold** _it_ ~~no~~ # h ![i](http://x.test/y.png) [l](http://x.test) [a]: http://x.test",
    "links": "http://x.test www.x.test https://x.test",
    "template": "{{ 7 * 7 }} {% for x in y %} {# c #}",
    "quotes": '""" \' " \\',
    "separators": "a\u2028b\u0085c\x0bd\x00e\u202ef",
    "surrogate": "a\ud800b",
    "heading": "# one\n## two\n\nText\n===",
    "closing heading": "C #",
    "list": "- one",
    "plus": "+ one",
    "number": "12. one",
    "number in brackets": "3) one",
    "definition": "[a]: http://x.test",
    "task": "[ ] do it",
    "brackets": "a]b [c](d) ] \\] [",
    "formula": "$$x$$ \\(y\\)",
    "marker": MARKER,
}


def on_the_hub(**changes: Any) -> CalibrationReport:
    dataset = replace(make_report(rows=1).dataset, hub_id="owner/snippets", config="default", revision="1e5")
    return make_report(dataset=dataset, **changes)


def body(report: CalibrationReport) -> str:
    return ModelCard(model_card(report)).text


def rendered(markdown: str) -> list[Any]:
    return MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"]).parse(markdown)


def headings(markdown: str) -> list[tuple[str, str]]:
    tokens = rendered(markdown)
    return [
        (token.tag, "".join(child.content for child in tokens[i + 1].children))
        for i, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def cells(markdown: str) -> list[list[str]]:
    tokens = rendered(markdown)
    lines: list[list[str]] = []
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            lines.append([])
        if token.type in ("td_open", "th_open"):
            lines[-1].append("".join(child.content for child in tokens[i + 1].children))
    return lines
