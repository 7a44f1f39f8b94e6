"""The processes of a run: noticing that some were never started, ending them together, lines which only the main one prints."""

from __future__ import annotations

import gc
import os
import sys
import traceback

from accelerate import PartialState

_RANKS = ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")  # gloo, NCCL


def check_started() -> None:
    """Refuse to be the only process where `accelerate launch --cpu` was asked for several.

    accelerate (1.15 and before) starts several CPU processes only through mpirun; otherwise `--num_processes 2 --cpu` trains
    on one process, with half the batch, in silence. It leaves MASTER_ADDR without a rank, which is how it is noticed, and not
    how many it was asked for.

    Raises: ValueError.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in _RANKS):
        raise ValueError(
            "expected all processes which accelerate launch was asked for, got one of them (it starts several on the CPU only "
            f"through mpirun); use torchrun --nproc_per_node N {sys.argv[0]} --use_cpu true ..., N being the number of processes"
        )


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


def explain_failure(error: Exception) -> None:
    """Inside `except`: on several processes, print the traceback and end with a sentence; else return.

    Whoever waits for a dead process gets an error of the connection, at once on this machine, after `ddp_timeout` where a whole
    machine was lost. Only torchrun sees which rank it was. The traceback of an end which is another rank's would hide that one's.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    rank, again = f"rank {state.process_index} of {state.num_processes}", "then go on with --resume_from_checkpoint last"
    if any(said in str(error) for said in _LOST):
        sys.exit(f"error: {rank} stopped because another rank died first, whose message tells why; {again}")
    traceback.print_exc()
    lost = "if it is about a connection or a time-out, another rank died first and its message tells why"
    sys.exit(f"error: {rank} stopped with the error above; {lost}; {again}")


def announce(text: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)
