"""The training of several processes against that of one."""

from __future__ import annotations

from functools import cache

import pytest
from processes_worker import trained


@cache
def alone(name):
    return trained(name, evaluate_first=True)


def relative(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ over all tensors by name."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def check_same(found, name, options, tolerance):
    """Every loss, the last weights, and the metrics before and after are those of one process."""
    one = alone(name)
    assert found["apart"] == 0.0
    assert len(found["records"]) == len(one["records"])
    for here, there in zip(found["records"], one["records"], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=max(tolerance, 1e-6))
        assert here["nll"] == pytest.approx(there["nll"], rel=tolerance)
        assert here["smoothing_term"] == pytest.approx(there["smoothing_term"], abs=tolerance)
    assert relative(found["weights"], one["weights"]) < tolerance
    assert found["after"] == pytest.approx(one["after"], abs=tolerance)
    if options.get("evaluate_first"):
        assert found["before"] == pytest.approx(one["before"], abs=tolerance)
    if options.get("logits_free") == "on":
        assert found["logits_free"]
