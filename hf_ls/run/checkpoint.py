"""Which checkpoint a run may resume from: the mark of a complete one, the last of them, and what must be the same."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_ls.common.errors import read_json
from hf_ls.common.files import write_atomically
from hf_ls.losses.smoothing import Smoothing
from hf_ls.run.manifest import CHECKPOINT, Manifest

MARK = "hf_ls_complete.json"
_SHAPE = ("model_type", "vocab_size", "hidden_size", "d_model", "dim", "num_hidden_layers", "n_layers", "n_layer", "id2label")


class CheckpointMark(TrainerCallback):
    """Write a mark into each checkpoint after every process has finished its part.

    The Trainer writes many files per checkpoint, some by each process; a killed run leaves some of them missing.
    It also deletes old checkpoints before this mark is written, whoever made them, so give `save_total_limit` here instead of
    to the Trainer: here only checkpoints go which the manifest lists, by default that of `output_dir`.
    """

    def __init__(self, smoothing: Smoothing, save_total_limit: int | None = None, manifest: Manifest | None = None) -> None:
        self.smoothing = smoothing
        self.save_total_limit = save_total_limit
        self.manifest = manifest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the mark from checkpoints behind the step where training begins: it will write them anew, file by file."""
        if PartialState().is_main_process:
            self.manifest = self.manifest or Manifest(args.output_dir)
            for step, folder in checkpoints(args.output_dir).items():
                if step > state.global_step:
                    (folder / MARK).unlink(missing_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """List the checkpoint which the Trainer is about to write."""
        if control.should_save:
            self._list(_checkpoint_of(args, state))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_step_end`."""
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_step_end`: whether this evaluation is the best one, the Trainer decides after it."""
        if control.should_save or args.save_strategy == SaveStrategy.BEST:
            self._list(_checkpoint_of(args, state))

    def _list(self, folder: Path) -> None:
        if self.manifest is not None and PartialState().is_main_process:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.manifest.add(folder, CHECKPOINT)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every process once its files are written."""
        processes = PartialState()
        processes.wait_for_everyone()
        if not processes.is_main_process or self.manifest is None:
            return
        folder = _checkpoint_of(args, state)
        write_atomically(folder / MARK, json.dumps(_identity(self.smoothing) | {"files": _contents(folder)}))
        self.manifest.finish(folder)
        self._delete_old(self.manifest, args.output_dir, state.best_model_checkpoint, state.global_step)

    def _delete_old(self, manifest: Manifest, output_dir: str, best: str | None, step: int) -> None:
        if not self.save_total_limit:
            return
        # What a killed run left of a later step is no checkpoint, so it must not push out a whole one.
        known = {at: folder for at, folder in checkpoints(output_dir).items() if at <= step and manifest.lists(folder)}
        name = Path(best).name if best else None
        order = sorted(known, key=lambda at: (at == step, known[at].name == name, at))  # the best one goes last but one
        keep = max(self.save_total_limit, 2 if len(order) > 1 and known[order[-2]].name == name else 1)
        for at in order[:-keep]:
            names = manifest.below(known[at])
            # The mark first: a half-deleted folder must not look complete.
            manifest.remove(sorted(names, key=lambda name: not name.endswith(f"/{MARK}")))


def _checkpoint_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _identity(smoothing: Smoothing) -> dict[str, Any]:
    return {"num_processes": PartialState().num_processes, "epsilon": smoothing.epsilon, "convention": smoothing.convention}


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file by its name, the mark left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK and path.suffix != ".tmp")

    def content(path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        names = [path.relative_to(folder).as_posix() for path in files]
        return dict(zip(names, pool.map(content, files), strict=True))


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The marked checkpoint with the highest step in `output_dir`, or None."""
    steps = {step: folder for step, folder in checkpoints(output_dir).items() if (folder / MARK).is_file()}
    return str(steps[max(steps)]) if steps else None


def checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The folders of checkpoints by their step, complete or not."""
    folders = [(folder.name.rsplit("-", 1)[1], folder) for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return {int(step): folder for step, folder in folders if step.isdigit()}


def check_resumable(checkpoint: str | os.PathLike, smoothing: Smoothing, model: Any = None) -> None:
    """Refuse a checkpoint which this run cannot continue exactly.

    Args:
        model: whose sizes and labels are compared with those of the checkpoint; None leaves this out.

    Raises: ValueError for an incomplete or changed checkpoint, one of another model, another number of processes (each has
    its own random state and share of the data) or another epsilon.
    """
    mark = Path(checkpoint) / MARK
    if not mark.is_file():
        raise ValueError(f"expected a complete checkpoint, got {checkpoint} without {MARK}; resume from 'last' or an earlier one")
    saved, now = read_json(mark, "resume from an earlier checkpoint, or start afresh"), _identity(smoothing)
    different = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    if different:
        shown = ", ".join(f"{name} {old} there and {new} here" for name, (old, new) in different.items())
        raise ValueError(f"expected the settings of {checkpoint}, got {shown}; resume with the same ones or start afresh")
    # A missing optimizer.pt would not stop the Trainer: it goes on without the optimizer's state, in silence. Nor does a bit
    # which has changed on the disk or in a copy.
    if changed := _changed(Path(checkpoint), saved.get("files")):
        raise ValueError(
            f"expected {checkpoint} as it was written, got {', '.join(changed)}; copy it again, resume from an earlier "
            "checkpoint, or start afresh"
        )
    if model is not None:
        _check_model(Path(checkpoint), model)


def _changed(checkpoint: Path, written: Any) -> list[str]:
    """In words, the files which are not as they were written; the main process looks, since all would read the same."""
    found: list[list[str]] = [[]]
    if PartialState().is_main_process:
        now = _contents(checkpoint)
        if not isinstance(written, dict) or not written:
            found = [[f"a {MARK} which names no files"]]
        else:
            found = [[_difference(name, now.get(name), was) for name, was in written.items() if now.get(name) != was]]
    return broadcast_object_list(found)[0]


def _difference(name: str, now: Any, was: Any) -> str:
    if now is None or not isinstance(was, dict):
        return f"no {name}" if now is None else f"{name} of another version of hf_ls"
    if now["bytes"] != was.get("bytes"):
        return f"{name} with {now['bytes']} of {was.get('bytes')} bytes"
    return f"{name} with other content"


def _check_model(checkpoint: Path, model: Any) -> None:
    if not (checkpoint / "config.json").is_file():  # adapters have none
        return
    saved, own = (
        read_json(checkpoint / "config.json", "resume from an earlier checkpoint"),
        json.loads(model.config.to_json_string(use_diff=False)),
    )
    different = [
        f"{name} {saved[name]} there and {own[name]} here"
        for name in _SHAPE
        if name in saved and name in own and saved[name] != own[name]
    ]
    if different:
        raise ValueError(
            f"expected a checkpoint of this model, got {checkpoint} with {', '.join(different)}; resume in the "
            "folder of its own run"
        )
