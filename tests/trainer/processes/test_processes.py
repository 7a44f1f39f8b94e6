"""DDP, FSDP2 and tensor parallelism on 2 and 4 gloo processes against one process with the same global batch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf
from launching import launch
from processes_worker import FOUR_ONLY, RUNS, trained
from same_training import alone, check_same, relative

SLOW = pytest.mark.slow  # two processes are also in test_trainer_distributed
WORLDS = [pytest.param(2, marks=SLOW), 4]
CASES = [pytest.param((2, i), marks=SLOW) for i in range(len(RUNS))] + [(4, i) for i in range(len(RUNS + FOUR_ONLY))]


def label(case):
    world, i = case
    layout, name, options = (RUNS + FOUR_ONLY)[i]
    return f"{world}-{layout}-{name}-{'-'.join(str(value) for value in options.values())}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def of(world):
        path = tmp_path_factory.mktemp("processes") / f"{world}.pt"
        launch(world, path, "processes_worker.py")
        return torch.load(path, weights_only=True)

    return of


@pytest.mark.parametrize("case", CASES, ids=label)
def test_processes_make_the_training_of_one(results, case):
    """The first loss and gradient, every later loss, the last weights, and the evaluations before and after.

    "llama late": the first batches of some processes hold no label, and still their forwards are made in step."""
    world, i = case
    _, name, options = (RUNS + FOUR_ONLY)[i]
    found = results(world)["runs"][i]
    check_same(found, name, options, 1e-9)
    assert relative(found["gradient"], alone(name)["gradient"]) < 1e-9


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.stock
def test_stock_trainer_trains_on_the_rows_which_fill_the_last_batch(results, world):
    """The first two steps are the same as ours, the third, with 5 rows of 8, is not."""
    stock, one = results(world)["stock"]["ddp"]["records"], trained("bert", trainer_class=tf.Trainer)["records"]
    assert [r["loss"] for r in stock[:2]] == pytest.approx([r["loss"] for r in one[:2]], rel=1e-6)
    if stock[2]["loss"] == pytest.approx(one[2]["loss"], rel=1e-6):
        pytest.skip("this version of accelerate or transformers does not train on repeated rows")
    assert abs(stock[2]["loss"] - one[2]["loss"]) > 1e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.stock
def test_trap_03_stock_fsdp_leaves_weights_untrained_after_an_evaluation(results, world):
    """Evaluating gathers the head, the last norm and the root; the optimizer made then holds weights nothing reads."""
    stock = results(world)["stock"]
    evaluated, fresh = stock["fsdp"]["weights"], stock["fsdp never evaluated"]["weights"]
    moved = {name: relative({name: evaluated[name]}, {name: fresh[name]}) for name in fresh}
    if max(moved.values()) < 1e-9:
        pytest.skip("this version of transformers makes the optimizer of sharded weights")
    assert moved["lm_head.weight"] > 1e-4


@pytest.mark.parametrize("world", WORLDS)
def test_evaluating_before_training_under_accelerate_fsdp_is_refused_clearly(results, world):
    assert "a model and optimizer must be passed together" in results(world)["refused"]
