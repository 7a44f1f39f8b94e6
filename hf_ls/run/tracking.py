"""The plots of a finished run in the trackers which `report_to` names, beside what their callbacks logged while it trained."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_ls.run.manifest import CHECKPOINT, Manifest
from hf_ls.trainer.arguments import LabelSmoothingArguments

_LOGS = "runs"  # where TensorBoard's callback of the Trainer writes


def show_plots(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    """Log each picture as `plots/NAME` to TensorBoard, Weights & Biases and Trackio, as far as `report_to` names them."""
    for name in training.report_to or []:
        if name in _TRACKERS and plots:
            _TRACKERS[name](training, plots)


def list_logs(training: LabelSmoothingArguments, manifest: Manifest) -> None:
    """List the folder which TensorBoard's callback is about to make in that of a run: it is the run's, to delete with it."""
    if training.should_save and "tensorboard" in (training.report_to or []) and not os.getenv("TENSORBOARD_LOGGING_DIR"):
        manifest.add(Path(training.output_dir or "trainer_output", _LOGS), CHECKPOINT)


def _tensorboard(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    from matplotlib.image import imread

    module = "torch.utils.tensorboard" if importlib.util.find_spec("tensorboard") else "tensorboardX"  # as the Trainer
    folder = os.getenv("TENSORBOARD_LOGGING_DIR") or str(Path(training.output_dir or "trainer_output", _LOGS, "plots"))
    with importlib.import_module(module).SummaryWriter(log_dir=os.path.expanduser(folder)) as writer:
        for plot in plots:
            writer.add_image(f"plots/{plot.stem}", imread(plot)[..., :3], dataformats="HWC")


def _wandb(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:  # the Trainer's callback leaves it open
        wandb.run.log({f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots})


def _trackio(training: LabelSmoothingArguments, plots: Sequence[Path]) -> None:
    trackio: Any = importlib.import_module("trackio")
    trackio.init(  # as the Trainer's callback, which has finished it
        project=training.project, name=training.run_name, space_id=training.trackio_space_id, resume="allow",
        private=training.hub_private_repo, bucket_id=training.trackio_bucket_id,
    )  # fmt: skip
    trackio.log({f"plots/{plot.stem}": trackio.Image(str(plot)) for plot in plots})
    trackio.finish()


_TRACKERS: dict[str, Callable[[LabelSmoothingArguments, Sequence[Path]], None]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio,
}  # fmt: skip
