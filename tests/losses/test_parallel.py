"""A head divided among 2 and 4 gloo processes has the loss and the gradients of the whole head."""

from __future__ import annotations

import pytest
import torch
from launching import launch
from linear_reference import problem, terms_of
from parallel_worker import CASES, made, upstream

from hf_ls import linear_smoothed_cross_entropy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "results.pt"
    launch(4, path, "parallel_worker.py")
    return torch.load(path, weights_only=True)


def expected(case):
    inputs, smoothing, options = made(case)
    found = terms_of(**inputs, smoothing=smoothing, **options)
    found.loss.backward(upstream(found.loss))
    gradients = {k: v.grad for k, v in inputs.items() if k != "labels"}
    return {"loss": found.loss.detach(), "nll": found.nll, "smoothing_term": found.smoothing_term}, gradients


def assert_close(found, wanted, dtype):
    scale = max(1.0, float(wanted.abs().nan_to_num(0, 0, 0).max()) if wanted.numel() else 1.0)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_divided_head_has_the_loss_and_the_gradients_of_the_whole_head(results, case, world):
    found = results[case, world]
    terms, gradients = expected(case)
    dtype = made(case)[0]["hidden"].dtype
    for name, wanted in terms.items():
        every = [one[name] for one in found["terms"]]
        assert all(torch.equal(one, every[0]) for one in every), "the processes disagree"
        assert_close(every[0], wanted, dtype)
    for name, wanted in gradients.items():
        every = found[name] if name == "hidden" else [found[name]]
        for gradient in every:
            if wanted is None:
                assert gradient is None
            else:
                assert gradient.dtype == wanted.dtype
                assert_close(gradient, wanted, dtype)


def test_a_dtensor_head_is_the_same_and_gets_dtensor_gradients(results):
    terms, gradients = expected("explicit all")
    assert_close(results["dtensor"]["loss"], terms["loss"], torch.float64)
    for name, wanted in gradients.items():
        assert_close(results["dtensor"][name], wanted, torch.float64)
    weight, replicated, bias, hidden = results["dtensor"]["refused"]
    assert "Shard(dim=1)" in weight and "Replicate" in replicated
    assert "expected the bias as Shard(0)" in bias and "expected hidden as a plain tensor" in hidden


def test_megatron_loss_differs_between_processes_and_its_target_has_too_much_mass(results):
    """Its smoothing takes the mean over its own part of the vocabulary, ours over all of it."""
    losses, sums = results["megatron"]["losses"], results["megatron"]["gradient"].sum(1)
    assert float(losses.max() - losses.min()) > 1e-2
    # The target should sum to 1, the gradient so to 0. Theirs keeps 1 − s on the label and gives s to each of four shards.
    lowest, highest = (0.1 * size / (size - 1) for size in (8, 7))
    assert bool((sums <= -3 * lowest + 1e-9).all()) and bool((sums >= -4 * highest).all())
    assert abs(float(expected("uniform wrong")[1]["bias"].sum())) < 1e-12


@pytest.mark.parametrize("name", ["objective", "observer"])
def test_what_needs_all_logits_of_a_row_is_refused(results, name):
    assert results["needs all logits"][name].startswith(f"expected no {name} with a divided head, got <function")


def test_a_plain_head_without_a_group_is_one_process(results):
    """Inside a process group too: only `group` or a DTensor divides the vocabulary."""
    assert_close(results["alone"], linear_smoothed_cross_entropy(**problem(), smoothing=0.1).detach(), torch.float64)
