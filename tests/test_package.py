"""The house itself: what imports what, what is shipped, what the published examples say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_ls
from hf_ls.card import model_card
from hf_ls.report import CalibrationReport

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "evaluate", "trl", "peft", "rich", "relplot")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    assert not modules_after("import hf_ls") & set(HEAVY)


def test_losses_need_only_torch():
    loaded = modules_after("from hf_ls import Smoothing, smoothed_cross_entropy")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "matplotlib", "evaluate", "peft"}


def test_every_public_name_exists_and_others_are_refused():
    for name in hf_ls.__all__:
        assert getattr(hf_ls, name) is not None
    with pytest.raises(AttributeError, match="smoothed_cross_entropy"):
        _ = hf_ls.smooth_cross_entropy


def test_no_file_is_too_long_and_each_says_what_it_owns():
    for path in [*ROOT.glob("hf_ls/*.py"), *ROOT.glob("hf_ls/metrics/*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        assert "own" in text.split('"""')[1].lower(), path


def test_embedded_data_carries_its_licence():
    assert "Hutto" in (ROOT / "hf_ls/embedded/vader_human.LICENSE.txt").read_text()


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
