"""The tables of a report: headings, cells and notes as text, for the console and the card alike.

Nothing is bold: which row is best is a matter of intervals,
and `sentences.verdict` says it in words. rich is imported on use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_ls.common.text import one_line
from hf_ls.report.calibration_report import CLASS_METRICS, CalibrationReport, CalibrationRow
from hf_ls.report.sentences import asking

if TYPE_CHECKING:
    from rich.table import Table

GROUP_HEADINGS = ("tokens", "run", "n", "nll", "ece", "signed gap")
POSTHOC_METRICS = ("accuracy", "nll", "brier", "ece", "aurc")
_SCORES = ("f1_macro", "f1_weighted", "balanced_accuracy", "soft_nll", "soft_brier")
_SCORE_NOTE = (
    "f1 macro: mean F1 of the classes, each counting alike; f1 weighted: by how often a class is the "
    "label; balanced accuracy: mean recall of the classes; 0 to 1, higher is better."
)
_SOFT_NOTE = (
    " soft nll (nats, at least the entropy of the soft labels) and soft brier (0 to 2): against them; lower is better. A "
    "temperature is fitted to the labels, not to these."
)
_MOST_CLASSES = 30
GROUP_NOTE = "A small n makes ece larger: compare it between runs, not between groups."
_CLASS_NOTE = (
    "T: temperature. 95 % intervals in brackets; the one of ece is for the true error and may lie below the "
    "value, which is biased upward. null ece: mean ece of a calibrated model with these confidences and n. "
    "signed gap: mean confidence minus accuracy. nll in nats, brier 0 to 2, aurc 0 to 1: lower is better."
)
_TOKEN_NOTE = (
    "T: temperature. 95 % intervals over sequences in brackets; the one of ece is for the true error and may lie below the "
    "value, which is biased upward. null ece: mean ece of a calibrated model with these confidences and n. "
    "signed gap: mean confidence minus accuracy. accuracy to signed gap: per token; nll in nats, perplexity = exp(nll). "
    "Quality of the task, nll and ece can move apart: read them together."
)


def note(report: CalibrationReport) -> str:
    """How to read the table."""
    return _TOKEN_NOTE if report.is_token_task else _CLASS_NOTE


def cells(report: CalibrationReport) -> list[list[str]]:
    """The headings, then one line of text a row; "–" where a row has no such number.

    Rows of examples have the same columns; rows of tokens those of the metrics which any of them carries. Where no epsilon is
    known there is no column of it.
    """
    metrics = list(CLASS_METRICS)
    if report.is_token_task:
        quality = dict.fromkeys(metric for row in report.rows for metric in row.quality)
        metrics = [*quality, "accuracy", "nll", "perplexity", "ece", "signed_gap"]
        metrics += ["sequence_ece"] if any("sequence_ece" in row.metrics for row in report.rows) else []
    headings = [word for metric in metrics for word in ([metric, "null ece"] if metric == "ece" else [metric])]
    epsilon = ["epsilon"] if any(row.epsilon is not None for row in report.rows) else []
    return [
        ["run", *epsilon, "T", *(one_line(word.replace("_", " ")) for word in headings)],
        *(_row(report, row, headings, with_epsilon=bool(epsilon)) for row in report.rows),
    ]


def group_cells(report: CalibrationReport) -> list[list[str]]:
    """The groups of tokens in each row without temperature, runs of one group together; empty without groups."""
    rows = [row for row in report.rows if not row.tempered and row.groups]
    keys = dict.fromkeys((group["kind"], group["name"]) for row in rows for group in row.groups)
    found = [(key, row, group) for key in keys for row in rows for group in row.groups if (group["kind"], group["name"]) == key]
    return [
        [group_label(*key), one_line(row.name), f"{group['n']:,}", *(_number(group, m) for m in ("nll", "ece", "signed_gap"))]
        for key, row, group in found
    ]


def posthoc_cells(report: CalibrationReport) -> list[list[str]]:
    """The headings, then a line for each post-hoc method which could be fitted, the least NLL first; empty without validation
    data."""
    fitted = {name: row for name, row in report.posthoc.items() if "refused" not in row}
    lines = [
        [
            f"{name} ({one_line(str(row['chosen']))})" if row.get("chosen") else name,
            *(_posthoc_cell(row, m) for m in POSTHOC_METRICS),
            _nll_change(row),
        ]
        for name, row in sorted(fitted.items(), key=lambda item: _rank(item[1]))
    ]
    return [["post-hoc method", *POSTHOC_METRICS, "nll change"], *lines] if lines else []


def posthoc_note(report: CalibrationReport) -> str:
    """How to read the post-hoc methods, and which could not be fitted, and why, a sentence each."""
    refused = {name: one_line(str(row["refused"])) for name, row in report.posthoc.items() if "refused" in row}
    # What came in place of what was expected: the rest of such a sentence is for who calls the method.
    reasons = [f"No {name}: {text.partition(', got ')[2].partition(';')[0] or text}." for name, text in refused.items()]
    infinite = ["∞: a label has probability 0."] if any("∞" in cell for line in posthoc_cells(report) for cell in line) else []
    measured = "Fitted on the validation data alone, measured on the reported examples; the least NLL first."
    if any("nll_change" in row for row in report.posthoc.values()):
        measured += " nll change: against none, below 0 is better; 95 % intervals, paired over the examples, in brackets."
    return " ".join([measured, *infinite, *reasons])


def score_cells(report: CalibrationReport) -> list[list[str]]:
    """The headings, then a line for each row, of the scores by class and against soft labels; empty where there are none."""
    names = [name for name in _SCORES if any(name in row.metrics for row in report.rows)]
    if not names:
        return []
    lines = [[one_line(row.name), *(row.show(name) for name in names)] for row in report.rows]
    return [["run", *(name.replace("_", " ") for name in names)], *lines]


def score_note(report: CalibrationReport) -> str:
    """How to read the scores."""
    shown = any(row.interval(name) for row in report.rows for name in _SCORES)
    start = "95 % intervals in brackets. " if shown else ""
    return start + _SCORE_NOTE + (_SOFT_NOTE if any("soft_nll" in row.metrics for row in report.rows) else "")


def class_cells(report: CalibrationReport) -> list[list[str]]:
    """The headings, then a line for each class of the published row (else the last one): the least frequent classes first."""
    row = report.published_row or report.rows[-1]
    if not row.classes:
        return []
    order = sorted(range(len(row.classes)), key=lambda i: row.classes[i]["n"])

    def number(value: float | None, signed: bool) -> str:
        return "–" if value is None else format(value, "+.3f" if signed else ".3f")

    keys = ("precision", "recall", "f1", "probability", "share", "signed_gap", "ece")
    lines = [
        [
            one_line(report.label_names[i]),
            f"{row.classes[i]['n']:,}",
            *(number(row.classes[i][k], k == "signed_gap") for k in keys),
        ]
        for i in order[:_MOST_CLASSES]
    ]
    return [["class", "n", *(key.replace("_", " ") for key in keys)], *lines]


def class_note(report: CalibrationReport) -> str:
    """How to read the table of classes."""
    row = report.published_row or report.rows[-1]
    more = len(row.classes) - _MOST_CLASSES
    cut = f" The {_MOST_CLASSES} least frequent of {len(row.classes)} classes." if more > 0 else ""
    return (
        f"Row '{one_line(row.name)}'.{cut} n: labels of the class. probability: its mean over all examples; share: how often it "
        "is the label; signed gap: the first less the second, above 0 where the class is given too much probability. ece: of "
        "that probability, all examples. Of few labels every number is uncertain."
    )


def more_cells(report: CalibrationReport) -> list[tuple[str, list[list[str]], str]]:
    """Title, lines and note of each table beneath the first which the report has something for."""
    answered = report.answered
    known = (
        *(
            []
            if answered is None
            else [(f"Answers to {answered.dataset.n:,} questions", cells(answered), _answered_note(answered))]
        ),
        ("Post-hoc methods", posthoc_cells(report), posthoc_note(report)),
        ("Scores by class", score_cells(report), score_note(report)),
        ("Each class", class_cells(report), class_note(report)),
    )
    return [(title, lines, caption) for title, lines, caption in known if lines]


def _answered_note(answered: CalibrationReport) -> str:
    return f"{asking(answered) or ''} {note(answered)}".strip()


def group_label(kind: str, name: str) -> str:
    """A group of tokens in words: "position 2-3"."""
    words = {
        "word": f"words {name}",
        "position": f"position {name}",
        "frequency": f"seen {name} times in training",
        "end_of_sequence": name,
    }
    return one_line(words.get(kind, f"{kind} {name}"))


def table(report: CalibrationReport, width: int | None = None) -> Table:
    """The console table for `width` columns (the terminal's by default), numbers whole from 80 on.

    Intervals stand as "0.123 [0.110, 0.135]" where there is room, else beneath their value; a table which is still too
    wide is turned, one column a row.
    """
    from rich.console import Console
    from rich.text import Text

    place = f"{one_line(report.dataset.name)}, {one_line(report.dataset.split or '')}"
    title = f"Calibration of {one_line(report.model_name)} on {place} ({report.size})"
    room, ruler = width or Console().width, Console(width=10_000)
    for turned, before, within in (
        (False, " [", ", "),
        (False, "\n[", ", "),
        (False, "\n[", ",\n"),
        (True, "\n[", ", "),
        (True, "\n[", ",\n"),
    ):
        head, *lines = cells(report)
        folded = turned or within == ",\n"
        lines = [
            [name.replace(" + ", " +\n") if folded else name, *(c.replace(" [", before).replace(", ", within) for c in rest)]
            for name, *rest in lines
        ]
        if turned:
            head, *lines = (list(column) for column in zip(head, *lines, strict=True))
        else:
            head = [word.replace(" ", "\n") for word in head]
        made = _empty(title, note(report))
        for i, heading in enumerate(head):
            made.add_column(Text(heading), justify="right" if i else "left")
        for line in lines:
            made.add_row(*(Text(cell) for cell in line), end_section=True)
        if ruler.measure(made).maximum <= room:
            break
    return made


def group_table(report: CalibrationReport) -> Table | None:
    """The console table of end of sequence, token frequency and position; None where no row has groups."""
    from rich.text import Text

    lines = group_cells(report)
    if not lines:
        return None
    made = _empty("By group of tokens, without temperature", GROUP_NOTE)
    for i, heading in enumerate(GROUP_HEADINGS):
        made.add_column(Text(heading), justify="right" if i > 1 else "left")
    for before, line, after in zip([None, *lines], lines, [*lines[1:], None], strict=False):
        label = "" if before and before[0] == line[0] else line[0]
        made.add_row(Text(label), *(Text(cell) for cell in line[1:]), end_section=not after or after[0] != line[0])
    return made


def more_tables(report: CalibrationReport) -> list[Table]:
    """The tables for the console beneath the first."""
    from rich.text import Text

    found = []
    for title, lines, caption in more_cells(report):
        made = _empty(title, caption)
        for i, heading in enumerate(lines[0]):
            made.add_column(Text(heading), justify="right" if i else "left")
        for line in lines[1:]:
            made.add_row(*(Text(cell.replace(" [", "\n[")) for cell in line))
        found.append(made)
    groups = group_table(report)
    return found if groups is None else [*found, groups]


def _posthoc_cell(row: Mapping[str, float | str | None], metric: str) -> str:
    """ "–" for what a method does not have, "∞" for what is not finite."""
    value = row.get(metric)
    return f"{value:.3f}" if isinstance(value, int | float) else "∞" if metric in row else "–"


def _rank(row: Mapping[str, float | str | None]) -> tuple[bool, float]:
    """By NLL, an infinite one and what has none behind."""
    value = row.get("nll")
    return (False, float(value)) if isinstance(value, int | float) else ("nll" not in row, math.inf)


def _nll_change(row: Mapping[str, float | str | None]) -> str:
    """What a method changes, with its interval."""
    value, low, high = (row.get(f"nll_change{end}") for end in ("", "_low", "_high"))
    if not (isinstance(value, float) and isinstance(low, float) and isinstance(high, float)):
        return "–"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _empty(title: str, caption: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
        show_edge=False, title_justify="left", caption_justify="left",
    )  # fmt: skip


def _row(report: CalibrationReport, row: CalibrationRow, metrics: list[str], *, with_epsilon: bool) -> list[str]:
    null = row.metrics["ece"].get("null")
    null_ece = "–" if null is None else f"{null:.3f}"
    temperature = f"{row.temperature:.2f}" if row.tempered else "–"
    shown = (null_ece if metric == "null ece" else row.show(metric) for metric in metrics)
    return [one_line(row.name), *([report.epsilon_text(row)] if with_epsilon else []), temperature, *shown]


def _number(group: dict[str, Any], metric: str) -> str:
    value = group[metric]
    return "–" if value is None else format(value, "+.3f" if metric == "signed_gap" else ".3f")
