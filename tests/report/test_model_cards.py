"""The published examples: each card is the one its report makes today, and shows what is beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from places import ROOT

from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.card import model_card
from hf_ls.run.config import parse_config

# The embedded defaults: the folder of the card and the config which made it.
CARDS = {"minilm-snippets": "text-classification.yaml", "bart-g2p": "seq2seq.yaml"}


def test_every_example_belongs_to_an_embedded_default():
    assert {path.name for path in (ROOT / "model_cards").iterdir()} == set(CARDS)


@pytest.mark.parametrize("name", list(CARDS))
def test_the_card_is_what_its_report_makes(name):
    folder = ROOT / "model_cards" / name
    written = (folder / "calibration.json").read_text(encoding="utf-8")
    assert CalibrationReport.from_json(written).to_json() == written
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(CalibrationReport.load(folder / "calibration.json"))


@pytest.mark.parametrize("name", list(CARDS))
def test_the_report_is_of_the_default_run(name):
    """Same settings as the config today, both runs, all steps."""
    report = CalibrationReport.load(ROOT / "model_cards" / name / "calibration.json")
    config = parse_config(["--config", str(ROOT / "configs" / CARDS[name])])
    training = report.training
    assert Path(config.training.output_dir).name == name == report.model_name
    assert [row.name for row in report.rows] == ["baseline", "baseline + temperature", "smoothed", "smoothed + temperature"]
    assert report.smoothing.epsilon == config.training.label_smoothing_factor
    assert training.learning_rate == config.training.learning_rate
    assert training.model_config_overrides == config.model.overrides
    assert training.max_length == config.data.max_length
    if config.training.max_steps > 0:
        assert training.steps == config.training.max_steps
    else:
        assert training.epochs == config.training.num_train_epochs


@pytest.mark.parametrize("name", list(CARDS))
def test_every_picture_is_there_and_the_header_is_valid(name):
    folder = ROOT / "model_cards" / name
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "calibration" in card.data.tags
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
    assert shown and all((folder / path).stat().st_size > 1000 for path in shown)


@pytest.mark.parametrize("name", list(CARDS))
def test_the_results_are_in_the_header_and_the_hubs_own_classes_accept_them(name):
    """`eval_results` is read by huggingface_hub, which checks each result; written back, they are the same model-index."""
    folder = ROOT / "model_cards" / name
    report, data = CalibrationReport.load(folder / "calibration.json"), ModelCard.load(folder / "README.md").data
    row = report.published_row
    found = {result.metric_type: result for result in data.eval_results if "sequences" not in result.metric_name}
    assert found["nll"].metric_value == row.value("nll") and found["brier_score"].metric_value == row.value("brier")
    assert found["expected_calibration_error"].metric_value == row.value("ece")
    assert {(r.dataset_type, r.dataset_split, r.verified) for r in data.eval_results} == {("local", "test", None)}
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
