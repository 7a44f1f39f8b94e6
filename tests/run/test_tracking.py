"""Plots in the trackers which are on: each once, by name, and nothing where none is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import arguments
from matplotlib.image import imsave

from hf_ls.run.manifest import Manifest
from hf_ls.run.publish import list_logs, show_plots

SHAPE = (4, 6, 3)


@pytest.fixture
def plots(tmp_path: Path) -> list[Path]:
    for name in ("confidence", "reliability"):
        imsave(tmp_path / f"{name}.png", np.zeros(SHAPE))
    return sorted(tmp_path.glob("*.png"))


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[name]).update(members)


def test_every_plot_is_logged_to_every_tracker(plots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Writer:
        def __init__(self, log_dir: str) -> None:
            seen["folder"] = Path(log_dir)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def add_image(self, name: str, image: Any, dataformats: str) -> None:
            seen[f"tensorboard {name}"] = image.shape if dataformats == "HWC" else None

    def log(tracker: str) -> Any:
        return lambda found: seen.update({f"{tracker} {name}": value for name, value in found.items()})

    for module in ("torch.utils.tensorboard", "tensorboardX"):
        fake(monkeypatch, module, SummaryWriter=Writer)
    fake(monkeypatch, "wandb", run=SimpleNamespace(log=log("wandb")), Image=str)
    started: list[Any] = []
    fake(monkeypatch, "trackio", log=log("trackio"), Image=str, init=lambda **given: started.append(given), finish=lambda: None)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = arguments(tmp_path / "run")
    args.report_to = ["tensorboard", "wandb", "trackio"]
    show_plots(args, plots)
    assert seen.pop("folder").is_relative_to(tmp_path / "run") and len(started) == 1
    names = [f"plots/{path.stem}" for path in plots]
    assert seen == {f"tensorboard {name}": SHAPE for name in names} | {
        f"{tracker} {name}": str(path) for tracker in ("wandb", "trackio") for name, path in zip(names, plots, strict=True)
    }
    seen.clear()
    args.report_to = []
    show_plots(args, plots)
    assert not seen


def test_tensorboard_reads_what_was_written(plots: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "run")
    args.report_to = ["tensorboard"]
    show_plots(args, plots)
    events = EventAccumulator(str(tmp_path / "run" / "runs" / "plots"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"plots/{path.stem}" for path in plots]


def test_the_logs_of_a_run_are_its_own(tmp_path: Path) -> None:
    """Else a run with TensorBoard could not be started over in its folder."""
    args = arguments(tmp_path)
    for report_to, own in (([], False), (["tensorboard"], True)):
        args.report_to, manifest = report_to, Manifest(tmp_path)
        list_logs(args, manifest)
        (tmp_path / "runs" / "Nov28").mkdir(parents=True)
        (tmp_path / "runs" / "Nov28" / "events").touch()
        if own:
            manifest.delete(first="settings.json")
        else:
            with pytest.raises(ValueError, match="runs/"):
                manifest.check_alone()
            shutil.rmtree(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
