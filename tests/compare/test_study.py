"""`scripts/study.py`: its tables are the numbers of the comparison, its commands are accepted, and docs/study.md holds what it prints."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from constructed_sequences import CASES, REPETITIONS, sequence_results
from places import ROOT

from hf_ls.compare.comparison import Variant
from hf_ls.compare.statistics import compare

RESULTS = ROOT / "docs" / "study" / "grid.json"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_table_of_a_comparison_holds_its_values_and_its_paired_differences(study):
    comparison = compare(sequence_results(CASES["overfit"], 0), quality="exact_match", repetitions=REPETITIONS)
    lines = list(study.comparison_table(study.summary(comparison)))
    heads = [name.strip() for name in lines[0].strip("|").split("|")]
    rows = {
        cells[0]: dict(zip(heads, cells, strict=True))
        for cells in ([c.strip() for c in ln.strip("|").split("|")] for ln in lines[2:])
    }
    assert list(rows) == [variant.label for variant in comparison.variants]
    plain, tempered = (Variant("baseline", 0.0, at) for at in (False, True))
    pairs = {tempered: plain, Variant("smoothed", 0.1, False): plain, Variant("smoothed", 0.1, True): tempered}
    for variant, rival in pairs.items():
        row = rows[variant.label]
        for metric in ("nll", "ece", "exact_match"):
            assert row[metric].startswith(f"{comparison.measurement(variant, metric).mean:.3f}")
            found = comparison.contrast(variant, rival, metric)
            assert row[f"Δ {metric}"] == f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        fitted = comparison.temperatures[variant.label]
        assert row["T"] == (f"{sum(fitted) / len(fitted):.2f}" if variant.tempered else "–")
    assert {rows["baseline"][head] for head in heads if head.startswith("Δ")} == {"–"}


def test_a_cell_of_the_grid_trains_and_is_compared(study, monkeypatch):
    """A few steps of a small cell, one ε, one seed, and more rows in the head than tokens."""
    monkeypatch.setattr(study, "REGIMES", {"repeated": (32, 12)})
    monkeypatch.setattr(study, "HELD_OUT", {"validation": 8, "test": 6})
    monkeypatch.setattr(study, "EPSILONS", (0.0, 0.1))
    monkeypatch.setattr(study, "SEEDS", (0,))
    record = study.run(study.GridCell("repeated", 16, 512, 600))
    assert record["size"].endswith("tokens in 6 sequences")
    assert list(record["rows"]) == [f"{run}{after}" for run in ("baseline", "smoothed ε=0.1") for after in ("", " + temperature")]
    plain, tempered = record["rows"]["baseline"], record["rows"]["baseline + temperature"]
    assert plain["accuracy"] == tempered["accuracy"] and plain["nll"] != tempered["nll"]
    assert abs(plain["nll"][0] - np.log(600)) < 1.5
    assert len(list(study.effect_table([record]))) == 3


def test_the_page_holds_every_line_of_the_tables(study):
    printed = "\n".join(study.tables(json.loads(RESULTS.read_text(encoding="utf-8")))).split("\n")
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 10
    assert not [line for line in printed if line not in page]
