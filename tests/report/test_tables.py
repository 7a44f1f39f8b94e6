"""Facts about the tables: every number whole, names as they are, the columns which the rows carry."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from reports import make_report, make_token_report, with_metrics
from rich.console import Console
from rich.table import Table

from hf_ls.report.calibration_report import CLASS_METRICS, CalibrationReport
from hf_ls.report.table import GROUP_HEADINGS, cells, group_cells, group_table, table


def _printed(report: CalibrationReport, width: int) -> str:
    return _shown(table(report, width), width)


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_table_shows_every_number_whole(width: int) -> None:
    report = make_report()
    text = _printed(report, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    words = text.split()
    for row in report.rows:
        for metric in CLASS_METRICS:
            assert all(part in words for part in row.show(metric).split()), (row.name, metric)
        assert f"{row.metrics['ece']['null']:.3f}" in words


def test_wide_table_keeps_value_and_interval_together() -> None:
    report = make_report()
    text = _printed(report, 200)
    assert all(row.show(metric) in text for row in report.rows for metric in CLASS_METRICS)


def test_table_shows_names_as_they_are_and_gaps_as_a_dash() -> None:
    report = make_report()
    row = with_metrics(replace(report.rows[0], run="[red]x[/red]\n[bold"), aurc={"value": math.nan})
    text = _printed(replace(report, rows=[row], history={}, published=None), 200)
    assert "[red]x[/red] [bold" in text
    assert row.show("aurc") == "–"


def _shown(made: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(made)
    return console.export_text()


def test_columns_follow_the_task_and_what_the_rows_carry() -> None:
    start, end = ["run", "epsilon", "T"], ["accuracy", "nll", "perplexity", "ece", "null ece", "signed gap"]
    classes = ["accuracy", "nll", "brier", "ece", "null ece", "signed gap", "aurc"]
    assert cells(make_report())[0] == start + classes
    assert cells(make_token_report("token-classification"))[0] == start + end
    assert cells(make_token_report())[0] == [*start, "phoneme error rate", "exact match", *end, "sequence ece"]
    report = make_token_report()
    last = with_metrics(report.rows[-1], bleu={"value": 40.0})
    head, *lines = cells(replace(report, rows=[*report.rows[:-1], last]))
    assert [line[head.index("bleu")] for line in lines] == ["–", "–", "–", "40.00"]
    assert [line[head.index("sequence ece")] for line in lines] == ["0.050", "–", "0.050", "–"]


@pytest.mark.parametrize("width", [80, 100, 140, 240])
def test_table_of_tokens_shows_every_number_whole(width: int) -> None:
    report = make_token_report()
    text = _shown(table(report, width), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    words = text.split()
    for line in cells(report)[1:]:
        for cell in line[1:]:
            assert all(part in words for part in cell.split()), (line[0], cell)
    assert "move apart" in " ".join(words)


def test_narrow_table_of_tokens_is_turned_with_one_column_a_run() -> None:
    report = make_token_report()
    lines = [line.split() for line in _shown(table(report, 80), 80).splitlines()]
    head, *rows = cells(report)
    epsilon = next(line for line in lines if line[:1] == ["epsilon"])
    assert epsilon[1:] == [row[head.index("epsilon")] for row in rows]


def test_groups_stand_beside_each_other_by_run() -> None:
    report = make_token_report()
    lines = group_cells(report)
    assert [line[1] for line in lines] == ["baseline", "smoothed"] * (len(lines) // 2)  # no row with temperature
    assert [line[0] for line in lines[::2]] == [line[0] for line in lines[1::2]]
    named = {(line[0], line[1]): line[2:] for line in lines}
    for row in (report.rows[0], report.rows[2]):
        for group in row.groups:
            label = {"end_of_sequence": "{}", "frequency": "seen {} times in training", "position": "position {}"}[group["kind"]]
            cell = named[label.format(group["name"]), row.name]
            assert cell == [f"{group['n']:,}", f"{group['nll']:.3f}", f"{group['ece']:.3f}", f"{group['signed_gap']:+.3f}"]
    made = group_table(report)
    assert made is not None
    text = _shown(made, 80)
    assert "…" not in text and text.count("position 2-3") == 1 and text.split().count("baseline") == len(lines) // 2
    assert all(part in text.split() for heading in GROUP_HEADINGS for part in heading.split())


def test_no_groups_no_table() -> None:
    assert group_table(make_report()) is None and group_cells(make_report()) == []
    report = make_token_report()
    undefined = replace(report.rows[0], groups=[report.rows[0].groups[0] | {"nll": math.inf}])
    assert group_cells(replace(report, rows=[undefined], history={}, published=None))[0][3] == "–"


def test_group_and_run_names_are_shown_as_they_are() -> None:
    report = make_token_report()
    group = report.rows[0].groups[0] | {"kind": "[red]", "name": "x[/red]\n"}
    row = replace(report.rows[0], run="[bold]y", groups=[group])
    report = replace(report, rows=[row], history={}, published=None)
    made = group_table(report)
    assert made is not None and "[red] x[/red]" in _shown(made, 80) and "[bold]y" in _shown(made, 80)
    turned = replace(report, rows=[replace(row, run=f"[bold]{i}") for i in range(4)])
    assert "[bold]0" in _shown(table(turned, 70), 70)
