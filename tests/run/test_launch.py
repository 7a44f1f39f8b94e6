"""accelerate launch on several CPU processes."""

from __future__ import annotations

import gc
import weakref

import pytest

from hf_ls.run import launch
from hf_ls.run.launch import end_processes, requested_processes, start_missing_processes


@pytest.mark.parametrize(
    "launcher",
    [["python", "/env/bin/accelerate", "launch"], ["accelerate-launch"], ["python", "-m", "accelerate.commands.launch"]],
)
@pytest.mark.parametrize("flag", [["--num_processes", "3"], ["--num_processes=3"], ["--num-processes", "3"]])
def test_number_of_processes_is_read_from_the_launch_command(launcher, flag):
    assert requested_processes([*launcher, "--cpu", *flag, "train.py", "--num_processes", "7"]) == 3


def test_number_of_processes_is_read_from_the_config_file(tmp_path):
    (tmp_path / "a.yaml").write_text("num_processes: 4\n")
    assert requested_processes(["accelerate", "launch", "--config_file", str(tmp_path / "a.yaml"), "train.py"]) == 4


def test_other_commands_ask_for_nothing():
    assert requested_processes(["bash", "-c", "python train.py"]) is None
    assert requested_processes(["accelerate", "launch", "--cpu", "train.py"]) is None


def test_several_machines_are_refused():
    with pytest.raises(ValueError, match="torchrun"):
        requested_processes(["accelerate", "launch", "--num_machines", "2", "--num_processes", "4", "train.py"])


def test_a_process_with_a_rank_is_left_alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("RANK", "0")
    start_missing_processes()


def test_an_unknown_parent_is_an_error(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        start_missing_processes()


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
