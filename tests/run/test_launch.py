"""accelerate launch on several CPU processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
from places import ROOT

from hf_ls.run import launch
from hf_ls.run.launch import check_started, end_processes

SINGLE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}  # what accelerate leaves


@pytest.mark.parametrize(
    ("variables", "accepted"),
    [
        (SINGLE, False),
        *[(SINGLE | {rank: "0"}, True) for rank in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")],
        (SINGLE | {"ACCELERATE_USE_CPU": "False"}, True),
        ({"ACCELERATE_USE_CPU": "True"}, True),
        ({"MASTER_ADDR": "10.0.0.1"}, True),  # of a cluster, and no accelerate launch
    ],
)
def test_one_process_of_several_stops_and_names_torchrun(monkeypatch, variables, accepted):
    for name in (*SINGLE, *launch._RANKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if accepted else pytest.raises(ValueError, match=r"torchrun --nproc_per_node N .* --use_cpu true"):
        check_started()


def test_accelerate_launch_on_several_cpu_processes_ends_with_one_sentence():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "scripts/finetune.py"]
    done = subprocess.run([*command, "--dataset_name", "snippets"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          text=True, capture_output=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode != 0
    assert "error: expected all processes which accelerate launch was asked for, got one" in done.stderr
    assert "torchrun --nproc_per_node N scripts/finetune.py" in done.stderr


def test_no_model_outlives_the_process_group(monkeypatch):
    class Wrapped:
        """As a DistributedDataParallel in a Trainer: only the collector frees it."""

    class State:
        def wait_for_everyone(self):
            calls.append("wait")

        def destroy_process_group(self):
            calls.append("destroyed, the model gone" if alive() is None else "destroyed under a living model")

    calls = []
    monkeypatch.setattr(launch, "PartialState", State)
    gc.disable()
    try:
        wrapped = Wrapped()
        wrapped.itself = wrapped
        alive = weakref.ref(wrapped)
        del wrapped
        end_processes()
    finally:
        gc.enable()
    assert calls == ["wait", "destroyed, the model gone"]
