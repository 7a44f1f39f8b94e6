"""Starting the worker scripts of the tests on several gloo processes; none outlives its test."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forked import all_ended, ranks
from places import PYTHONPATH, WORKERS

# A process which waits for a dead one gives up after this, long before the test does.
GLOO_TIMEOUT = timedelta(seconds=60)


def launch(world: int, path: Path, script: str, *arguments: str, timeout: float = 280) -> None:
    """Run `workers/script path arguments...` on `world` processes; its rank 0 writes `path`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
    code, output = all_ended(ranks(world, WORKERS / script, [str(path), *arguments], environment), timeout)
    assert code == 0, output[-6000:]


def start_group() -> tuple[int, int]:
    """Rank and number of processes of a worker, on one thread and with a timeout; accelerate takes the group as it is."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=GLOO_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()
