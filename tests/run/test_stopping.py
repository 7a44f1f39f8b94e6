"""A run which ends early leaves a checkpoint to resume from, and no result."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import psutil
import pytest
from forked import Forked, run_file
from places import ROOT
from tiny_run import ALL, arguments, started, torchrun
from transformers import TrainerCallback

from hf_ls.run.checkpoint import MARK, last_complete_checkpoint
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.outcome import OUTCOME
from hf_ls.run.stopping import Stopped

SHORT = [*ALL, "--max_steps", "9", "--label_smoothing_factor", "0.1", "--save_strategy", "no", "--snippet_sources", "tweets",
         "--max_train_samples", "96", "--max_eval_samples", "40", "--max_predict_samples", "40"]  # fmt: skip
RESUME = ["--resume_from_checkpoint", "last"]


class AtStep(TrainerCallback):
    """Does something once, after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.act is not None:
            act, self.act = self.act, None
            act(control)


def no_result(folder):
    return not [name for name in (OUTCOME, "calibration.json", "README.md", "train_results.json") if (folder / name).exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_costs_no_step(tiny, tmp_path, number):
    """In the baseline of a run which saves nothing on the way, with the Trainer's own way to stop switched on."""
    argv = [*SHORT, "--with_baseline", "--enable_jit_checkpoint", "true"]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    finetune(parse_config(arguments(tiny, whole, *argv)))
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step [56] of 9") as stopped:
        finetune(parse_config(arguments(tiny, folder, *argv)), [AtStep(4, lambda control: os.kill(os.getpid(), number))])
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert no_result(folder) and no_result(folder / "baseline")
    assert last_complete_checkpoint(folder / "baseline") and not last_complete_checkpoint(folder)
    finetune(parse_config(arguments(tiny, folder, *argv, *RESUME)))
    for name in ("baseline/model.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((folder / "baseline" / "trainer_state.json").read_text())["global_step"] == 9


def test_an_end_without_a_reason_is_no_result(tiny, tmp_path):
    def stop(control):
        control.should_training_stop = True

    with pytest.raises(ValueError, match="expected all planned steps or early stopping, got an end after step 3 of 9"):
        finetune(parse_config(arguments(tiny, tmp_path, *SHORT)), [AtStep(3, stop)])
    assert no_result(tmp_path)


def test_early_stopping_counts_on_after_a_resume(tiny, tmp_path):
    """Resumed at the step where it had stopped, and between two of the evaluations which it counts: the same last step."""
    stop = ["--early_stopping_patience", "2", "--load_best_model_at_end", "--metric_for_best_model", "nll", "--learning_rate", "0.3",
            "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "60"]  # fmt: skip
    argv = arguments(tiny, tmp_path, *SHORT, *stop)
    finetune(parse_config(argv))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == state["best_global_step"] + 2 < 60
    model = (tmp_path / "model.safetensors").read_bytes()
    for back in (0, 1):
        (tmp_path / OUTCOME).unlink()
        if back:
            (tmp_path / f"checkpoint-{state['global_step']}" / MARK).unlink()
        finetune(parse_config([*argv, *RESUME]))
        assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == state["global_step"]
        assert (tmp_path / "model.safetensors").read_bytes() == model


def script_and_then(argv, number):
    run_file(str(ROOT / "scripts" / "finetune.py"), argv)
    os.kill(os.getpid(), number)
    time.sleep(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_finished_script_exits_is_no_traceback(tiny, tmp_path, number):
    process = Forked(script_and_then, arguments(tiny, tmp_path / "out", *ALL, "--dry_run"), number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -number and "settings are sound" in output, output
    assert "Traceback" not in output, output


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_the_script_ends_with_a_sentence_and_a_checkpoint(tiny, tmp_path, number, processes):
    argv = arguments(tiny, tmp_path / "out", *ALL, "--max_steps", "100000", "--save_steps", "5", "--save_total_limit", "1")
    process = torchrun(argv, processes) if processes > 1 else started(argv)[0]
    deadline = time.monotonic() + 250
    while not last_complete_checkpoint(tmp_path / "out") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (128 + number if processes == 1 else 1), output
    said = re.findall(
        rf"^stopped by {number.name} after step ([\d,]+) of 100,000: go on with .*--resume_from_checkpoint last$", output, re.M
    )
    assert len(said) == 1, output
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / f"checkpoint-{said[0].replace(',', '')}")
    assert no_result(tmp_path / "out")
    assert processes > 1 or "Traceback" not in output
    assert not psutil.wait_procs(family, 30)[1]
