"""A run which is told to stop: SIGTERM and SIGINT end it with a checkpoint to resume from, never with a result.

In training the step is finished, a checkpoint is saved, and then all processes end together; elsewhere, where nothing is lost,
the run ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_ls.run.launch import end_processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the run before it was done; `code` is the exit code of the shell's convention, 128 + signal.

    As KeyboardInterrupt it is no Exception: it may come up anywhere, also where one is caught and worded anew.

    in_training: on all processes after the same step, with a checkpoint.
    """

    def __init__(self, number: int, where: str, *, in_training: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.code = 128 + number
        self.in_training = in_training


class StopOnSignal(TrainerCallback):
    """At SIGTERM or SIGINT in training, finish the step, save a checkpoint and end the training, on all processes at once.

    A second signal ends the process as it would without this. It must stand before the callback which marks checkpoints.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals; only the main thread of a process can."""
        self.number = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end; the signal may reach the processes in different steps."""
        processes = PartialState()
        number = self.number or 0
        if processes.num_processes > 1:
            number = int(gather(torch.tensor([number], device=processes.device)).max())
        if number:
            self.number = number
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self._give_back()


def end_at_signals() -> None:
    """Make SIGTERM and SIGINT one exception, so that a script ends with a sentence wherever it is; a second ends it."""

    def stop(number: int, frame: Any) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number, "outside of training", in_training=False)

    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            signal.signal(each, stop)


def give_signals_back() -> None:
    """Let SIGTERM and SIGINT end the process without a word: all is done, and at its exit an exception would be a traceback."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def end_stopped(stopped: Stopped) -> int:
    """Say that the run was stopped and how it goes on; the exit code."""
    for each in _SIGNALS:  # a launcher sends them again, beside the terminal, and when the first process has ended
        signal.signal(each, signal.SIG_IGN)
    # Before the processes have found each other, nothing may wait for that now.
    is_main = PartialState().is_main_process if PartialState._shared_state else os.environ.get("RANK", "0") == "0"
    if is_main:
        print(f"{stopped}: go on with the same command and --resume_from_checkpoint last", file=sys.stderr, flush=True)
    if stopped.in_training:  # else the other processes may be anywhere
        end_processes()
    return stopped.code


def check_trained(trainer: Any, stop: StopOnSignal) -> None:
    """Refuse to take for a result what was trained for fewer steps than planned, but for early stopping.

    Raises: Stopped after a signal; ValueError where something else has ended the training.
    """
    state = trainer.state
    where = f"after step {state.global_step:,} of {state.max_steps:,}"
    if stop.number:
        raise Stopped(stop.number, where, in_training=True)
    callbacks = [found for found in trainer.callback_handler.callbacks if isinstance(found, EarlyStoppingCallback)]
    early = any(found.early_stopping_patience_counter >= found.early_stopping_patience for found in callbacks)
    if state.global_step < state.max_steps and not early:
        raise ValueError(
            f"expected all planned steps or early stopping, got an end {where}; go on with --resume_from_checkpoint last, or "
            "give more data or fewer steps"
        )


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` which counts on when the run is resumed, and does not train on where it had said to stop."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the count from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
