"""What a row of the bad-input matrix is made of, and the means to write one: files, scripts run in this process, snapshots."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

TEXTS = {"good": "w1 w2 w3", "bad": "w4 w5 w6"}
CSV = "text,label\n" + "".join(f"{text} w{i},{label}\n" for i in range(10, 22) for label, text in TEXTS.items())
DEV = CSV.replace("w1 ", "w30 ").replace("w4 ", "w31 ")
OTHER = CSV.replace("w1 ", "w40 ").replace("w4 ", "w41 ")


@dataclass
class Place:
    """Where a row plays: its folder, which must be the same afterwards, and what lies outside of it."""

    folder: Path
    models: dict[str, str]  # kind -> folder
    patch: pytest.MonkeyPatch
    undo: list[Callable[[], Any]] = field(default_factory=list)

    def write(self, **files: str | bytes) -> None:
        """Files by name, with "_" before the suffix: train_csv."""
        for name, content in files.items():
            stem, _, suffix = name.rpartition("_")
            path = self.folder / f"{stem}.{suffix}"
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def snapshot(self) -> dict[str, bytes]:
        """Every file in the folder with its bytes; an empty folder is nothing (the Trainer makes its output_dir at once)."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): _content(path) for path in paths}


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:  # the beginning and the size will do for the line of 1 GB
        return file.read(2**25) + str(path.stat().st_size).encode()


Call = Callable[[Place], Any]


@dataclass(frozen=True)
class Row:
    """Wrong input, and what the user then sees.

    Args:
        sentence: found in the text of the error, a regular expression.
        error: its type. For a script, which ends with the sentence alone, that of the error behind it. None: no error, the call
            gives a differentiable 0.
        given: what is there before; the folder must look the same afterwards.
        may_add: names of what may be new afterwards, as of a run that was under way when the disk filled.
    """

    id: str
    call: Call
    sentence: str
    error: type[Exception] | None = ValueError
    given: Call = field(default=lambda place: None)
    may_add: str | None = None


def files(**content: str | bytes) -> Call:
    """Write files into the folder, train.csv unless another train file is given."""
    start = {} if any(name.startswith("train_") for name in content) else {"train_csv": CSV}
    return lambda place: place.write(**(start | content))


def script(name: str, place: Place, argv: list[str]) -> None:
    """Run scripts/<name>.py as `python` would, in this process; it ends with SystemExit where it ends with one sentence."""
    place.patch.setattr(sys, "argv", [f"{name}.py", *argv])
    place.patch.chdir(place.folder)
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


def finetune(*argv: str, model: str = "good", train: str | None = "train.csv") -> Call:
    """scripts/finetune.py on the files of the folder; later arguments win."""

    def call(place: Place) -> None:
        data = ["--train_file", train] if train else []
        fixed = [
            *("--model_name_or_path", place.models[model], "--output_dir", "out", *data, "--report_to", "none"),
            *("--use_cpu", "true", "--max_length", "16", "--max_steps", "1", "--disable_tqdm", "true", "--do_train", "--do_eval"),
            *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3"),
        ]
        script("finetune", place, [*fixed, *argv])

    return call


def evaluate(*argv: str, model: str = "good") -> Call:
    """scripts/evaluate.py on test.csv."""
    fixed = ("--output_dir", "out", "--test_file", "test.csv", "--use_cpu", "true")
    return lambda place: script("evaluate", place, ["--model_name_or_path", place.models[model], *fixed, *argv])


def compare(*argv: str) -> Call:
    """scripts/compare.py on train.csv, validation.csv and test.csv."""
    fixed = ("--output_dir", "out", "--train_file", "train.csv", "--use_cpu", "true", "--report_to", "none", "--max_steps", "1")
    return lambda place: script("compare", place, ["--model_name_or_path", place.models["good"], *fixed, *argv])
