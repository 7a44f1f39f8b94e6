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
from processes_worker import METRICS
from same_training import check_same

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


@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_engine_makes_the_training_and_the_evaluations_of_one_process(results, case):
    """Every loss, the last weights, all metrics before and after; resumed in mid-epoch, where a last batch is not full."""
    engine, i = case
    _, name, options = RUNS[engine][i]
    found = results(engine)[i]
    check_same(found, name, options, TOLERANCE[engine])
    assert found["after"].keys() == set(METRICS)
