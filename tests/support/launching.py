"""Starting the worker scripts of the tests on several gloo processes; none outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from places import PYTHONPATH, WORKERS

# A process which waits for a dead one gives up after this, long before the test does.
GLOO_TIMEOUT = timedelta(seconds=60)


def launch(world: int, path: Path, script: str, *arguments: str, timeout: float = 280) -> None:
    """Run `tests/script path arguments...` on `world` processes; its rank 0 writes `path`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), str(WORKERS / script)]
    process = subprocess.Popen(
        [sys.executable, *command, str(path), *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-6000:]


def start_group() -> tuple[int, int]:
    """Rank and number of processes of a worker, on one thread and with a timeout; accelerate takes the group as it is."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=GLOO_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()
