"""What is shipped: the public names, the licence of the data, and what the published examples say."""

from __future__ import annotations

import pytest
from places import ROOT

import hf_ls
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.card import model_card


def test_every_public_name_exists_and_others_are_refused():
    for name in hf_ls.__all__:
        assert getattr(hf_ls, name) is not None
    with pytest.raises(AttributeError, match="smoothed_cross_entropy"):
        _ = hf_ls.smooth_cross_entropy


def test_embedded_data_carries_its_licence():
    assert "Hutto" in (ROOT / "hf_ls/data/embedded/vader_human.LICENSE.txt").read_text()


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in ROOT.glob("model_cards/*/calibration.json")), ids=lambda p: p.name
)
def test_published_cards_are_what_their_reports_say(folder):
    report = CalibrationReport.load(folder / "calibration.json")
    assert (folder / "README.md").read_text() == model_card(report)
    for name in ("loss_curve", "reliability", "confidence"):
        assert (folder / "plots" / f"{name}.png").is_file()


def test_there_is_a_published_card():
    assert list(ROOT.glob("model_cards/*/calibration.json"))
