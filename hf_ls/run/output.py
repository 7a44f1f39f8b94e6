"""The folder of a run: what an earlier run left in it, what may be deleted there, and who works in it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from hf_ls.common.errors import disk_sentence, read_json
from hf_ls.common.files import write_atomically
from hf_ls.common.settings import check_same, settings_of
from hf_ls.report.calibration_report import REPORT, SETTINGS
from hf_ls.report.card import check_card
from hf_ls.run.checkpoint import check_resumable, checkpoints
from hf_ls.run.config import Config
from hf_ls.run.manifest import Manifest
from hf_ls.run.publish import check_push, folder_of
from hf_ls.trainer.arguments import smoothing_of


def check_output(config: Config, model: Any) -> Manifest:
    """Refuse to mix two runs in one folder, before anything is written; what an earlier run there has written.

    Raises: ValueError for an earlier run in the folder, for resuming one with other settings or of another model, for a README.md
    written by hand, and for deleting what is not the run's.
    """
    training, folder = config.training, folder_of(config)
    check_card(folder)
    if training.should_save:
        check_place(folder)
    manifest, settings = Manifest(folder), _settings(config)
    known = [*(folder / name for name in (SETTINGS, REPORT)), *checkpoints(folder).values()]
    earlier = sorted({str(path) for path in known if path.exists()} | {str(folder / name) for name in manifest.files()})
    if training.push_to_hub and training.should_save and not config.run.dry_run:
        check_push(config)
    if config.run.overwrite_output_dir and not training.resume_from_checkpoint:
        check_deletable(config, folder)
        manifest.check_alone()
    elif earlier and not training.resume_from_checkpoint:
        raise ValueError(
            f"expected an output_dir without an earlier run, got {earlier[0]}; use --resume_from_checkpoint last, "
            "--overwrite_output_dir, or another output_dir"
        )
    elif earlier and not (folder / SETTINGS).is_file():
        raise ValueError(
            f"expected {SETTINGS} beside {earlier[0]}, got none: that run was being deleted, or is of another program; use "
            "--overwrite_output_dir or another output_dir"
        )
    elif earlier:
        saved = read_json(folder / SETTINGS, "start afresh in another output_dir")
        check_same(saved, settings, f"the run in {folder}", "restore them or start afresh")
    if training.resume_from_checkpoint not in (None, "last"):
        check_resumable(training.resume_from_checkpoint, smoothing_of(training), model)
    PartialState().wait_for_everyone()  # every process has looked before the first one writes
    return manifest


def check_place(folder: Path) -> None:
    """Look whether files can be written into the folder, or the folder be made.

    Raises: OSError with a sentence for the user.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    wrong = errno.ENOTDIR if not there.is_dir() else errno.EACCES if not os.access(there, os.W_OK | os.X_OK) else None
    if wrong is not None:
        error = OSError(wrong, os.strerror(wrong))
        raise OSError(wrong, disk_sentence(error, folder))


@contextmanager
def recorded(config: Config, manifest: Manifest) -> Iterator[None]:
    """Hold the folder of the run, delete the earlier run if that is wanted, and note the settings of this one.

    Raises: ValueError on all processes while another run works in the folder.
    """
    training, refused = config.training, None
    with ExitStack() as stack:
        if training.should_save:
            try:
                stack.enter_context(manifest.recording())
                if config.run.overwrite_output_dir and not training.resume_from_checkpoint:
                    manifest.delete(first=SETTINGS)  # nobody may resume a half-deleted run
                write_atomically(manifest.folder / SETTINGS, json.dumps(_settings(config), indent=1))
            except ValueError as error:
                refused = str(error)
        reasons = [reason for reason in gather_object([refused]) if reason]
        if reasons:
            raise ValueError(reasons[0])
        yield


def check_deletable(config: Config, folder: Path) -> None:
    """Refuse to delete in a folder which is a link, in which somebody works, or from which this run reads.

    Raises: ValueError.
    """
    if folder.is_symlink():
        raise ValueError(f"expected a folder to delete an earlier run in, got the link {folder}; give the folder it leads to")
    read = [Path(name) for name in config.sources if name and Path(name).exists()]
    for path in (Path.cwd(), Path.home(), *read):  # `/` and the folders above these too
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"expected a folder of a run alone to delete, got {folder} with {path} in it; give another output_dir"
            )


def _settings(config: Config) -> dict[str, Any]:
    """What a resumed run must share with the first start."""
    facts = {"num_processes": PartialState().num_processes, "mixed_precision": config.training.mixed_precision}
    return settings_of(*config.parts, **facts)
