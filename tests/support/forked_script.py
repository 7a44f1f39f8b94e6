"""`scripts/finetune.py` as a command line starts it, but forked from a server which has imported everything: seconds for a run.

Two processes are those of torchrun itself, whose agent forks its workers where it would start an interpreter for each.
"""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from blank import leave_blank
from forked import Forked, begin, run_file
from places import ROOT
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

_SCRIPT = str(ROOT / "scripts" / "finetune.py")


def start(argv: list[str], log: Path, processes: int = 1) -> Forked:
    """The script with these arguments; its output goes to `log`, that of torchrun itself to `log`.launcher."""
    if processes == 1:
        return Forked(_script, argv, output=str(log))
    return Forked(_launcher, argv, str(log), processes, output=f"{log}.launcher")


def family(process: Forked) -> list[psutil.Process]:
    """It and all that it started: torchrun's workers have sessions of their own."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def seconds(process: Forked) -> float:
    """Of the CPU, spent by the script's processes so far: how far they are, however busy the machine."""
    spent = 0.0
    for member in family(process):
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system
    return spent


def end(process: Forked, timeout: float) -> int | None:
    """Wait for the exit code; None where it or one of its workers still runs after `timeout` seconds, when all are killed."""
    members = family(process)
    process.process.join(timeout)
    members = members if process.returncode is not None else family(process)
    _, alive = psutil.wait_procs(members[1:], timeout if process.returncode is not None else 0.1)
    for member in alive:
        member.kill()
    code = process.returncode
    process.kill()
    return None if alive else code


def _script(argv: list[str]) -> None:
    torch.set_num_threads(1)
    leave_blank()
    run_file(_SCRIPT, argv)


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_START = SubprocessContext._start


def _worker(argv: list[str], log: str, environment: dict[str, str], ready: Connection) -> None:
    begin(log, environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    ready.close()
    _script(argv)


class _Worker:
    """What torchrun asks of `subprocess.Popen`: once it is made, it is a session of its own without the agent's handlers."""

    def __init__(self, argv: list[str], log: str, environment: dict[str, str]) -> None:
        began, ready = multiprocessing.Pipe(duplex=False)
        arguments = (argv, log, environment, ready)
        self.process = multiprocessing.get_context("fork").Process(target=_worker, args=arguments)
        self.process.start()
        ready.close()
        began.poll(None)
        began.close()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self.process.exitcode


def _start(self: SubprocessContext) -> None:
    """As torchrun's, but a signal which comes meanwhile waits: torchrun would leave the workers made so far to themselves.

    It takes milliseconds there, and longer here, where all that the server has imported is forked.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    _START(self)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _launcher(argv: list[str], log: str, processes: int) -> None:
    SubprocessContext._start = _start  # type: ignore[method-assign]
    SubprocessHandler._popen = lambda self, args, env: _Worker(argv, log, env)  # type: ignore[method-assign,assignment]
    torchrun.main(["--standalone", "--nproc_per_node", str(processes), _SCRIPT, *argv])
