"""FSDP2 and DeepSpeed ZeRO-1, 2 and 3 on 2 gloo processes against one process with the same global batch.

By hand: `pip install deepspeed`, `pytest -m engines`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
import torch
from engines_worker import RUNS
from launching import launch
from processes_worker import METRICS, trained

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
CASES = [(engine, i) for engine, runs in RUNS.items() for i in range(len(runs))]
TOLERANCE = {"fsdp": 1e-9, "zero": 2e-5}  # of float64 and float32


def label(case):
    layout, name, options = RUNS[case[0]][case[1]]
    return "-".join([layout, name, *options])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def of(engine):
        if engine == "zero" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed: pip install deepspeed")
        path = tmp_path_factory.mktemp("engines") / f"{engine}.pt"
        launch(2, path, "engines_worker.py", engine, timeout=800)
        return torch.load(path, weights_only=True)

    return of


@cache
def alone(name):
    return trained(name, evaluate_first=True)


def relative(found, wanted):
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_engine_makes_the_training_and_the_evaluations_of_one_process(results, case):
    """Every loss, the last weights, all metrics before and after; resumed in mid-epoch, where a last batch is not full."""
    engine, i = case
    _, name, options = RUNS[engine][i]
    found, one, tolerance = results(engine)[i], alone(name), TOLERANCE[engine]
    assert found["apart"] == 0.0
    assert len(found["records"]) == len(one["records"])
    for here, there in zip(found["records"], one["records"], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=max(tolerance, 1e-6))
        assert here["nll"] == pytest.approx(there["nll"], rel=tolerance)
        assert here["smoothing_term"] == pytest.approx(there["smoothing_term"], abs=tolerance)
    assert relative(found["weights"], one["weights"]) < tolerance
    assert found["after"] == pytest.approx(one["after"], abs=tolerance)
    assert found["after"].keys() == set(METRICS)
    if options.get("evaluate_first"):
        assert found["before"] == pytest.approx(one["before"], abs=tolerance)
    if options.get("logits_free") == "on":
        assert found["logits_free"]
