"""Two gloo processes against one, without logits: DDP through the Trainer, FSDP2 as accelerate shards a model."""

from __future__ import annotations

import pytest
import torch
from head_distributed_worker import DDP, FSDP, first_gradient, trained
from head_models import build
from launching import launch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two_heads") / "results.pt"
    launch(2, path, "head_distributed_worker.py")
    return torch.load(path, weights_only=True)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("name", DDP)
def test_two_ddp_processes_make_the_steps_of_one(two, name):
    one, both = trained(name, 1), two["ddp"][name]
    # The router loss of a mixture of experts is a mean per process, so that only its cross entropy is the same.
    terms = ("nll", "smoothing_term") if name == "mixtral" else ("loss", "nll", "smoothing_term")
    assert {k: both["terms"][0][k] for k in terms} == pytest.approx({k: one["terms"][0][k] for k in terms}, rel=1e-5)
    if name != "mixtral":
        assert both["terms"][1] == pytest.approx(one["terms"][1], rel=1e-5)
        before = build(name)[0].state_dict()
        steps = [
            {key: value - before[key] for key, value in run["weights"].items() if value.is_floating_point()}
            for run in (both, one)
        ]
        assert distance(*steps) < 1e-4


@pytest.mark.parametrize("name", FSDP)
def test_two_fsdp_processes_have_the_gradient_of_one(two, name):
    one = first_gradient(name, build(name)[0], 1, 0)
    both = two["fsdp"][name, False]
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert distance(both["gradients"], one["gradients"]) < 1e-5


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_in_bfloat16_is_as_close_as_the_logits_path(two, name):
    one, dense, ours = first_gradient(name, build(name)[0], 1, 0), two["fsdp"][name, "dense half"], two["fsdp"][name, True]
    assert ours["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert distance(ours["gradients"], one["gradients"]) < 1.2 * distance(dense["gradients"], one["gradients"])
