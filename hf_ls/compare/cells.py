"""The cells of a comparison: one run of `finetune` each, in a process and a folder of its own.

What a cell is and how it is set, which are finished, and how several run at a time without outliving this process. The
process itself is `worker`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_ls.common.errors import read_json
from hf_ls.common.files import locked, write_atomically
from hf_ls.compare.worker import WITH_PARENT
from hf_ls.run.arguments import DataArguments, TrainingQuestions
from hf_ls.run.config import Config
from hf_ls.run.manifest import Manifest
from hf_ls.trainer.arguments import smoothing_of, without_smoothing
from hf_ls.trainer.criterion import Criterion, parse_params

CELL = "cell.json"  # written last: a cell with it is finished
LOG = "log.txt"
SPEC = "spec.json"
_WORKER = "hf_ls.compare.worker"
_PACKAGE = Path(__file__).parents[1]
# Those of `accelerate launch`: a cell is a single process, whatever this one was started by.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOG_LINES = 20
# Settings of the data which say how rows become tokens; the others say which rows, and the files of cells hold these alone.
_AS_TOKENS = (
    "max_length", "max_target_length", "source_prefix", "source_suffix", "chat_template_path", "assistant_only_loss",
    "completion_only_loss", "packing",
)  # fmt: skip


class CellFailed(RuntimeError):
    """A cell ended without finishing."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    variant: "baseline", "smoothed", or the objective with its parameters. params: of the objective, as JSON.
    """

    variant: str
    objective: str
    params: str | None
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        """The folder's name: smoothed-0.1-seed0."""
        variant = re.sub(r"[^A-Za-z0-9._]+", "-", self.variant).strip("-")
        return f"{variant}{f'-{self.epsilon:g}' if self.epsilon else ''}-seed{self.seed}"


@dataclass(frozen=True)
class Spec:
    """All that the process of a cell is told.

    argv: the settings shared by all cells. data: "train", "validation", "test" -> file; ood: name -> file. columns: setting ->
    column of all files. questions: "test", "validation" -> file.
    """

    cell: Cell
    argv: list[str]
    data: dict[str, str]
    columns: dict[str, str]
    ood: dict[str, str]
    questions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"cell": Cell(**fields["cell"])})


def cell_config(base: Config, spec: Spec, folder: Path) -> Config:
    """The settings of one cell: the shared ones, but for its loss, its seed and its files.

    Raises: ValueError for an ε or an objective which cannot be.
    """
    cell = spec.cell
    training = copy.copy(base.training) if cell.epsilon else without_smoothing(base.training)
    changes: dict[str, Any] = {
        "label_smoothing_convention": base.training.label_smoothing_convention,  # which objectives read too
        "label_smoothing_factor": cell.epsilon,
        "label_smoothing_objective": cell.objective,
        "label_smoothing_objective_params": cell.params,
        "seed": cell.seed,
        "output_dir": str(folder),
        "run_name": cell.name,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "push_to_hub": False,
        "resume_from_checkpoint": None,
    }
    if not training.load_best_model_at_end:
        changes["save_strategy"] = type(training.save_strategy)("no")  # an unfinished cell starts again
    for name, value in changes.items():
        setattr(training, name, value)
    Criterion(smoothing_of(training), cell.objective, parse_params(cell.params))
    files: dict[str, Any] = {f"{split}_file": path for split, path in spec.data.items()}
    data = DataArguments(**files, **spec.columns, **{name: getattr(base.data, name) for name in _AS_TOKENS})  # type: ignore[arg-type]
    # The files hold what the settings made of the questions: whole prompts, their options, and the place of the right one.
    asked = replace(
        base.questions, question_file=spec.questions.get("test"), validation_question_file=spec.questions.get("validation"),
        question_column="prompt", options_column=["options"], options=[], answer_column="answer", answer_is="index",
        score="text", prompt_template=None, instruction="", few_shot_file=None,
    ) if spec.questions else TrainingQuestions()  # fmt: skip
    run = replace(base.run, with_baseline=False, bake_temperature=False)
    return replace(base, run=run, training=training, data=data, questions=asked)


def finished(folder: Path, spec: Spec) -> dict[str, Any] | None:
    """What the cell in this folder left when it finished; None if it did not, or was another one.

    That the shared settings are the same is checked once for the whole comparison.
    """
    if not (folder / CELL).is_file():
        return None
    found = read_json(folder / CELL, f"delete {CELL}, and the cell is run again")
    return found if Cell(**found["spec"]["cell"]) == spec.cell else None


def clear(cell: Path) -> None:
    """Delete what an earlier process of this cell left, but not what the comparison wrote for it.

    Raises: ValueError for a folder in which there is more than these.
    """
    _earlier(cell).delete(first=CELL, keep=(SPEC, LOG))


def _prepare(spec: Spec, folder: Path) -> Path:
    """The folder of a cell in that of all cells, with nothing in it but what its process is told.

    Raises: ValueError as `clear`.
    """
    cell = folder / spec.cell.name
    _earlier(cell).delete(first=CELL)
    write_atomically(cell / SPEC, spec.to_json())
    return cell


def _earlier(cell: Path) -> Manifest:
    comparison, earlier = Manifest(cell.parent), Manifest(cell)
    for path in (cell / SPEC, cell / LOG):
        if comparison.lists(path):
            earlier.claim(path)
    return earlier


def commands(specs: Sequence[Spec], folder: Path, threads: int) -> list[str]:
    """One command of a shell for each cell which is not finished or at work, to be run anywhere where these files are.

    Raises: ValueError as `clear`.
    """
    todo = []
    folder.mkdir(parents=True, exist_ok=True)
    with Manifest(folder).recording():
        for spec in (spec for spec in specs if finished(folder / spec.cell.name, spec) is None):
            with ExitStack() as held:
                try:
                    held.enter_context(cell_lock(folder / spec.cell.name, patience=0.0))
                except ValueError:  # a process of it lives, here or elsewhere
                    continue
                _prepare(spec, folder)
                todo.append(spec)
    threads_set = " ".join(f"{name}={value}" for name, value in _threads(threads).items())
    started = (
        f"cd {shlex.quote(os.getcwd())} && {threads_set} {shlex.quote(sys.executable)} -m {_WORKER}"  # paths may be relative
    )
    return [f"{started} {shlex.quote(str(folder / spec.cell.name))}" for spec in todo]


def _threads(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def run_cells(
    specs: Sequence[Spec], folder: Path, *, jobs: int, threads: int, announce: Callable[[str], None] = print
) -> dict[Cell, dict[str, Any]]:
    """Run the cells which are not finished, `jobs` at a time, and give what each left.

    Each cell is a process in a session of its own, which ends itself when this process ends, however that happens: it
    waits for the end of a pipe that only this process can write to.

    Raises: CellFailed with its sentence or the last lines of its log; cells which are running are then let finish.
    """
    todo = [spec for spec in specs if finished(folder / spec.cell.name, spec) is None]
    kept = len(specs) - len(todo)
    if kept:
        announce(f"{kept} of {len(specs)} cells are finished already")
    with Manifest(folder).recording() as manifest:
        return _run_cells(specs, todo, manifest, jobs=jobs, threads=threads, announce=announce)


def _run_cells(
    specs: Sequence[Spec], todo: Sequence[Spec], manifest: Manifest, *, jobs: int, threads: int, announce: Callable[[str], None]
) -> dict[Cell, dict[str, Any]]:
    folder, kept = manifest.folder, len(specs) - len(todo)
    running: dict[subprocess.Popen[bytes], tuple[Spec, float, int]] = {}
    failed: list[Spec] = []
    done, waiting = kept, list(todo)
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < jobs and not failed:
                slot = min(set(range(jobs)) - {used for _, _, used in running.values()})
                spec = waiting.pop(0)
                running[_start(spec, manifest, threads, slot)] = (spec, time.monotonic(), slot)
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                spec, started, _ = running.pop(process)
                _close(process)
                if process.returncode or finished(folder / spec.cell.name, spec) is None:
                    failed.append(spec)
                    announce(f"{spec.cell.name} failed (exit code {process.returncode})")
                    continue
                done += 1
                announce(f"[{done}/{len(specs)}] {spec.cell.name}: {time.monotonic() - started:.0f} s")
    finally:
        for process in running:
            _kill(process)
    if failed:
        cell = folder / failed[0].cell.name
        lines = (cell / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        if lines and lines[-1].startswith("error: "):  # a sentence for the user needs no log
            lines = [lines[-1].removeprefix("error: ")]
        raise CellFailed("\n".join([*lines, f"{failed[0].cell.name} failed; its folder is {cell}, finished cells are kept"]))
    found = {spec.cell: finished(folder / spec.cell.name, spec) for spec in specs}
    return {cell: left for cell, left in found.items() if left is not None}


def _start(spec: Spec, manifest: Manifest, threads: int, slot: int) -> subprocess.Popen[bytes]:
    """Start a cell in an empty folder, once one which is dying there has ended: a cell holds a lock while it lives.

    Raises: ValueError while another lives there, and as `clear`.
    """
    cell = manifest.folder / spec.cell.name
    with cell_lock(cell):
        _prepare(spec, manifest.folder)
        manifest.add(cell / LOG)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
        environment |= {**_threads(threads), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE.parent), environment.get("PYTHONPATH")]))
        environment |= {} if (gpu := one_gpu(slot)) is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with open(cell / LOG, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", _WORKER, WITH_PARENT, str(cell)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip


def cell_lock(cell: Path, patience: float = 30.0) -> AbstractContextManager[None]:
    """The lock of the cell in this folder.

    Raises: ValueError on entering, where another process does not give it up.
    """
    return locked(cell.parent / f".{cell.name}.lock", "wait for the process of this cell, or end it", patience=patience)


def one_gpu(slot: int) -> str | None:
    """The GPU for the cell in this slot, so that no cell spreads over several; None without GPUs."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return names[slot % count] if count else None


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a cell and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
    _close(process)
