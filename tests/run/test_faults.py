"""Killed at any moment, a run resumes to the same bits; a rank which dies ends the run and is named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from faults import Fault, with_fault
from huggingface_hub import ModelCard
from launching import launch
from places import ROOT
from safetensors.torch import load_file
from tiny_run import ALL, arguments, script, torchrun
from transformers.trainer_pt_utils import safe_globals

from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.run.checkpoint import MARK, last_complete_checkpoint
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.manifest import Manifest
from hf_ls.run.outcome import OUTCOME

# Everything which changes files at once: two runs, evaluation between steps, the best checkpoint, deletion, a baked temperature.
RUN = [
    *(*ALL, "--label_smoothing_factor", "0.1", "--with_baseline", "--bake_temperature", "--save_strategy", "steps"),
    *("--eval_strategy", "steps", "--load_best_model_at_end", "--metric_for_best_model", "nll", "--save_total_limit", "1"),
]
SHORT = [
    *("--max_steps", "9", "--save_steps", "3", "--eval_steps", "3", "--snippet_sources", "amazonReviewSnippets"),
    *("--max_train_samples", "96", "--max_eval_samples", "60", "--max_predict_samples", "70"),
]
RESUME = ["--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The undisturbed run, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT, "--save_total_limit", "9"), folder, None)
    assert code == 0, output
    return folder


def check_whole_files(folder):
    """Each file which a reader or a resumed run may open is whole or absent; a checkpoint counts only with its mark."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        checkpoint = next(
            (folder.joinpath(*inside[: i + 1]) for i, part in enumerate(inside) if part.startswith("checkpoint-")), None
        )
        if path.name.startswith(".") or any(part.startswith("_unfinished") for part in inside):
            continue
        if path.is_file() and (checkpoint is None or (checkpoint / MARK).is_file()):
            check_file(path)


def check_file(path):
    if path.name == "calibration.json":
        CalibrationReport.load(path)
    elif path.name == "README.md":
        assert ModelCard.load(path).data.library_name == "transformers"
        assert path.read_text().endswith("\n")
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        assert load_file(path)
    elif path.suffix in (".pt", ".pth"):
        with safe_globals():
            assert torch.load(path, weights_only=True)
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            assert all(arrays[name].size for name in arrays)
    elif path.suffix == ".png":
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def check_same_checkpoint(folder, whole):
    """The checkpoint which a resumed run would choose is bit by bit that of the undisturbed run."""
    chosen = last_complete_checkpoint(folder)
    if chosen is None:
        return None
    found, expected = Path(chosen), whole / Path(chosen).name
    assert {path.name for path in expected.iterdir()} <= {path.name for path in found.iterdir()}
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), found / name
    return int(found.name.removeprefix("checkpoint-"))


def history(report):
    """The records of training and of evaluation between steps, without times."""
    wanted = {name: [r for r in records if "loss" in r or "eval_nll" in r] for name, records in report.history.items()}
    return {
        name: [{k: v for k, v in r.items() if not k.endswith(("_runtime", "_per_second"))} for r in records]
        for name, records in wanted.items()
    }


def check_same_result(folder, whole):
    for name in ("model.safetensors", "config.json", "baseline/model.safetensors", "baseline/config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (CalibrationReport.load(f / "calibration.json") for f in (folder, whole))
    assert found.rows == expected.rows
    assert found.published == expected.published == "smoothed + temperature"
    assert history(found) == history(expected)
    check_whole_files(folder)
    names = {str(p.relative_to(whole)) for p in whole.rglob("*") if "checkpoint-" not in str(p)}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoint-" not in str(p)} == names  # no leftovers


def test_a_run_killed_again_and_again_ends_with_the_same_bits(tiny, tmp_path, whole):
    """Each time it goes on from the right checkpoint: the steps of the baseline's and of the main run's are in the table."""
    folder, resume = tmp_path / "killed", []
    for fault, baseline, main in (
        (Fault("saved", "baseline/checkpoint-3/optimizer.pt", torn=True), None, None),  # half an optimizer
        (Fault("predict", "baseline/predict", 2), 3, None),  # in the evaluation of step 6
        (Fault("remove", "baseline/checkpoint-3/optimizer.pt"), 6, None),  # an old checkpoint half deleted
        (Fault("rename", f"baseline/checkpoint-9/{MARK}"), 6, None),  # all its files written, but no mark
        (Fault("open", "baseline/*all_results.json*", torn=True), 9, None),  # which a resumed run reads
        (Fault("step", "step", 5), 9, 3),  # between two checkpoints, the baseline complete
        (Fault("rename", "model.safetensors"), 9, 9),  # the new config is there, the weights are not
        (Fault("rename", "config.json", 2), 9, 9),  # weights divided by T, and the config does not say so
        (Fault("rename", "calibration.json"), 9, 9),
    ):
        code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT, *resume), folder, fault)
        assert code == -signal.SIGKILL, f"{fault}: {output}"
        check_whole_files(folder)
        steps = [check_same_checkpoint(folder / name, whole / name) for name in ("baseline", ".")]
        assert steps == [baseline, main], fault
        assert not (folder / "README.md").exists(), fault
        resume = RESUME
    code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT, *resume), folder, None)
    assert code == 0, output
    check_same_result(folder, whole)


def test_a_run_killed_while_it_was_deleted_is_not_resumed(tiny, tmp_path, whole):
    """Marks of complete checkpoints may outlive their files, and settings of another run would go unnoticed."""
    folder = tmp_path / "old"
    shutil.copytree(whole, folder)
    argv = arguments(tiny, folder, *RUN, *SHORT)
    code, output = with_fault([*argv, "--overwrite_output_dir"], folder, Fault("remove", "checkpoint-9/*"))
    assert code == -signal.SIGKILL, output
    with pytest.raises(
        ValueError,
        match=r"expected settings.json beside .*old/README.md, got none: that run was being deleted.*--overwrite_output_dir",
    ):
        finetune(parse_config([*argv, *RESUME]))
    assert (folder / "checkpoint-9").exists() and not (folder / "settings.json").exists()
    assert not Manifest(folder).foreign()  # what is left is still known as the run's: the next start deletes it


@pytest.fixture(scope="module")
def events(tiny, tmp_path_factory, whole):
    """How many changes of files, steps and evaluations an undisturbed run has."""
    folder = tmp_path_factory.mktemp("run") / "counted"
    code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT), folder, None)
    assert code == 0, output
    check_same_result(folder, whole)
    return len(folder.with_suffix(".events").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_a_random_change_of_a_file(tiny, tmp_path, whole, events, moment):
    """At one of all the files which a run opens, renames or deletes, at a step or at an evaluation."""
    n = random.Random(moment).randrange(events) + 1
    folder = tmp_path / "killed"
    code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT), folder, Fault("*", "*", n, torn=moment % 2 == 1))
    assert code == -signal.SIGKILL, output
    print(f"MOMENT {n} of {events}, {output.splitlines()[-1]}; {phase(folder)}")
    check_whole_files(folder)
    for name in ("baseline", "."):
        check_same_checkpoint(folder / name, whole / name)
    code, output = with_fault(arguments(tiny, folder, *RUN, *SHORT, *RESUME), folder, None)
    assert code == 0, output
    check_same_result(folder, whole)


def phase(folder):
    """In words, from the files, what a killed run was doing."""
    for name, run in (("baseline", folder / "baseline"), ("main run", folder)):
        if (run / OUTCOME).is_file():
            continue
        chosen = last_complete_checkpoint(run)
        step = int(chosen.rsplit("-", 1)[1]) if chosen else 0
        others = [int(path.name.rsplit("-", 1)[1]) for path in run.glob("checkpoint-*") if not (path / MARK).is_file()]
        if any(other > step for other in others):
            return f"{name}: writing checkpoint {max(others)}"
        if others:
            return f"{name}: deleting checkpoint {min(others)}"
        trained = (run / "trainer_state.json").is_file()
        return (
            f"{name}: evaluation and saving of the model" if trained else f"{name}: training or its evaluation after step {step}"
        )
    return "report" if (folder / "calibration.json").is_file() else "baking, or before the report"


@pytest.fixture(scope="module", params=[1, 2])
def scripted(request, tiny, tmp_path_factory):
    """The undisturbed script with all of its checkpoints, and its milestones: when each of these files came, in seconds."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run = [*RUN, "--num_train_epochs", "3", "--save_steps", "5", "--eval_steps", "5"]
    run += ["--per_device_train_batch_size", str(16 // request.param)]
    script(arguments(tiny, folder, *run, "--save_total_limit", "99"), request.param)
    files = [
        *folder.rglob(MARK),
        *folder.rglob(OUTCOME),
        *(folder / name for name in ("settings.json", "calibration.json", "README.md")),
    ]
    times = sorted((path.stat().st_mtime, str(path.relative_to(folder))) for path in files)
    milestones = [(seconds - times[0][0], name) for seconds, name in times]
    assert (milestones[0][1], milestones[-1][1]) == ("settings.json", "README.md")
    return SimpleNamespace(folder=folder, run=run, processes=request.param, milestones=milestones)


def family(process):
    parent = psutil.Process(process.pid)
    return [*parent.children(recursive=True), parent]  # torchrun's workers have sessions of their own


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", range(20))
def test_the_script_killed_at_a_random_time(tiny, tmp_path, scripted, moment):
    """kill -9 of all processes of the run at once."""
    draw, killed = random.Random(f"{moment} {scripted.processes}"), False
    while not killed:
        at = draw.uniform(0, scripted.milestones[-1][0])
        before = [(seconds, name) for seconds, name in scripted.milestones if seconds <= at]
        waited_for = [name for _, name in scripted.milestones[len(before) - 1 :]]  # it, or later ones: old checkpoints go
        folder = tmp_path / f"killed at {at:.3f}"
        process = torchrun(arguments(tiny, folder, *scripted.run), scripted.processes)
        wait_for(lambda known=waited_for, folder=folder: any((folder / name).is_file() for name in known), process)
        time.sleep(at - before[-1][0])
        if not (folder / "README.md").is_file() and process.poll() is None:  # else it came too late: draw again
            members = family(process)
            for member in members:
                member.kill()
            killed = not (folder / "README.md").is_file()
            psutil.wait_procs(members, 60)
        process.communicate()
    print(f"MOMENT {scripted.processes} process(es), {at:.2f} s of {scripted.milestones[-1][0]:.1f} s: {phase(folder)}")
    check_whole_files(folder)
    script([*arguments(tiny, folder, *scripted.run), *RESUME], scripted.processes)
    check_same_result(folder, scripted.folder)


def test_processes_agree_that_a_run_is_complete(tmp_path):
    launch(2, tmp_path, "complete_worker.py")


LONG = ["--do_train", "--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "1"]


@pytest.mark.timeout(200)
def test_a_rank_which_dies_ends_the_run_and_is_named(tiny, tmp_path):
    process = torchrun(arguments(tiny, tmp_path / "out", *LONG), 2)
    wait_for(lambda: last_complete_checkpoint(tmp_path / "out"), process)
    next(member for member in family(process) if member.environ().get("RANK") == "1").kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", output), output  # torchrun's own words, last
    assert last_complete_checkpoint(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_without_a_launcher_does_not_wait_for_a_dead_one(tiny, tmp_path, dead):
    """Ranks started by hand: nobody ends the survivor but its own broken connection, long before its time-out of half an hour."""
    address = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    folder = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *arguments(tiny, folder, *LONG)]
    ranks = []
    for rank in ("0", "1"):
        env = os.environ | address | {"PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        wait_for(lambda: last_complete_checkpoint(folder), ranks[0])
        ranks[dead].kill()
        output, _ = ranks[1 - dead].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1 - dead].returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"error: rank {1 - dead} of 2 stopped") and last.endswith("--resume_from_checkpoint last"), output
