"""summarise: every metric once, plain floats, intervals only where they are sound."""

import importlib.util
import json

import numpy as np
import pytest

from hf_ls.metrics import (
    PredictionStatistics,
    aurc,
    e_aurc,
    ece,
    ece_classwise,
    ece_equal_mass,
    mce,
    null_ece,
    rmsce_debiased,
    signed_gap,
    smooth_ece,
    softmax,
    summarise,
    wilson_interval,
)

WITHOUT_INTERVAL = {"mce", "e_aurc"}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(600, 4)) * 3
    labels = np.where(rng.random(600) < 0.5, logits.argmax(1), rng.integers(0, 4, 600))
    return logits, labels


def test_values_are_those_of_the_functions(data):
    stats = PredictionStatistics.from_logits(*data)
    pair = (stats.confidence, stats.correct)
    expected = {
        "accuracy": stats.correct.mean(),
        "nll": stats.nll.mean(),
        "brier": stats.brier.mean(),
        "ece": ece(*pair),
        "ece_equal_mass": ece_equal_mass(*pair),
        "ece_classwise": ece_classwise(softmax(data[0]), data[1]),
        "mce": mce(*pair),
        "rmsce_debiased": rmsce_debiased(*pair),
        "signed_gap": signed_gap(*pair),
        "aurc": aurc(*pair),
        "e_aurc": e_aurc(*pair),
        "smooth_ece": smooth_ece(*pair),
    }
    assert {name: row["value"] for name, row in summarise(*data, repetitions=20).items()} == expected


def test_intervals_hold_the_value_and_only_sound_ones_exist(data):
    table = summarise(*data, repetitions=200)
    for name, row in table.items():
        assert ("low" in row) == ("high" in row) == (name not in WITHOUT_INTERVAL)
        if "low" in row:
            assert row["low"] < row["value"] < row["high"]
    stats = PredictionStatistics.from_logits(*data)
    assert (table["accuracy"]["low"], table["accuracy"]["high"]) == wilson_interval(stats.correct.sum(), 600)
    assert (table["ece"]["null"], table["ece"]["null_q95"]) == null_ece(stats.confidence, repetitions=200)


def test_all_numbers_are_finite_python_floats(data):
    table = summarise(*data, repetitions=20)
    assert {type(number) for row in table.values() for number in row.values()} == {float}
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_smooth_ece_is_left_out_where_relplot_is_not_installed(data, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "relplot" else find_spec(name))
    table = summarise(*data, repetitions=20)
    assert "smooth_ece" not in table and "aurc" in table


def test_ignored_labels_are_refused(data):
    with pytest.raises(ValueError, match="ignore_index"):
        summarise(data[0], np.where(np.arange(600) == 3, -100, data[1]))
