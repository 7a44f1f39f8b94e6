"""The process of one cell: `python -m hf_ls.compare.worker FOLDER`, started by `cells`.

A run of `finetune` with its fingerprint, then predictions on the out-of-domain sets, then `cell.json`. Nothing heavy is
imported before it watches its parent.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


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
    """Train, evaluate, predict on the out-of-domain sets, and write `cell.json` last."""
    import json
    import time
    from dataclasses import asdict

    import torch

    from hf_ls.common.files import write_atomically
    from hf_ls.compare.cells import CELL, SPEC, Spec, cell_config
    from hf_ls.compare.fingerprint import FINGERPRINT, Fingerprint
    from hf_ls.run.config import parse_config
    from hf_ls.run.finetune import finetune
    from hf_ls.run.manifest import Manifest

    started = time.monotonic()
    spec = Spec.from_json((folder / SPEC).read_text(encoding="utf-8"))
    config = cell_config(parse_config(spec.argv), spec, folder)
    fingerprint = Fingerprint()
    finetune(config, [fingerprint])
    with Manifest(folder).recording():
        if spec.ood:
            _predict(config, fingerprint.model, spec.ood, folder)
        left: dict[str, Any] = {
            "spec": asdict(spec),
            "fingerprint": json.loads((folder / FINGERPRINT).read_text(encoding="utf-8")),
            "device": str(config.training.device),
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_atomically(folder / CELL, json.dumps(left, indent=1) + "\n")


def _predict(config: Any, model: Any, files: dict[str, str], folder: Path) -> None:
    """Logits of the trained model on each file, to `ood.npz`, by the same way as those of test."""
    import numpy as np
    from datasets import DatasetDict, load_dataset

    from hf_ls.common.files import write_arrays
    from hf_ls.compare.results import OOD
    from hf_ls.data.classification import tokenise
    from hf_ls.run.loading import load_tokenizer
    from hf_ls.run.tasks import TASKS

    tokenizer, task = load_tokenizer(config), TASKS[config.run.task]
    trainer = task.trainer(
        model=model, args=config.training, data_collator=task.collator(tokenizer, model), processing_class=tokenizer
    )
    arrays: dict[str, Any] = {}
    for name, path in files.items():
        rows = load_dataset("parquet", data_files=path, split="train")
        tokens = tokenise(DatasetDict(train=rows), tokenizer, config.data.max_length)["train"]
        output = trainer.predict(tokens, metric_key_prefix=f"ood_{name}")
        arrays[f"logits_{name}"], arrays[f"labels_{name}"] = (
            np.asarray(output.predictions, np.float64),
            np.asarray(output.label_ids),
        )
    write_arrays(folder / OOD, **arrays)


def main() -> None:
    """Run the cell in the folder named on the command line; what is the user's to mend ends in one sentence."""
    end_with_parent()
    from hf_ls.common.errors import end_with
    from hf_ls.compare.cells import cell_lock

    folder = Path(sys.argv[1])
    try:
        with cell_lock(folder):
            run_cell(folder)
    except Exception as error:
        end_with(error)


if __name__ == "__main__":
    main()
