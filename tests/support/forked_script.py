"""`scripts/finetune.py` as a command line starts it, but forked from a server which has imported everything: seconds for a run.

Two processes are those of torchrun itself, whose agent forks its workers where it would start an interpreter for each.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from places import ROOT
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("hf_ls.run.config", "hf_ls.run.finetune", "transformers.models.bert.modeling_bert", "peft", "relplot"),
        *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "torch.distributed.run"),
        *(
            "datasets.packaged_modules.csv.csv",
            "sklearn.isotonic",
            "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
        ),
    ]
)
_SCRIPT = str(ROOT / "scripts" / "finetune.py")


def start(argv: list[str], log: Path, processes: int = 1) -> psutil.Process:
    """The script with these arguments; its output goes to `log`, that of torchrun itself to `log`.launcher."""
    process = _SERVER.Process(target=_script if processes == 1 else _launcher, args=(argv, str(log), processes))
    process.start()
    _STARTED[process.pid] = process
    return psutil.Process(process.pid)


_STARTED: dict[int, multiprocessing.process.BaseProcess] = {}


def family(process: psutil.Process) -> list[psutil.Process]:
    """It and all that it started: torchrun's workers have sessions of their own."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds(process: psutil.Process) -> float:
    """Of the CPU, spent by the script's processes so far: how far they are, however busy the machine."""
    spent = 0.0
    for member in family(process):
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system
    return spent


def end(process: psutil.Process, timeout: float) -> int | None:
    """Wait for the exit code; None after `timeout` seconds, when all are killed."""
    started, members = _STARTED.pop(process.pid), family(process)
    started.join(timeout)
    code = started.exitcode
    if code is None:
        members = family(process)
    _, alive = psutil.wait_procs(members[1:], timeout if code is not None else 0.1)
    for member in [*alive, *(members[:1] if code is None else [])]:
        member.kill()
    started.join()
    return None if alive else code


def _begin(log: str, env: dict[str, str]) -> None:
    """As a fresh interpreter in a session of its own would begin."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    savefig = Figure.savefig

    def empty(figure: Figure, *args: Any, **kwargs: Any) -> None:  # most of the run would be the drawing of its plots
        figure.clear()
        savefig(figure, *args, **kwargs)

    Figure.savefig = empty  # type: ignore[method-assign,assignment]
    gc.freeze()  # accelerate collects garbage, all that the server has imported among it


def _script(argv: list[str], log: str, processes: int = 1, env: dict[str, str] | None = None) -> None:
    _begin(log, dict(os.environ) if env is None else env)
    sys.argv = [_SCRIPT, *argv]
    runpy.run_path(_SCRIPT, run_name="__main__")


class _Worker:
    """What torchrun asks of `subprocess.Popen`."""

    def __init__(self, argv: list[str], log: str, env: dict[str, str]) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=_script, args=(argv, log, 1, env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self.process.exitcode


def _launcher(argv: list[str], log: str, processes: int) -> None:
    _begin(f"{log}.launcher", dict(os.environ))
    SubprocessHandler._popen = lambda self, args, env: _Worker(argv, log, env)  # type: ignore[method-assign,assignment]
    torchrun.main(["--standalone", "--nproc_per_node", str(processes), _SCRIPT, *argv])
