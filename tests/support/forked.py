"""Processes without the seconds of imports: forks of one server which has imported everything, each a session of its own.

`Forked` runs a function of a module of the tests and has the methods of a `subprocess.Popen` which the tests use.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import psutil

_SERVER = multiprocessing.get_context("forkserver")
# By names which are found without pytest's path.
_SERVER.set_forkserver_preload([
    *("hf_ls", "hf_ls.run.config", "hf_ls.run.finetune", "hf_ls.run.evaluate", "hf_ls.trainer.sft", "hf_ls.losses.linear"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "transformers.models.t5.modeling_t5"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.run", "peft", "relplot", "torch._dynamo"),
])  # fmt: skip


def begin(output: str, environment: Mapping[str, str]) -> None:
    """As a fresh interpreter in a session of its own begins, its output added to a file."""
    os.setsid()
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # an agent of torchrun has handlers of its own
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # accelerate collects garbage, all that the server has imported among it


def _run(call: Callable[..., None], arguments: Sequence[Any], output: str, environment: dict[str, str]) -> None:
    begin(output, environment)
    if sys.platform == "linux":  # the server ends with the tests, and this process with the server
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    call(*arguments)


class Forked:
    """A process which calls a function of a module; its output is in a file."""

    def __init__(
        self, call: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None, output: str | None = None
    ) -> None:
        if output is None:
            file, output = tempfile.mkstemp(suffix=".log")
            os.close(file)
        self.output = output
        wanted = dict(os.environ if environment is None else environment)
        self.process = _SERVER.Process(target=_run, args=(call, arguments, output, wanted))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """As that of a `Popen`: None while it runs, −9 where it was killed."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises: TimeoutExpired."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired(str(self.process), timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that the process has written, once it has ended."""
        self.wait(timeout)
        return Path(self.output).read_text(encoding="utf-8", errors="replace"), None

    def send_signal(self, number: int) -> None:
        """To this process alone; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With SIGKILL, waited for."""
        self.process.kill()
        self.process.join()


def survivors(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those which still run after so long; one which has ended and which nobody has waited for yet is none."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def run_file(path: str, argv: Sequence[str]) -> None:
    """As `python path argv...` does."""
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def ranks(world: int, path: Path, argv: Sequence[str], environment: Mapping[str, str]) -> list[Forked]:
    """The processes of one group, each `python path argv...` with the variables which torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        Forked(run_file, str(path), list(argv), environment={**environment, **group, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(world)
    ]


def all_ended(processes: Sequence[Forked], timeout: float) -> tuple[int, str]:
    """The first exit code which is not 0, and all output, the failed one's last; where one fails the others are ended."""
    deadline = time.monotonic() + timeout
    while any(one.poll() is None for one in processes) and not any(one.poll() for one in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = next((one for one in processes if one.poll()), None)
    late = failed is None and any(one.poll() is None for one in processes)
    for one in processes:
        if one.poll() is None:
            one.kill()
    last = [one for one in processes if one is failed]
    output = "".join(one.communicate()[0] for one in [*(one for one in processes if one is not failed), *last])
    return (1, f"{output}\nnot ended after {timeout} s") if late else (failed.returncode if failed else 0, output)
