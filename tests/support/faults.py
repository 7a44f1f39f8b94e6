"""`scripts/finetune.py` killed with SIGKILL at a chosen change of a file: `with_fault(argv, folder, Fault("rename", "README.md"))`.

Python tells an audit hook of every file which it opens, renames or deletes, before it does so.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from forked import Forked, all_ended
from transformers import TrainerCallback

from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune


@dataclass(frozen=True)
class Fault:
    """The n-th time of an event at a path below the run's folder.

    event: "open" for writing, "rename" to the path, "remove", "saved" after torch.save, "step" and "predict" of a run's folder;
        "*" is any of them.
    torn: a file which was "saved" is cut to half its size before the kill, one to "open" is emptied unless it is appended to;
        other events are whole.
    """

    event: str
    path: str
    n: int = 1
    torn: bool = False


class _Moments(TrainerCallback):
    """Tell the audit hook of steps in training and in evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        sys.audit("tests.step", os.path.join(args.output_dir, "step"))

    def on_prediction_step(self, args, state, control, **kwargs):
        sys.audit("tests.predict", os.path.join(args.output_dir, "predict"))


class _Hook:
    """Counts what matches the fault, and kills this process at the n-th; writes all that happens into `seen`."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.folder, self.fault, self.left = str(folder), fault, fault.n if fault else 0
        self.seen: list[str] = []
        self.busy = False

    def __call__(self, event: str, args: tuple) -> None:
        if self.busy or event not in ("open", "os.rename", "os.remove", "tests.saved", "tests.step", "tests.predict"):
            return
        self.busy = True
        try:
            self._look(event.rsplit(".", 1)[-1], args)
        finally:
            self.busy = False

    def _look(self, event: str, args: tuple) -> None:
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = args[1] if event == "rename" else args[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        if event == "remove" and args[1] != -1:  # shutil.rmtree names files within an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        path = os.path.abspath(path)
        if not path.startswith(self.folder + os.sep):
            return
        relative = path[len(self.folder) + 1 :]
        self.seen.append(f"{event} {relative}")
        if self.fault is None or not fnmatch.fnmatchcase(f"{event} {relative}", f"{self.fault.event} {self.fault.path}"):
            return
        self.left -= 1
        if self.left == 0:
            appended = event == "open" and args[2] & os.O_APPEND
            if self.fault.torn and event in ("open", "saved") and not appended:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
                os.truncate(path, os.path.getsize(path) // 2 if event == "saved" else 0)
            os.write(1, f"killed at {self.seen[-1]}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def _run(argv: list[str], folder: str, fault: Fault | None) -> None:
    save = torch.save

    def saving(what, where, *args, **kwargs):
        save(what, where, *args, **kwargs)
        sys.audit("tests.saved", where)

    torch.save = saving
    hook = _Hook(Path(folder).resolve(), fault)
    sys.addaudithook(hook)
    finetune(parse_config(argv), callbacks=[_Moments()])
    Path(folder).with_suffix(".events").write_text("\n".join(hook.seen))


def with_fault(argv: list[str], folder: Path, fault: Fault | None) -> tuple[int, str]:
    """Exit code (-9 where it was killed) and output of one run; a whole run leaves its events in `folder`.events."""
    return all_ended([Forked(_run, argv, str(folder), fault)], 250)
