"""The notebook in docs/: every cell runs, offline, with the embedded model, and shows what its text speaks of."""

from __future__ import annotations

import json
import os

import pytest
from places import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_the_notebook_runs_and_shows_table_card_and_temperature(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "docs" / "own_data.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [json.dumps(cell.outputs, ensure_ascii=False) for cell in notebook.cells if cell.cell_type == "code"]
    table, _, card, probabilities = shown[2:]
    assert all(name in table for name in ("baseline + temperature", "smoothed + temperature", "signed_gap"))
    assert "label-smoothing" in card and "with label smoothing (epsilon = 0.1)" in card and "image/png" in card
    assert probabilities.count("positive") + probabilities.count("neutral") + probabilities.count("negative") == 4
