"""Run by test_faults.py on two processes. Usage: complete_worker.py FOLDER

Both resume a complete run; the main one is faster, and takes `outcome.json` away, as it does while it bakes a temperature.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

from accelerate import PartialState
from launching import start_group

from hf_ls.run.finetune import _finished
from hf_ls.run.outcome import OUTCOME, Outcome


def main(folder: Path) -> None:
    rank, _ = start_group()
    PartialState(cpu=True)
    if rank == 0:
        Outcome(None, 0, None, 3, None, [], []).save(folder)
    PartialState().wait_for_everyone()
    time.sleep(rank)
    found = _finished(SimpleNamespace(training=SimpleNamespace(output_dir=str(folder), resume_from_checkpoint="last")))
    if rank == 0:
        (folder / OUTCOME).unlink()
    assert found is not None, f"rank {rank} takes the run for an unfinished one, and would wait for the others for ever"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
