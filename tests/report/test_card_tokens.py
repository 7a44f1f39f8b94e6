"""Facts about the card of a token task: its numbers, its metadata, what it says of generated text."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from card_reading import HOSTILE, ORDER, body, cells, headings, rendered
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from reports import make_report, make_token_report
from transformers import (
    modelcard,
)

from hf_ls.common.text import one_line
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.card import MARKER, model_card, write_card
from hf_ls.report.card_metadata import eval_results
from hf_ls.report.plots import plots_of
from hf_ls.report.sentences import regime
from hf_ls.report.table import GROUP_HEADINGS, group_cells
from hf_ls.report.table import cells as table_cells


def on_the_hub_tokens(task: str = "text2text-generation", **changes: Any) -> CalibrationReport:
    report = make_token_report(task)
    return replace(report, dataset=replace(report.dataset, hub_id="owner/words"), **changes)


@pytest.mark.parametrize("task", ["text2text-generation", "text-generation", "token-classification"])
def test_token_cards_name_their_task_and_keep_the_order(task: str, tmp_path: Path) -> None:
    report = make_token_report(task)
    assert headings(body(report)) == [("h1", "toy-model"), *(("h2", name) for name in ORDER)]
    header = metadata_load(write_card(report, tmp_path))
    assert header is not None and header["pipeline_tag"] == task and header["tags"][-1] == task
    assert task in modelcard.TASK_MAPPING  # what the Trainer itself writes of such a model
    assert regime(report) in body(report) and "381 tokens in 80 sequences" in body(report)


def test_token_tables_hold_the_numbers_of_the_report() -> None:
    report = make_token_report()
    table = cells(body(report))
    wide = table_cells(report)
    assert table[: len(wide)] == wide
    assert table[len(wide)] == list(GROUP_HEADINGS) and table[len(wide) + 1 :] == group_cells(report)
    assert "](plots/groups.png)" in body(report)
    bare = replace(report, rows=[replace(row, groups=[]) for row in report.rows])
    assert "groups.png" not in body(bare) and len(cells(body(bare))) == len(wide)


def test_token_results_survive_huggingface_hub_with_their_types(tmp_path: Path) -> None:
    report = on_the_hub_tokens()
    row = report.published_row
    assert row is not None
    extra = {"bleu": {"value": 41.0, "signature": "nrefs:1|tok:13a"}, "chrf": {"value": 62.5}, "f1": {"value": 0.5}}
    row = replace(row, metrics={**row.metrics, **extra})
    report = replace(report, rows=[row if other.name == row.name else other for other in report.rows])
    found = ModelCard.load(write_card(report, tmp_path)).data.eval_results
    assert found == eval_results(report)
    bins = {"n_bins": 15, "norm": "l1", "binning": "equal_width"}
    assert [(r.metric_type, r.metric_value, r.metric_args) for r in found] == [
        ("per", row.value("phoneme_error_rate"), None),
        ("exact_match", row.value("exact_match"), None),
        ("bleu", 41.0, {"signature": "nrefs:1|tok:13a"}),
        ("chrf", 62.5, None),
        ("f1", 0.5, None),
        ("accuracy", row.value("accuracy"), None),
        ("nll", row.value("nll"), None),
        ("perplexity", row.value("perplexity"), None),
        ("brier_score", row.value("brier"), None),
        ("expected_calibration_error", row.value("ece"), bins | {"level": "token"}),
        ("expected_calibration_error", 0.05, bins | {"level": "sequence"}),
    ]
    assert {r.task_type for r in found} == {"text2text-generation"}
    text = body(report)
    assert (
        "bleu: sacrebleu signature nrefs:1\\|tok:13a." in text
        and "chrf: sacrebleu score, whose signature was not recorded" in text
    )
    assert all(type(r.metric_value) is float and r.verified is None for r in found)


def test_teacher_forcing_is_stated_where_text_is_generated() -> None:
    sentence = "it says nothing about the confidence of free-running generation"
    spelled = body(make_token_report())
    assert sentence in spelled and "The sequence ECE, 0.050, is about that" in spelled
    language = body(make_token_report("text-generation"))
    assert sentence in language and "That was not measured." in language
    assert sentence not in body(make_token_report("token-classification"))


def test_temperature_of_a_generator_is_applied_by_the_user_and_not_baked() -> None:
    plain = body(make_token_report())
    assert "divide the logits by T = 0.6 before the softmax; greedy search writes the same text" in plain
    assert "T is not in the weights: it must be applied at generation time" in plain
    assert "greedy and beam search ignore the temperature of the GenerationConfig" in plain
    tagger = body(make_token_report("token-classification"))
    assert "accuracy stays the same." in tagger and "generation time" not in tagger
    baked = body(make_token_report("token-classification", published="smoothed + temperature"))
    assert "is already in the weights of the classifier" in baked


def test_limitations_of_tokens() -> None:
    def limits(task: str, **changes: Any) -> str:
        return body(make_token_report(task, **changes)).split("## Limitations")[1].split("## Versions")[0]

    for task in ("text2text-generation", "text-generation", "token-classification"):
        assert "resample whole sequences" in limits(task) and "choice of test sequences" in limits(task)
        assert ("only between models with the same tokenizer" in limits(task)) == (task != "token-classification")
    assert "end of sequence" in limits("text-generation")
    assert "end of sequence" not in limits("text-generation", published="baseline")
    assert "resample whole sequences" not in body(make_report())


def test_a_vocabulary_has_no_class_names_or_counts() -> None:
    text = body(make_token_report(base_model=None))
    assert "A sequence-to-sequence model, trained from scratch with label smoothing" in text
    assert "labels (" not in text and "- base model: none, trained from scratch" in text
    assert "- test, which the table is measured on: 381 tokens in 80 sequences\n" in text
    assert "all tokens of the vocabulary, the label's own included" in text
    tagger = body(make_token_report("token-classification"))
    assert "with 9 labels (class 0, class 1" in tagger and "(class 0 381, class 1 0" in tagger
    facts = replace(make_token_report().smoothing, convention="wrong")
    assert "goes to the other tokens only\n" in body(make_token_report(smoothing=facts))


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_names_in_a_token_report_are_shown_and_not_obeyed(hostile: str) -> None:
    plain = on_the_hub_tokens()
    quality = one_line(hostile) or "x"
    rows = [
        replace(
            row,
            run=f"{hostile}{i}",
            metrics={**row.metrics, quality: {"value": 0.5}},
            groups=[group | {"name": hostile, "kind": hostile} for group in row.groups[:1]],
        )
        for i, row in enumerate(plain.rows)
    ]
    facts = {"name": hostile, "licence": hostile, "example": hostile}
    report = replace(
        plain, rows=rows, history={}, published=rows[2].name, model_name=hostile, dataset=replace(plain.dataset, **facts)
    )
    card = ModelCard(model_card(report))
    assert card.data.eval_results == eval_results(report)
    shown = headings(card.text)
    assert [tag for tag, _ in shown] == ["h1", *["h2"] * len(ORDER)] and [t for _, t in shown][1:] == ORDER
    wide = table_cells(report)
    table = cells(card.text)
    assert [len(line) for line in table] == [len(wide[0])] * len(wide) + [len(GROUP_HEADINGS)] * 3
    assert table == [*wide, list(GROUP_HEADINGS), *group_cells(report)]
    tokens = rendered(card.text)
    inline = [child for token in tokens for child in token.children or []]
    assert [t.content.strip() for t in tokens if t.type == "html_block"] == [MARKER]
    assert not [child for child in inline if child.type in ("html_inline", "strong_open", "s_open", "em_open")]
    assert [child.attrs["src"] for child in inline if child.type == "image"] == [
        f"plots/{plot.file}" for plot in plots_of(report)
    ]
    (fence,) = (token for token in tokens if token.type == "fence")
    tree = ast.parse(fence.content)
    assert one_line(hostile) in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
