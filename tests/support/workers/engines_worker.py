"""Trainings and evaluations under FSDP2 and DeepSpeed on a CPU; rank 0 writes the results.

python -m torch.distributed.run --nproc_per_node 2 tests/support/workers/engines_worker.py out.pt zero
DeepSpeed trains in float32 what it is not told to train in half, FSDP2 in the float64 of `processes_worker`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import transformers as tf
from launching import start_group
from processes_worker import trained

from hf_ls.run.launch import end_processes

RUNS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "fsdp": [
        ("fsdp", "llama", dict(evaluate_first=True)),
        ("fsdp", "llama late", dict(evaluate_first=True, accumulation=2)),
        ("accelerate fsdp", "bert", dict(resumed=True)),
        ("accelerate fsdp", "llama", dict(resumed=True)),
    ],
    "zero": [
        *((f"zero {stage}", name, dict(evaluate_first=True)) for stage in (1, 2, 3) for name in ("bert", "llama")),
        *((f"zero {stage}", "llama late", dict(accumulation=2)) for stage in (2, 3)),
        *((f"zero {stage}", "llama", dict(resumed=True)) for stage in (1, 2, 3)),
        ("zero 3", "llama", dict(evaluate_first=True, logits_free="on")),
        ("zero 3", "llama late", dict(accumulation=2, logits_free="on")),
    ],
}


def main(path: str, engine: str) -> None:
    """Run every case of an engine and save the results of rank 0."""
    if engine == "zero":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # Its all-reduce in shared memory is compiled at the first start, for minutes; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world = start_group()
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    results = [trained(name, layout, world, **options) for layout, name, options in RUNS[engine]]
    if rank == 0:
        torch.save(results, path)
    end_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
