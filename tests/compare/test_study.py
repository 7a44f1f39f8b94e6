"""`scripts/study.py`: its tables are the numbers of the comparison, its commands are accepted, and docs/study.md holds what it prints."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from constructed_sequences import CASES, REPETITIONS, sequence_results
from places import ROOT

from hf_ls.compare.comparison import Variant
from hf_ls.compare.experiment import parse_compare
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


def test_every_cell_is_a_comparison_which_the_parser_accepts(study, tmp_path):
    cells = study.grid([*study.REGIMES])
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        options, config, _ = parse_compare(cell.arguments(tmp_path))
        assert options.grid == [0.0, 0.05, 0.1, 0.2] and config.model.overrides["vocab_size"] == cell.vocabulary >= cell.tokens


def test_the_page_holds_every_line_of_the_tables(study):
    printed = [line for line in study.tables(json.loads(RESULTS.read_text(encoding="utf-8"))) if line]
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").splitlines()
    assert printed
    assert not [line for line in printed if line not in page]
