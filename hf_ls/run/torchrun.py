"""torchrun which ends with one sentence: `python -m hf_ls.run.torchrun --standalone --nproc_per_node 2 scripts/finetune.py ...`.

Owns: which process failed first, and what to do then. Does not own: starting and ending the processes (torchrun's business: it
ends the others as soon as one dies).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

REMEDY = "mend the cause and go on with the same command and --resume_from_checkpoint last"


def failure(failures: Mapping[int, Any]) -> str:
    """One sentence about the processes which failed, by rank, each with an `exitcode`; -n is the death by signal n.

    torchrun dates failures to the second, so the first one is found by its kind: a process which was killed, before one which
    ended with an error (perhaps that a connection was lost), before those which torchrun itself ended with SIGTERM.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        code = failures[rank].exitcode
        return code == -signal.SIGTERM, code > 0, rank

    rank = min(failures, key=order)
    code = failures[rank].exitcode
    if code > 0:
        return f"error: rank {rank} ended with exit code {code}, its message stands above, and the others with it; {REMEDY}"
    name = signal.Signals(-code).name
    why = ", by hand or for want of memory" if code == -signal.SIGKILL else ""
    return f"error: rank {rank} was killed ({name}{why}), and the other processes were ended with it; {REMEDY}"


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    try:
        torchrun()
    except ChildFailedError as error:
        sys.exit(failure(error.failures))


if __name__ == "__main__":
    main()
