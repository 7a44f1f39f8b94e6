"""`scripts/finetune.py` which kills itself with SIGKILL: `killed_run.py on_step_end 7 ...` at the seventh end of a step.

`before_mark 2` is when all files of the second checkpoint are written but the mark that it is complete; `on_predict 1` is after
the last training step and the evaluation on validation, before anything was reported.
"""

from __future__ import annotations

import os
import signal
import sys

from transformers import TrainerCallback

from hf_ls.checkpoint import CheckpointMark
from hf_ls.config import parse_config
from hf_ls.finetune import finetune


class Kill(TrainerCallback):
    """SIGKILL at the n-th time of an event."""

    def __init__(self, event: str, n: int) -> None:
        self.left = n
        setattr(self, event, self._count)

    def _count(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    kill = Kill(sys.argv[1], int(sys.argv[2]))
    if sys.argv[1] == "before_mark":
        mark = CheckpointMark.on_save
        CheckpointMark.on_save = lambda self, *args, **kwargs: (kill.before_mark(), mark(self, *args, **kwargs))[-1]
    finetune(parse_config(sys.argv[3:]), callbacks=[kill])
