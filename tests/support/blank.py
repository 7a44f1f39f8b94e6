"""Runs inside a test draw no plots, half of what a tiny run costs; `tests/report` draws them, and so do fixtures of whole files."""

from __future__ import annotations

import pytest
from PIL import Image

from hf_ls.common.files import write_atomically


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch, tmp_path_factory):
    blank = tmp_path_factory.getbasetemp() / "blank.png"
    Image.new("1", (1, 1)).save(blank)
    for module in ("plots", "pictures"):
        monkeypatch.setattr(f"hf_ls.report.{module}.save_figure", lambda figure, path: write_atomically(path, blank.read_bytes()))
