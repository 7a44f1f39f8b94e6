"""The process of one cell: `python -m hf_ls.compare.worker FOLDER`, started by `cells`, or by hand on any machine.

A run of `finetune` with its fingerprint, then what the comparison needs beside it, then `cell.json`. Nothing heavy is imported
before it watches its parent.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

WITH_PARENT = "--with_parent"  # end with the process that started this one; a command of a shell has none


def end_with_parent() -> None:
    """End this process and all that it started as soon as standard input ends, which it does when the parent does."""

    def watch() -> None:
        while os.read(0, 1 << 10):
            pass
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cell(folder: Path) -> None:
    """Train, evaluate, measure on the out-of-domain sets, and write `cell.json` last; nothing where that is there already."""
    import json
    import time
    from dataclasses import asdict

    import torch
    from accelerate import PartialState

    from hf_ls.common.files import write_atomically
    from hf_ls.compare.cells import CELL, SPEC, Spec, cell_config, clear, finished
    from hf_ls.compare.fingerprint import FINGERPRINT, Fingerprint
    from hf_ls.compare.results import measure_more
    from hf_ls.run.config import parse_config
    from hf_ls.run.finetune import finetune
    from hf_ls.run.manifest import Manifest

    started = time.monotonic()
    spec = Spec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    config = cell_config(parse_config(spec.argv), spec, folder)
    done = finished(folder, spec) is not None
    PartialState().wait_for_everyone()  # every process has looked before the first one writes
    if done:
        print(f"{spec.cell.name} is finished already", flush=True)
        return
    if config.training.should_save:
        clear(folder)
    PartialState().wait_for_everyone()
    finetune(config, [Fingerprint()], lambda trainer, loaded, outcome: measure_more(config, spec, trainer, loaded, outcome))
    if not config.training.should_save:
        return
    with Manifest(folder).recording():
        left: dict[str, Any] = {
            "spec": asdict(spec),
            "fingerprint": json.loads((folder / FINGERPRINT).read_text(encoding="utf-8")),
            "device": torch.cuda.get_device_name() if config.training.device.type == "cuda" else config.training.device.type,
            "threads": torch.get_num_threads(),
            "processes": config.training.world_size,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_atomically(folder / CELL, json.dumps(left, indent=1) + "\n")


def main() -> None:
    """Run the cell in the folder named on the command line; what is the user's to mend ends in one sentence."""
    if WITH_PARENT in sys.argv:
        end_with_parent()
    from contextlib import nullcontext

    from hf_ls.common.errors import end_with
    from hf_ls.compare.cells import cell_lock
    from hf_ls.run.launch import end_processes

    folder = Path(sys.argv[-1])
    try:
        with cell_lock(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():  # torchrun starts several
            run_cell(folder)
        end_processes()
    except Exception as error:
        end_with(error)


if __name__ == "__main__":
    main()
