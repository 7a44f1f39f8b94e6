"""Starting the processes which were asked for, and ending them together.

Owns: noticing that `accelerate launch --cpu --num_processes N` started one process and starting all N; the orderly end; lines
which only the main process prints.
Does not own: anything in between (accelerate's business).
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import psutil
import yaml
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser

_RANKS = ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_missing_processes() -> None:
    """Replace this process by all N if accelerate was asked for N on the CPU and started only this one.

    accelerate (1.15 and before) starts several CPU processes only through mpirun; otherwise `--num_processes 2 --cpu` trains
    on one process, with half the batch, in silence. It does leave MASTER_ADDR without a rank, which is how it is noticed.

    Raises: ValueError when the number of processes cannot be found, or for several machines.
    """
    if "MASTER_ADDR" not in os.environ or any(name in os.environ for name in _RANKS):
        return
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return
    remedy = f"use torchrun --nproc_per_node N {sys.argv[0]} ..."
    processes = requested_processes(psutil.Process(os.getppid()).cmdline())
    if processes is None:
        raise ValueError(f"expected to find --num_processes of accelerate launch, got none; {remedy}")
    arguments = ["-m", "hf_ls.run.torchrun", "--standalone", "--nproc_per_node", str(processes), *sys.argv]
    # accelerate chose the threads per process for N processes already; the address is for a group that was never made.
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def end_processes() -> None:
    """Wait for every process, then take the process group down.

    A process which ends while the group lives may abort in the threads of gloo (seen once in some fifty runs), and torchrun then
    kills the others, rank 0 among them while it still writes the report. A `DistributedDataParallel` which outlives the group
    joins those threads while it holds the lock of the interpreter, which they may wait for (torch 2.13: one run in sixty hung).
    """
    gc.collect()  # the Trainer and its model refer to each other
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def explain_failure() -> None:
    """Inside `except`: on several processes, print the traceback and end with a sentence; else return.

    Whoever waits for a dead process gets an error of the connection, at once on this machine, after `ddp_timeout` where a whole
    machine was lost. Only torchrun sees which rank it was.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    traceback.print_exc()
    rank = f"rank {state.process_index} of {state.num_processes}"
    lost = "if it is about a connection or a time-out, another rank died first and its message tells why"
    sys.exit(f"error: {rank} stopped with the error above; {lost}; then go on with --resume_from_checkpoint last")


def announce(text: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)


def requested_processes(command: list[str]) -> int | None:
    """The number of processes which an `accelerate launch` command line asks for; None if it is no such command.

    Raises: ValueError for several machines.
    """
    start = next(
        (
            i
            for i, word in enumerate(command)
            if Path(word).name in ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")
        ),
        None,
    )
    if start is None:
        return None
    arguments = launch_command_parser().parse_args(command[start + 1 :])
    settings: dict[str, Any] = {}
    if arguments.config_file:
        settings = yaml.safe_load(Path(arguments.config_file).read_text(encoding="utf-8")) or {}
    machines = arguments.num_machines or settings.get("num_machines") or 1
    if machines > 1:
        raise ValueError(f"expected one machine, got num_machines={machines} without mpirun; use torchrun on each machine")
    processes = arguments.num_processes or settings.get("num_processes")
    return int(processes) if processes else None
