"""The layouts of configs/accelerate as accelerate itself reads them; those for the CPU are launched."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from places import ROOT
from tiny_run import save_tiny_model
from torch.distributed.fsdp import StateDictType

FOLDER = ROOT / "configs" / "accelerate"
# name -> distributed type, processes, machines, on the CPU, precision
EXPECTED = {
    "cpu": (DistributedType.NO, 1, 1, True, "no"),
    "single_gpu": (DistributedType.NO, 1, 1, False, "bf16"),
    "multi_gpu": (DistributedType.MULTI_GPU, 4, 1, False, "bf16"),
    "fsdp2": (DistributedType.FSDP, 4, 1, False, "bf16"),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 4, 1, False, "bf16"),
    "multi_node": (DistributedType.MULTI_GPU, 8, 2, False, "bf16"),
}


def header(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def launch_line(name, launcher="accelerate launch"):
    """The words after the launcher in the header, its continuations joined."""
    text = "\n".join(header(name)).replace("\\\n", " ")
    return shlex.split(re.search(rf"^ *{launcher} (.*)", text, re.M).group(1))


def launched(name):
    """The settings which `accelerate launch` comes to for the line in the header."""
    return _validate_launch_command(launch_command_parser().parse_args(launch_line(name)))[0]


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_there_is_one_file_for_each_layout():
    assert {path.stem for path in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file_as_it_is_meant(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    found = (config.distributed_type, config.num_processes, config.num_machines, config.use_cpu, config.mixed_precision)
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launch_line_of_the_header_is_a_command(name, environment):
    args = launched(name)
    assert args.config_file == f"configs/accelerate/{name}.yaml"
    assert args.training_script == "scripts/finetune.py"
    assert (ROOT / args.training_script_args[args.training_script_args.index("--config") + 1]).is_file()
    assert (args.num_processes, args.num_machines, args.use_cpu) == EXPECTED[name][1:4]
    assert (args.use_fsdp, args.use_deepspeed, args.multi_gpu) == (
        name == "fsdp2", name == "deepspeed_zero3", name in ("multi_gpu", "multi_node"),
    )  # fmt: skip
    assert any("What to change" in line for line in header(name))


def test_a_process_of_several_on_the_cpu_is_told_of_the_others(environment):
    """What `check_started` notices them by."""
    launched = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "scripts/finetune.py"])
    told = prepare_simple_launcher_cmd_env(_validate_launch_command(launched)[0])[1]
    assert told["ACCELERATE_USE_CPU"] == "True" and "MASTER_ADDR" in told and "RANK" not in told


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_what_a_single_process_is_told(name, environment):
    env = prepare_simple_launcher_cmd_env(launched(name))[1]
    assert env["ACCELERATE_USE_CPU"] == str(EXPECTED[name][3])
    assert env["ACCELERATE_MIXED_PRECISION"] == EXPECTED[name][4]
    assert "MASTER_ADDR" not in env


def test_what_processes_of_two_machines_are_told(environment):
    args = launched("multi_node")
    args.machine_rank = 1  # the second machine: the first would look for a free port
    prepare_multi_gpu_env(args)
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("4", "2", 1)
    assert args.rdzv_endpoint == "192.0.2.1:29500"


def test_fsdp_is_the_second_and_its_plugin_agrees(environment):
    env = prepare_multi_gpu_env(launched("fsdp2"))
    assert env["ACCELERATE_USE_FSDP"] == "true"
    for key, value in env.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            environment.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.state_dict_type, plugin.reshard_after_forward) == (2, StateDictType.FULL_STATE_DICT, True)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert not plugin.activation_checkpointing


def test_deepspeed_is_stage_3(environment):
    args = launched("deepspeed_zero3")
    args.deepspeed_fields_from_accelerate_config = ""  # as launch_command fills it in
    env = prepare_deepspeed_cmd_env(args)[1]
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
    if not is_deepspeed_available():
        assert "pip install deepspeed" in " ".join(header("deepspeed_zero3"))


def test_the_lines_for_the_cpu_train_and_agree(tmp_path):
    save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    results = {}
    launchers = {"accelerate launch": ("accelerate.commands.launch", 16), "torchrun": ("torch.distributed.run", 8)}
    for name, (module, batch) in launchers.items():
        command = launch_line("cpu", name)
        settings = [
            *(
                "--model_name_or_path",
                str(tmp_path / "model"),
                "--output_dir",
                str(tmp_path / name),
                "--dataset_name",
                "snippets",
            ),
            *("--do_train", "--max_steps", "2", "--max_train_samples", "64"),
            *("--label_smoothing_factor", "0.1", "--per_device_train_batch_size", str(batch), "--max_length", "16"),
            *("--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--seed", "3"),
        ]
        command = command[: command.index("--config")]
        done = subprocess.run(
            [sys.executable, "-m", module, *command, *settings],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
            timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        results[name] = json.loads((tmp_path / name / "train_results.json").read_text())["train_loss"]
    assert results["torchrun"] == pytest.approx(results["accelerate launch"], rel=1e-5)
